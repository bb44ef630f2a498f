"""The five workloads of `bench_pool`: rows of token ids, new ones in each repeat, so that nothing is cached before."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines.models import linear_modules, tensor_shapes, weights_digest
from engines.types import AdapterRef, Request, Sampling, ScoreRequest, Work, num_prompt_tokens, num_sequences

TEXT = "the river moved slowly past old stone houses while children counted boats, and nobody asked them why."
WORKLOADS = ("short", "shared", "mixed", "lora", "scoring")
CACHED = ("shared", "lora", "scoring")
"""Those whose prompts share a prefix."""
WARM_ROWS = 200
"""Enough for a repeat that is not counted, number -1."""
UNSEEDED = "short-unseeded"
"""The rows of "short" without a seed of their own."""


@dataclass(frozen=True)
class Sizes:
    """Rows of each workload, and the tokens of the prefix that its prompts share."""

    short: int = 1000
    shared: int = 300
    mixed: int = 500
    lora: int = 1000
    scoring: int = 2000
    prefix_tokens: int = 400

    def times(self, scale: float) -> Sizes:
        names = ("short", "shared", "mixed", "lora", "scoring")
        return replace(self, **{name: max(20, int(scale * getattr(self, name))) for name in names})


@dataclass(frozen=True)
class Drawer:
    """Draws a workload's rows; all contestants draw the same. `alphabet`: token ids of plain text."""

    sizes: Sizes
    alphabet: Sequence[int]
    adapters: Sequence[AdapterRef]
    seed: int = 0

    def rows(self, workload: str, repeat: int) -> list[Work]:
        source = "short" if workload == UNSEEDED else workload
        rng = random.Random(f"{self.seed}/{source}/{repeat}")
        rows: list[Work] = getattr(self, f"_{source}")(rng)
        if workload == UNSEEDED:
            rows = [replace(row, sampling=replace(row.sampling, seed=None)) for row in rows if isinstance(row, Request)]
        named = [replace(row, id=f"{workload}-{repeat}-{number}") for number, row in enumerate(rows)]
        return named[:WARM_ROWS] if repeat < 0 else named

    def _ids(self, rng: random.Random, count: int) -> list[int]:
        return rng.choices(self.alphabet, k=count)

    def _short(self, rng: random.Random) -> list[Work]:
        """Free generation from prompts that share nothing."""
        return [Request("", self._ids(rng, 24), sampled(rng, 64)) for _ in range(self.sizes.short)]

    def _shared(self, rng: random.Random) -> list[Work]:
        """Annotation: one long prefix, ten short samples of each row."""
        prefix = self._ids(rng, self.sizes.prefix_tokens)
        return [Request("", prefix + self._ids(rng, 16), sampled(rng, 8, n=10)) for _ in range(self.sizes.shared)]

    def _mixed(self, rng: random.Random) -> list[Work]:
        """Many short prompts and answers, some long."""
        lengths = [(int(16 * 32 ** rng.random()), int(8 * 24 ** rng.random())) for _ in range(self.sizes.mixed)]
        return [Request("", self._ids(rng, prompt), sampled(rng, answer)) for prompt, answer in lengths]

    def _lora(self, rng: random.Random) -> list[Work]:
        """Evaluation of several finetuned students and the untuned one: a task each, with its prefix; greedy."""
        greedy, students = Sampling(temperature=0.0, max_tokens=24), [None, *self.adapters]
        prefixes = [self._ids(rng, self.sizes.prefix_tokens) for _ in students]
        turns = (number % len(students) for number in range(self.sizes.lora))
        return [Request("", prefixes[i] + self._ids(rng, 24), greedy, students[i]) for i in turns]

    def _scoring(self, rng: random.Random) -> list[Work]:
        """Log-probabilities of completions after one long prefix."""
        prefix = self._ids(rng, self.sizes.prefix_tokens)
        lengths = [rng.randint(8, 40) for _ in range(self.sizes.scoring)]
        return [ScoreRequest("", prefix, self._ids(rng, length)) for length in lengths]


def sampled(rng: random.Random, max_tokens: int, n: int = 1) -> Sampling:
    return Sampling(n=n, temperature=1.0, max_tokens=max_tokens, seed=rng.getrandbits(62))


def attainable_hits(rows: Sequence[Work], block_size: int) -> float:
    """The share of prompt tokens that an endless prefix cache holds already, rows one after another. Of a row with
    several samples vLLM counts the last one's, which finds the whole prompt."""
    seen: set[tuple[str, bytes]] = set()
    found = total = 0
    for row in rows:
        ids = [*row.prefix_ids, *row.completion_ids] if isinstance(row, ScoreRequest) else row_prompt(row)
        whole = (len(ids) - 1) // block_size * block_size
        name, chain = row.adapter.digest if row.adapter else "", hashlib.sha256()
        unbroken = True
        for start in range(0, whole, block_size):
            chain.update(json.dumps(ids[start : start + block_size]).encode())
            key = name, chain.digest()
            unbroken &= key in seen or num_sequences(row) > 1
            found += block_size * unbroken
            seen.add(key)
        total += num_prompt_tokens(row)
    return found / total


def row_prompt(row: Work) -> list[int]:
    assert isinstance(row, Request)
    return list(row.prompt_ids)


def write_adapters(folder: Path, base: Path, base_digest: str, count: int, rank: int) -> list[AdapterRef]:
    """LoRA adapters of all matrices inside the layers, with random weights."""
    import torch
    from safetensors.torch import save_file

    modules, refs = linear_modules(base), []
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    inside = {name.removesuffix(".weight"): shape for name, shape in tensor_shapes(base).items()
              if ".layers." in name and len(shape) == 2}  # fmt: skip
    for number in range(count):
        draw, path = torch.Generator().manual_seed(number), folder / f"adapter-{number}"
        path.mkdir(parents=True)
        weights = {}
        for module, shape in inside.items():
            for side, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                weights[f"base_model.model.{module}.lora_{side}.weight"] = 0.05 * torch.randn(size, generator=draw)
        save_file(weights, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
        refs.append(AdapterRef(weights_digest(path), str(path), rank, base_digest))
    return refs
