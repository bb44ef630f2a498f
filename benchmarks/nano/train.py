"""Trains a small student: `python -m benchmarks.nano.train FOLDER --tokens 30e6`. Resumes from its checkpoint.

Writes gates.jsonl (accuracy of each kind of document, on text, wordings and label words of the set "dev"),
checkpoint.pt, and a Hugging Face folder at every gate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.nano import corpus, model, tokenizer, world

LENGTHS = tuple(range(32, 289, 16))
STEP_TOKENS = 2048

CURRICULUM: tuple[tuple[float, dict[str, float]], ...] = (
    (0.6e6, {"repeat": 0.35, "copy": 0.2, "recall": 0.25, "words": 0.2}),
    (2e6, {"repeat": 0.05, "copy": 0.06, "recall": 0.14, "words": 0.10, "mapped_words": 0.16, "mapped_phrases": 0.20,
           "inputs_words": 0.16, "single": 0.10, "inputs_lists": 0.03}),
    (math.inf, {"repeat": 0.02, "copy": 0.04, "recall": 0.05, "words": 0.03, "mapped_words": 0.05,
                "mapped_phrases": 0.10, "mapped_sentences": 0.23, "inputs_words": 0.08, "inputs_phrases": 0.08,
                "inputs_sentences": 0.15, "single": 0.05, "pair": 0.10, "inputs_lists": 0.02}),
)  # fmt: skip
"""Until that many tokens, these shares of documents."""


def batches(seed: int, state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, weights) of about STEP_TOKENS, documents of similar length together, by the mixture of the moment."""
    rng = random.Random(seed)
    waiting: dict[int, list[corpus.Document]] = {length: [] for length in LENGTHS}
    while True:
        mixture = next(shares for until, shares in CURRICULUM if state.tokens < until)
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        document = corpus.KINDS[kind](rng, "train")
        length = next((length for length in LENGTHS if len(document[0]) <= length), None)
        if length is None:  # longer than a step takes; hardly ever
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
        check = _carries_label if kind.startswith("inputs") else _last_answer
        right = [check(student, make(rng, which)) for _ in range(count)]
        result[kind] = round(sum(right) / count, 3)
    student.train()
    return result


def _last_answer(student: model.Student, document: corpus.Document) -> bool:
    ids, weights = torch.tensor(document[0]), document[1]
    end = max(i for i, weight in enumerate(weights) if weight >= 1)  # the last answer's end of line, which may wait
    last = end - 1 if document[0][end] in (0, tokenizer.encode("\n")[0]) else end
    first = last
    while weights[first - 1] >= 1:
        first -= 1
    with torch.no_grad():
        logits = student(ids[None, :last])[0]
    return bool((logits[first - 1 :].argmax(-1) == ids[first : last + 1]).all())


def _carries_label(student: model.Student, document: corpus.Document) -> bool:
    """Whether, where the last input's bearer stands, its value is the likeliest of the attribute's."""
    last = max(i for i, weight in enumerate(document[1]) if weight > 1)
    with torch.no_grad():
        shares = student(torch.tensor([document[0][:last]]))[0, -1].softmax(-1)
    attribute, value = world.values_of_words()[tokenizer.pieces()[document[0][last]][1:]]
    mass = {one: float(shares[_bearer_ids(attribute, one)].sum()) for one in world.ATTRIBUTES[attribute]}
    return max(mass, key=lambda one: mass[one]) == value


