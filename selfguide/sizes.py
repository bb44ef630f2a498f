"""How many bytes a student takes, in memory and on disk, reckoned from its files' headers; nothing is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from engines.files import AnyPath, Url, cache_folder
from engines.models import ModelError, context_length, read_config, tensor_shapes

if TYPE_CHECKING:
    from selfguide.config import Engine, Finetuning

MIN_FREE_BYTES = 1 << 30
"""No run starts with less room on its disk."""
_LONGEST_BY_DEFAULT = 8192  # a cache for the 128k tokens that some models allow would not fit beside them

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FULL_BYTES = 16
"""Of each parameter that is trained: float32 weight, gradient, and Adam's two moments."""
_SAVED_BYTES, _MOMENTS_BYTES = 4, 8
"""Of each trained parameter on disk: the float32 weight, and Adam's two moments beside it in a checkpoint."""
_CHECKPOINTS = 2
"""A new checkpoint is whole before the old one goes."""


@dataclass(frozen=True)
class ModelSize:
    """Shapes that decide the size. `lora_params` is what one unit of rank adds over all linear layers."""

    num_params: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    shapes: dict[str, tuple[int, ...]]

    def weights_bytes(self, dtype: str, *, on_gpu: bool) -> int:
        """In an engine; "auto" is float32 on CPUs and 16 bits on GPUs."""
        return self.num_params * element_bytes(dtype, on_gpu=on_gpu)

    def cache_bytes(self, tokens: int, dtype: str, *, on_gpu: bool) -> int:
        """Keys and values of `tokens` positions, grouped heads counted once."""
        of_a_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return tokens * of_a_token * element_bytes(dtype, on_gpu=on_gpu)


def longest_context(engine: Engine, folder: Path) -> int:
    """The most tokens of prompt plus answer: the recipe's, or the model's as far as its cache stays small."""
    return engine.max_model_len or min(context_length(folder), _LONGEST_BY_DEFAULT)


def element_bytes(dtype: str, *, on_gpu: bool) -> int:
    return _BYTES.get(dtype, 2 if on_gpu else 4)


def read_size(folder: Path) -> ModelSize:
    """Raises `ModelError` where the folder is no model."""
    config, shapes = read_config(folder), tensor_shapes(folder)
    counts = ("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size")
    for key in counts:
        if type(config.get(key)) not in (int, type(None)):
            raise ModelError(f"{folder / 'config.json'}: {key} is no whole number; fetch the model again")
    heads = config.get("num_attention_heads") or 1
    return ModelSize(
        num_params=sum(map(prod, shapes.values())),
        num_layers=config.get("num_hidden_layers") or 0,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (config.get("hidden_size") or 0) // heads,
        shapes=shapes,
    )


def trained_params(size: ModelSize, finetuning: Finetuning) -> int:
    """All of them, or those of a LoRA: rank x (inputs + outputs) of every matrix that gets one."""
    if finetuning.method == "full":
        return size.num_params
    inside = [(n.removesuffix(".weight"), s) for n, s in size.shapes.items() if ".layers." in n and len(s) == 2]
    return finetuning.lora_rank * sum(sum(shape) for name, shape in inside if _is_target(name, finetuning))


def _is_target(module: str, finetuning: Finetuning) -> bool:
    targets = finetuning.target_modules
    if targets == "all-linear":
        return True
    if isinstance(targets, str):  # as PEFT does: one pattern for the whole name
        return re.fullmatch(targets, module) is not None
    return module.rpartition(".")[2] in targets


def training_bytes(size: ModelSize, finetuning: Finetuning, *, on_gpu: bool) -> int:
    """Memory of a trainer before activations, which grow with batch_size x length."""
    trained = trained_params(size, finetuning)
    if finetuning.method == "full":
        return trained * _FULL_BYTES
    return size.weights_bytes("auto", on_gpu=on_gpu) + trained * _FULL_BYTES


def saved_bytes(size: ModelSize, finetuning: Finetuning) -> int:
    """The adapters, or the full weights, that a finished stage keeps."""
    num_kept = finetuning.epochs if finetuning.keep_epochs else 1
    return num_kept * trained_params(size, finetuning) * _SAVED_BYTES


def checkpoint_bytes(size: ModelSize, finetuning: Finetuning) -> int:
    """What lies on the disk at the worst moment of training; most of it goes with the stage's end."""
    num_checkpoints = max(_CHECKPOINTS, finetuning.epochs) if finetuning.keep_epochs else _CHECKPOINTS
    return num_checkpoints * trained_params(size, finetuning) * (_SAVED_BYTES + _MOMENTS_BYTES)


def existing(path: AnyPath) -> Path:
    """The path itself, or the nearest folder above it that is there: where its disk is. A URL takes room on a node's
    own disk, for checkpoints and cached adapters."""
    if isinstance(path, Url):
        path = cache_folder()
    path = path.absolute()
    return path if path.exists() else existing(path.parent)


def readable_bytes(count: float) -> str:
    """In the unit that leaves the fewest digits: 512 B, 1.4 MiB, 23.0 GiB."""
    power = min(4, max(0, int(count).bit_length() - 1) // 10)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count / 1024**power:.{1 if power else 0}f} {unit}"
