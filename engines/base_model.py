"""The base model that stays loaded from one LoRA job to the next, and is to each as if it had been loaded for it.

Taking PEFT off a model again would leave its traces to be looked for one by one: wrapped modules, hooks, flags, what
was written into the configs. Here each job gets modules and configs of its own, copied from a model that no job has
touched; only the frozen weights are shared, and a weight that was written to is noticed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from engines.models import resolve_model
from engines.types import TrainSpec


@dataclass(frozen=True)
class _Kept:
    """What stays loaded: one model, and whose."""

    key: tuple[str, str, str]
    model: Any
    tokenizer: Any


class BaseModel:
    """Keeps at most one model. Jobs that train its weights load their own, and nothing is kept meanwhile."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._lent: list[tuple[Any, int]] = []

    def lend(self, spec: TrainSpec, *, keep: bool) -> tuple[Any, Any]:
        """Model and tokenizer for one job. Not to `keep` are weights that are about to be sharded over processes."""
        import torch

        folder = str(resolve_model(spec.model, spec.revision))
        on_gpu = torch.cuda.is_available()
        # Full weights train in float32 under autocast: in pure bfloat16 small updates round to nothing.
        dtype = torch.bfloat16 if on_gpu and spec.method == "lora" else torch.float32
        if spec.method == "full" or not keep:
            self._kept = None
            return _load(folder, dtype)
        key = (folder, spec.base_digest, str(dtype))
        if self._kept is None or self._kept.key != key:
            self._kept = None  # before the next one is loaded: there may be no room for two
            model, tokenizer = _load(folder, dtype)
            self._kept = _Kept(key, model.to("cuda" if on_gpu else "cpu"), tokenizer)
        shared = {id(one): torch.nn.Parameter(one.data, one.requires_grad) for one in self._kept.model.parameters()}
        self._lent = [(one, one._version) for one in shared.values()]
        return copy.deepcopy(self._kept.model, dict(shared)), copy.deepcopy(self._kept.tokenizer)

    def take_back(self) -> None:
        """After a job. A base that it wrote to is not used again: PyTorch counts the writes to each tensor."""
        if any(weight._version != version for weight, version in self._lent):
            self._kept = None
        self._lent = []


def _load(folder: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
