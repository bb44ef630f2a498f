"""Trains the embedded student: `python -m benchmarks.nano.train FOLDER --tokens 30e6`. Resumes from its checkpoint.

Writes gates.jsonl (accuracy of each kind of document, on text, wordings and label words of the set "dev"),
checkpoint.pt, and a Hugging Face folder at every gate.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.nano import corpus, model, tokenizer

LENGTHS = (48, 96, 144, 208, 288)
STEP_TOKENS = 2048

CURRICULUM: tuple[tuple[float, dict[str, float]], ...] = (
    (1.2e6, {"repeat": 0.35, "copy": 0.2, "recall": 0.25, "words": 0.2}),
    (4e6, {"repeat": 0.06, "copy": 0.06, "recall": 0.1, "words": 0.13, "mapped_words": 0.15, "mapped_phrases": 0.22,
           "inputs_words": 0.1, "single": 0.15, "inputs_lists": 0.03}),
    (math.inf, {"repeat": 0.03, "copy": 0.03, "recall": 0.05, "words": 0.03, "mapped_words": 0.04,
                "mapped_phrases": 0.12, "mapped_sentences": 0.25, "inputs_words": 0.03, "inputs_phrases": 0.05,
                "inputs_sentences": 0.17, "single": 0.05, "pair": 0.12, "inputs_lists": 0.03}),
)  # fmt: skip
"""Until that many tokens, these shares of documents."""


def batches(seed: int, done: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, weights) of about STEP_TOKENS, documents of similar length together; `done[0]` is tokens so far."""
    rng = random.Random(seed)
    waiting: dict[int, list[corpus.Document]] = {length: [] for length in LENGTHS}
    while True:
        mixture = next(shares for until, shares in CURRICULUM if done[0] < until)
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        document = corpus.KINDS[kind](rng, "train")
        length = next((length for length in LENGTHS if len(document[0]) <= length), None)
        if length is None:
            continue
        waiting[length].append(document)
        if len(waiting[length]) * length >= STEP_TOKENS:
            yield pad(waiting[length], length)
            waiting[length] = []


def pad(documents: list[corpus.Document], length: int) -> tuple[Tensor, Tensor]:
    ids, weights = torch.ones(len(documents), length, dtype=torch.long), torch.zeros(len(documents), length)
    for row, (some, weight) in enumerate(documents):
        ids[row, : len(some)], weights[row, : len(some)] = torch.tensor(some), torch.tensor(weight)
    return ids, weights


class Muon:
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., 2024); same-shaped matrices together."""

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        self.lr, self._beta = lr, momentum
        self._shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            self._shapes.setdefault(matrix.shape, []).append(matrix)
        self.momenta = [torch.zeros(len(some), *shape) for shape, some in self._shapes.items()]

    def step(self) -> None:
        for (shape, matrices), momentum in zip(self._shapes.items(), self.momenta, strict=True):
            gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
            momentum.lerp_(gradients, 1 - self._beta)
            updates = orthogonalise(gradients.lerp(momentum, self._beta)) * max(1, shape[0] / shape[1]) ** 0.5
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.data.add_(update, alpha=-self.lr)
                matrix.grad = None


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """(n, rows, columns) -> the nearest semi-orthogonal matrices, roughly."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    turned = x.shape[-2] > x.shape[-1]
    x = x.mT if turned else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if turned else x).float()


def gates(student: model.Student, which: str, count: int = 150) -> dict[str, float]:
    """Per kind of document: share of last answers that greedy decoding gets right in full (input kinds: of bearers)."""
    result = {}
    student.eval()
    for kind, make in corpus.KINDS.items():
        if kind == "inputs_lists":
            continue
        rng = random.Random(f"gate {kind}")
        right = [_last_answer(student, make(rng, which)) for _ in range(count)]
        result[kind] = round(sum(right) / count, 3)
    student.train()
    return result


def _last_answer(student: model.Student, document: corpus.Document) -> bool:
    ids, weights = torch.tensor(document[0]), document[1]
    last = max(i for i, weight in enumerate(weights) if weight >= 1)
    first = last
    while weights[first - 1] >= 1:
        first -= 1
    with torch.no_grad():
        logits = student(ids[None, :last])[0]
    return bool((logits[first - 1 :].argmax(-1) == ids[first : last + 1]).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=float, default=30e6)
    parser.add_argument("--gate-every", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon", type=float, default=0.007)
    parser.add_argument("--adam", type=float, default=1.5e-3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decay", type=float, default=0.25, help="share of the tokens over which the rates fall")
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    shape = model.Shape(vocab=len(tokenizer.pieces()), hidden=options.hidden, mlp=options.mlp)
    student = model.Student(shape)
    model.initialise(student, options.seed)
    matrices = [p for block in student.blocks for p in block.parameters() if p.ndim == 2]
    others = [p for p in student.parameters() if not any(p is m for m in matrices)]
    muon, adam = (
        Muon(matrices, options.muon),
        torch.optim.AdamW(others, options.adam, betas=(0.9, 0.98), weight_decay=0),
    )
    done, steps = [0.0], 0
    checkpoint = options.folder / "checkpoint.pt"
    options.folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(saved["student"])
        muon.momenta = saved["muon"]
        adam.load_state_dict(saved["adam"])
        done[0], steps = saved["tokens"], saved["steps"]
    started, at_start, next_gate, losses = time.time(), done[0], done[0] + options.gate_every, []
    for ids, weights in batches(options.seed + int(done[0]), done):
        rate = min(1.0, (steps + 1) / 50) * min(
            1.0, (options.tokens - done[0]) / (options.decay * options.tokens) + 0.02
        )
        muon.lr, adam.param_groups[0]["lr"] = options.muon * rate, options.adam * rate
        losses.append(step(student, ids, weights))
        muon.step()
        adam.step()
        adam.zero_grad()
        done[0] += ids.numel()
        steps += 1
        if done[0] >= min(next_gate, options.tokens):
            next_gate += options.gate_every
            line = {
                "tokens": done[0], "minutes": round((time.time() - started) / 60, 1), "loss": sum(losses) / len(losses),
                "tokens_per_s": round((done[0] - at_start) / (time.time() - started)), **gates(student, "dev"),
            }  # fmt: skip
            losses = []
            with (options.folder / "gates.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            state = {"student": student.state_dict(), "muon": muon.momenta, "adam": adam.state_dict()}
            torch.save({**state, "tokens": done[0], "steps": steps}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
            folder = options.folder / f"{done[0] / 1e6:.0f}M"
            model.export(student, folder)
            tokenizer.write_tokenizer(folder)
            if done[0] >= options.tokens:
                return


def step(student: model.Student, ids: Tensor, weights: Tensor) -> float:
    """One forward and backward pass; returns the mean weighted loss, nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(ids[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    return float(loss.detach())


if __name__ == "__main__":
    main()
