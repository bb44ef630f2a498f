"""LoRA in vLLM's CPU build with one matrix product for each adapter in a step.

vLLM 0.32's own kernels for CPUs gather an adapter's matrices once for every token, which takes ten times the time of
the rest of the step, and read slot -1, "no adapter", as the last slot. `EngineSpec` names `GroupedLora` as vLLM's
worker extension, so that the process that runs the model imports this module before it loads one.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper import punica_cpu


class GroupedLora:
    """Adds nothing to the worker: to name it is to import this module."""


def _shrink(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, scale: float = 1.0) -> None:
    """out (tokens, rank) = scale * x (tokens, in) A^T, with A of each token's slot; zero without an adapter."""
    for slot, rows in _by_slot(slots):
        if slot < 0:
            out[rows] = 0
        else:
            matrix = _matrix(weights, slot)
            out[rows, : matrix.shape[0]] = scale * (x[rows].to(out.dtype) @ matrix.T.to(out.dtype))


def _expand(
    x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, add_inputs: bool = True
) -> None:
    """The first columns of out (tokens, out) = or += x (tokens, rank) B^T."""
    _expand_slice(x, weights, out, slots, 0, min(weights.shape[-2], out.shape[1]), add_inputs)


def _expand_slice(
    x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, slots: torch.Tensor, start: int, size: int,
    add_inputs: bool = True,
) -> None:  # fmt: skip
    """The same for columns `start` to `start + size`."""
    columns = slice(start, start + size)
    for slot, rows in _by_slot(slots):
        if slot < 0:
            if not add_inputs:
                out[rows, columns] = 0
            continue
        product = x[rows].to(out.dtype) @ _matrix(weights, slot)[:size].T.to(out.dtype)
        if add_inputs:
            out[rows, columns] += product
        else:
            out[rows, columns] = product


def _by_slot(slots: torch.Tensor) -> list[tuple[int, Any]]:
    """Each slot with its rows: a step seldom has more than a few."""
    low, high = (int(bound) for bound in torch.aminmax(slots))
    if low == high:
        return [(low, slice(0, slots.shape[0]))]
    return [(slot, (slots == slot).nonzero()[:, 0]) for slot in torch.unique(slots).tolist()]


def _matrix(weights: torch.Tensor, slot: int) -> torch.Tensor:
    """(slots, 1, rows, columns) or (slots, rows, columns)."""
    return weights[slot].reshape(weights.shape[-2:])


def _by_sequence(kernel: Any) -> Any:
    """vLLM's prefill kernels get slots by sequence, with the number of tokens of each."""

    def of_prefill(
        x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor,
        slots: torch.Tensor, batches: int, longest: int, tokens: int, *rest: Any,
    ) -> None:  # fmt: skip
        kernel(x, weights, out, torch.repeat_interleave(slots, lengths), *rest)

    return of_prefill


punica_cpu.bgmv_shrink = _shrink
punica_cpu.bgmv_expand = _expand
punica_cpu.bgmv_expand_slice = _expand_slice
punica_cpu.sgmv_shrink = _by_sequence(_shrink)
punica_cpu.sgmv_expand = _by_sequence(_expand)
punica_cpu.sgmv_expand_slice = _by_sequence(_expand_slice)
