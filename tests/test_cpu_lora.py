"""The LoRA kernels of vLLM's CPU build: the arithmetic, and real vLLM with all of its adapter slots taken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pytest

from engines.types import AdapterRef, Score, ScoreRequest
from selfguide.api import Session

CHECK = """
import json, torch
from engines import cpu_lora
from vllm.lora.punica_wrapper import punica_cpu

draw = torch.Generator().manual_seed(0)
x, a, b = (torch.randn(*size, generator=draw) for size in ((7, 12), (3, 1, 4, 12), (3, 1, 10, 4)))
slots = torch.tensor([2, -1, 0, 0, 2, -1, 1])
used = [slot for slot in slots.tolist()]
low = torch.stack([torch.zeros(4) if s < 0 else 0.5 * a[s, 0] @ row for s, row in zip(used, x)])
high = torch.stack([torch.zeros(10) if s < 0 else b[s, 0] @ row for s, row in zip(used, low)])
differences = {}

def compare(name, found, wanted):
    differences[name] = float((found - wanted).abs().max())

out = torch.full((7, 4), 9.0)
punica_cpu.bgmv_shrink(x, a, out, slots, 0.5)
compare("shrink", out, low)
before = torch.randn(7, 16, generator=draw)
out = before.clone()
punica_cpu.bgmv_expand(low, b, out, slots, True)
compare("expand", out, before + torch.nn.functional.pad(high, (0, 6)))
out = before.clone()
punica_cpu.bgmv_expand_slice(low, b, out, slots, 3, 10, True)
compare("slice", out, before + torch.nn.functional.pad(high, (3, 3)))
out = before.clone()
punica_cpu.bgmv_expand_slice(low, b, out, slots, 3, 10, False)
compare("replaced", out[:, 3:13], high)
lengths, each = torch.tensor([3, 1, 3]), torch.tensor([1, -1, 0])
out = torch.full((7, 4), 9.0)
punica_cpu.sgmv_shrink(x, a, out, None, lengths, each, 3, 3, 7, 0.5)
wanted = torch.cat([0.5 * x[:3] @ a[1, 0].T, torch.zeros(1, 4), 0.5 * x[4:] @ a[0, 0].T])
compare("prefill", out, wanted)
print(json.dumps(differences))
"""


def test_each_row_meets_the_matrices_of_its_own_slot_and_none_without() -> None:
    """In a process of its own: the kernels are vLLM's module's own names there."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences.keys() == {"shrink", "expand", "slice", "replaced", "prefill"}
    assert max(differences.values()) < 1e-5, differences


async def test_full_slots_answer_for_themselves_alone(
    vllm_session: Session, write_lora: Callable[..., AdapterRef], tmp_path: Path
) -> None:
    """vLLM's own kernels took "no adapter" for the last slot, which showed once all slots were taken."""
    slots = vllm_session.recipe.engine.max_loras
    adapters = [write_lora(tmp_path / str(seed), seed=100 + seed) for seed in range(slots)]
    prompts = [[(7 * i + j * j) % 60 + 30 for j in range(20 + i)] for i in range(12)]

    async def ask(name: str, chosen: Sequence[AdapterRef | None]) -> list[float]:
        rows = [ScoreRequest(f"{name}-{i}", ids[:-4], ids[-4:], chosen[i]) for i, ids in enumerate(prompts)]
        found = {}
        async for outcome in vllm_session.pool.score(rows):
            assert isinstance(outcome, Score), outcome
            found[outcome.id] = sum(outcome.token_logprobs)
        return [found[row.id] for row in rows]

    everyone = [None, *adapters]
    alone = [await ask(f"alone-{n}", [one] * len(prompts)) for n, one in enumerate(everyone)]
    numbers = [i % len(everyone) for i in range(len(prompts))]
    mixed = await ask("mixed", [everyone[n] for n in numbers])
    assert mixed == pytest.approx([alone[n][i] for i, n in enumerate(numbers)], abs=1e-3)
    assert all(abs(a - b) > 0.01 for a, b in combinations((answers[0] for answers in alone), 2))