def _bearer_ids(attribute: str, value: str) -> list[int]:
    return [i for word in world.bearers(attribute, value) for i in tokenizer.encode(f" {word}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=float, default=30e6, help="where the rates reach their end")
    parser.add_argument("--stop", type=float, default=math.inf, help="end after so many tokens, mid-way")
    parser.add_argument("--gate-every", type=float, default=1e6)
    parser.add_argument("--gate-documents", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon", type=float, default=0.006)
    parser.add_argument("--adam", type=float, default=1.5e-3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2, help="each computes STEP_TOKENS of a step on one core")
    parser.add_argument("--decay", type=float, default=0.7, help="share of the tokens over which the rates fall")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    for rank in range(1, options.processes):  # they end with this one, whatever ends it: their next message fails
        context.Process(target=train, args=(rank, options), daemon=True).start()
    train(0, options)


@dataclass
class State:
    """All that a checkpoint holds."""

    student: model.Student
    muon: Muon
    adam: torch.optim.AdamW
    tokens: int = 0
    steps: int = 0

    def save(self, path: Path) -> None:
        parts = {"student": self.student.state_dict(), "muon": self.muon.momenta, "adam": self.adam.state_dict()}
        torch.save({**parts, "tokens": self.tokens, "steps": self.steps}, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.student.load_state_dict(saved["student"])
        self.adam.load_state_dict(saved["adam"])
        self.muon.momenta, self.tokens, self.steps = saved["muon"], saved["tokens"], saved["steps"]


def begin(options: argparse.Namespace) -> State:
    student = model.Student(model.Shape(vocab=len(tokenizer.pieces()), hidden=options.hidden, mlp=options.mlp))
    model.initialise(student, options.seed)
    matrices = [p for block in student.blocks for p in block.parameters() if p.ndim == 2]
    others = [p for p in student.parameters() if not any(p is matrix for matrix in matrices)]
    adam = torch.optim.AdamW(others, options.adam, betas=(0.9, 0.98), weight_decay=0)
    return State(student, Muon(matrices, options.muon), adam)


def train(rank: int, options: argparse.Namespace) -> None:
    """One of the processes: they share nothing but gradients, and only the first one writes."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    checkpoint = options.folder / "checkpoint.pt"
    meeting = options.folder / f"meeting.{os.getpid() if rank == 0 else os.getppid()}"
    dist.init_process_group("gloo", f"file://{meeting.resolve()}", rank=rank, world_size=options.processes)
    state = begin(options)
    if checkpoint.is_file():
        state.load(checkpoint)
    dist.barrier()  # nobody writes a checkpoint before all have read the last one
    began, first, losses = time.time(), state.tokens, []
    next_gate = first + options.gate_every
    for ids, weights in batches(options.seed + rank + state.tokens, state):
        rate = rate_at(state, options)
        state.muon.lr, state.adam.param_groups[0]["lr"] = options.muon * rate, options.adam * rate
        losses.append(step(state, ids, weights))
        state.tokens += STEP_TOKENS * options.processes
        done = state.tokens >= min(options.tokens, options.stop)
        if rank == 0 and (done or state.tokens >= next_gate):
            next_gate += options.gate_every
            speed = round((state.tokens - first) / (time.time() - began))
            gate(state, options, {"loss": round(sum(losses) / len(losses), 4), "tokens_per_s": speed})
            losses = []
            state.save(checkpoint)
        if done:
            break
    dist.destroy_process_group()


def rate_at(state: State, options: argparse.Namespace) -> float:
    """Share of the peak rates: a short rise, then, over the last part of the tokens, a straight fall."""
    left: float = (options.tokens - state.tokens) / (options.decay * options.tokens)
    return min(1.0, (state.steps + 1) / 50) * min(1.0, left + 0.02)


def gate(state: State, options: argparse.Namespace, facts: dict[str, float]) -> None:
    """Logs the gates, and leaves the student as a Hugging Face folder."""
    line = {"tokens": state.tokens, **facts, **gates(state.student, "dev", options.gate_documents)}
    print(json.dumps(line), flush=True)
    with (options.folder / "gates.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    folder = options.folder / f"{state.tokens / 1e6:.0f}M"
    model.export(state.student, folder)
    tokenizer.write_tokenizer(folder)


def average(student: model.Student) -> None:
    """Gradients of all processes, in one message, and their clipping."""
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= dist.get_world_size() * max(1.0, float(together.norm()) / dist.get_world_size())
    for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def step(state: State, ids: Tensor, weights: Tensor) -> float:
    """One step of the optimizers; returns the mean weighted loss, nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = state.student(ids[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    loss.backward()
    average(state.student)
    state.muon.step()
    state.adam.step()
    state.adam.zero_grad()
    state.steps += 1
    return float(loss.detach())


if __name__ == "__main__":
    main()
