"""Adapters are checked before an engine sees them.

vLLM takes a LoRA of the wrong shape without a word and answers rubbish, lets an adapter with NaN corrupt its
neighbours' answers, and dies of one with `modules_to_save`. None of that may reach an engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines.models import tensor_shapes
from engines.types import AdapterRef

_PREFIX = "base_model.model."


class BadAdapter(ValueError):
    """The adapter cannot be served. One line that names the folder and what is wrong with it."""


def check_adapter(ref: AdapterRef, base: Path, max_rank: int) -> None:
    """Raises `BadAdapter` unless the engine can serve `ref` on the model in folder `base`."""
    folder = Path(ref.url)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with _reading(config):
        ranks = _check_config(folder, json.loads(config.read_text(encoding="utf-8")), max_rank)
    with _reading(weights):
        if not weights.is_file():
            raise BadAdapter(f"{weights}: no such file")
        _check_shapes(folder, base, ranks)
        _check_finite(weights)


def check_weights(ref: AdapterRef, base: Path) -> None:
    """Raises `BadAdapter` unless the full weights of `ref` have the names and shapes of the model in `base`."""
    folder = Path(ref.url)
    with _reading(folder):
        ours, theirs = tensor_shapes(folder), tensor_shapes(base)
        wrong = [name for name, shape in theirs.items() if ours.get(name, shape) != shape]
        # A tied output head is stored or not, at the saver's discretion.
        missing = theirs.keys() - ours.keys() - {"lm_head.weight"}
        if wrong or missing:
            raise BadAdapter(f"{folder}: weights do not fit {base.name}: {(wrong or sorted(missing))[0]}")
        for path in sorted(folder.glob("*.safetensors")):
            _check_finite(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a broken file raises is the adapter's fault."""
    from safetensors import SafetensorError

    try:
        yield
    except BadAdapter:
        raise
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, SafetensorError) as error:
        raise BadAdapter(f"{path}: cannot be read ({' '.join(str(error).split())})") from error


def _check_config(folder: Path, config: dict[str, Any], max_rank: int) -> set[int]:
    """The ranks that its matrices may have."""
    if config.get("peft_type") != "LORA":
        raise BadAdapter(f"{folder}: peft_type {config.get('peft_type')!r} is not LORA")
    for field in ("use_dora", "modules_to_save", "trainable_token_indices"):
        if config.get(field):
            raise BadAdapter(f"{folder}: {field} is not served by vLLM; train plain LoRA weights")
    if config.get("bias", "none") != "none":
        raise BadAdapter(f"{folder}: bias {config['bias']!r} is not served by vLLM; train with bias: none")
    ranks = {config.get("r", 0), *(config.get("rank_pattern") or {}).values()}
    if max(ranks) > max_rank:
        raise BadAdapter(f"{folder}: rank {max(ranks)} is above the engine's max_lora_rank {max_rank}")
    return ranks


def _check_shapes(folder: Path, base: Path, ranks: set[int]) -> None:
    model = tensor_shapes(base)
    for name, shape in tensor_shapes(folder).items():
        module, _, side = name.removeprefix(_PREFIX).partition(".lora_")
        weight = model.get(f"{module}.weight")
        if weight is not None and ".layers." not in name:
            raise BadAdapter(
                f"{folder}: {name} is outside the layers; adapters of embeddings or the output head are not served"
            )
        if weight is None or not side:
            raise BadAdapter(f"{folder}: {name} belongs to no weight of {base.name}; it is an adapter of another model")
        fits = shape[-1] == weight[1] if side.startswith("A") else shape[0] == weight[0]
        if len(shape) != 2 or not fits:
            raise BadAdapter(f"{folder}: {name} has shape {shape}, the model's weight has {weight}")
        if (shape[0] if side.startswith("A") else shape[1]) not in ranks:  # vLLM would scale it by a rank it has not
            raise BadAdapter(f"{folder}: {name} has shape {shape}, its config says rank {max(ranks)}; save it again")


def _check_finite(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            if not bool(file.get_tensor(name).isfinite().all()):
                raise BadAdapter(f"{path}: {name} holds NaN or infinity; training diverged, lower the learning rate")
