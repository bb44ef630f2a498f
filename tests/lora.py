"""LoRA adapters made by hand, sound or spoilt, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from engines.models import model_digest, tensor_shapes, weights_digest
from engines.types import AdapterRef

Parts = Mapping[str, Any]
MODULES = ("q_proj", "v_proj", "down_proj")
RANK, ALPHA, SCALE = 4, 8, 0.2
_CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), "bias": "none"}
_NOTHING: Parts = {}


@pytest.fixture(scope="session")
def write_lora(random_student: Path) -> Callable[..., AdapterRef]:
    """`write_lora(folder, seed, config, tensors)`: an adapter of the random student, for `MODULES` of every layer.

    `config` and `tensors` (by their full names) override parts.
    """

    def write(folder: Path, seed: int = 0, config: Parts = _NOTHING, tensors: Parts = _NOTHING) -> AdapterRef:
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        save_file({**_random_weights(random_student, seed), **tensors}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**_CONFIG, **config}))
        return AdapterRef(weights_digest(folder), str(folder), RANK, model_digest(random_student))

    return write


def _random_weights(base: Path, seed: int) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(base).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in MODULES:
            for side, size in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
                weights[f"base_model.model.{module}.lora_{side}.weight"] = SCALE * torch.randn(size, generator=draw)
    return weights
