"""Spoilt adapters are refused before an engine sees them, and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.adapters import BadAdapter, check_adapter, check_weights
from engines.models import model_digest, weights_digest
from engines.types import AdapterRef, Completion, Request, RequestFailed, Sampling, ScoreRequest
from selfguide.api import Session

MAX_RANK = 16
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
HEAD = "base_model.model.lm_head"
WriteLora = Callable[..., AdapterRef]


def _tensors(**named: Any) -> dict[str, Any]:
    return {"tensors": {f"{Q_PROJ}.lora_{side}.weight": tensor for side, tensor in named.items()}}


SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "wrong shape": (_tensors(A=torch.zeros(4, 63)), r"has shape \(4, 63\)"),
    "wrong output shape": (_tensors(B=torch.zeros(128, 4)), r"has shape \(128, 4\)"),
    "one dimension": (_tensors(A=torch.zeros(64)), r"has shape \(64,\)"),
    "NaN": (_tensors(B=torch.full((64, 4), torch.nan)), "NaN or infinity"),
    "infinity": (_tensors(A=torch.full((4, 64), torch.inf)), "NaN or infinity"),
    "DoRA": ({"config": {"use_dora": True}}, "use_dora"),
    "modules_to_save": ({"config": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
    "trained tokens": ({"config": {"trainable_token_indices": [1]}}, "trainable_token_indices"),
    "bias": ({"config": {"bias": "all"}}, "bias 'all'"),
    "high rank": ({"config": {"r": 32}}, "rank 32 is above"),
    "high rank in a pattern": ({"config": {"rank_pattern": {"q_proj": 64}}}, "rank 64 is above"),
    "not LoRA": ({"config": {"peft_type": "IA3"}}, "'IA3' is not LORA"),
    "output head": ({"tensors": {f"{HEAD}.lora_A.weight": torch.zeros(4, 64)}}, "output head"),
    "another model": ({"tensors": {"base_model.model.other.lora_A.weight": torch.zeros(4, 64)}}, "another model"),
    "bias tensor": ({"tensors": {f"{Q_PROJ}.bias": torch.zeros(64)}}, "another model"),
}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _overwrite(path: Path) -> None:
    path.write_bytes(b"not what it was")


BROKEN_FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "missing weights": ("adapter_model.safetensors", Path.unlink),
    "missing config": ("adapter_config.json", Path.unlink),
    "garbage config": ("adapter_config.json", _overwrite),
    "garbage weights": ("adapter_model.safetensors", _overwrite),
    "empty weights": ("adapter_model.safetensors", _empty),
    "truncated weights": ("adapter_model.safetensors", _truncate),
}


def write_spoilt(write_lora: WriteLora, folder: Path, kind: str) -> AdapterRef:
    """Weights of its own for each kind: an engine knows adapters by the digest of their weights."""
    seed = 1 + [*SPOILT, *BROKEN_FILES].index(kind)
    if kind in SPOILT:
        return write_lora(folder, seed, **SPOILT[kind][0])
    ref = write_lora(folder, seed)
    name, spoil = BROKEN_FILES[kind]
    spoil(folder / name)
    return ref


def test_a_sound_adapter_passes(write_lora: WriteLora, random_student: Path, tmp_path: Path) -> None:
    check_adapter(write_lora(tmp_path / "a"), random_student, MAX_RANK)


@pytest.mark.parametrize("kind", [*SPOILT, *BROKEN_FILES])
def test_a_spoilt_adapter_is_refused(write_lora: WriteLora, random_student: Path, tmp_path: Path, kind: str) -> None:
    ref = write_spoilt(write_lora, tmp_path / "a", kind)
    with pytest.raises(BadAdapter, match=SPOILT[kind][1] if kind in SPOILT else BROKEN_FILES[kind][0]) as refusal:
        check_adapter(ref, random_student, MAX_RANK)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


async def test_the_engine_outlives_spoilt_adapters(
    vllm_session: Session, write_lora: WriteLora, random_student: Path, tmp_path: Path
) -> None:
    """All of them at once, beside a sound adapter and the base: a refusal concerns the rows of its adapter alone."""
    sampling = Sampling(temperature=0.0, max_tokens=8)
    base = [Request(f"base-{i}", [70 + i] * 30, sampling) for i in range(4)]
    expected = {one.id: one async for one in vllm_session.pool.generate(base)}
    refs = {kind: write_spoilt(write_lora, tmp_path / kind, kind) for kind in [*SPOILT, *BROKEN_FILES]}
    refs["missing folder"] = AdapterRef("0" * 64, str(tmp_path / "none"), 4, "")
    refs["what vLLM alone refuses"] = write_lora(tmp_path / "no-alpha", 99, {"lora_alpha": None})
    deaths = vllm_session.pool.counts.deaths
    rows = [Request(kind, [70] * 30, sampling, ref) for kind, ref in refs.items()]
    rows += [Request("sound", [70] * 30, sampling, write_lora(tmp_path / "sound", 0)), *base]
    score = ScoreRequest("score", [70] * 30, [71], refs["NaN"])
    answers = {one.id: one async for one in vllm_session.pool.generate([*rows, score])}
    failed = {name: one.error for name, one in answers.items() if isinstance(one, RequestFailed)}
    assert failed == dict.fromkeys([*refs, "score"], "adapter")
    assert isinstance(answers["sound"], Completion)
    assert {one.id: answers[one.id] for one in base} == expected
    assert vllm_session.pool.counts.deaths == deaths


# ---- full weights


def full_copy(base: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> AdapterRef:
    folder.mkdir()
    weights = load_file(base / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return AdapterRef(weights_digest(folder), str(folder), 0, model_digest(base), "full")


def _shorten(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"] = torch.ones(63)


def _poison(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"][5] = torch.nan


def _drop(weights: dict[str, Any]) -> None:
    del weights["model.layers.1.mlp.down_proj.weight"]


def test_weights_of_the_same_model_pass(random_student: Path, tmp_path: Path) -> None:
    check_weights(full_copy(random_student, tmp_path / "w", lambda _: None), random_student)
    untied = full_copy(random_student, tmp_path / "tied", lambda weights: weights.pop("lm_head.weight"))
    check_weights(untied, random_student)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shorten, "do not fit .*model.norm.weight"),
        (_poison, "NaN or infinity"),
        (_drop, "do not fit .*layers.1.mlp.down_proj.weight"),
        (dict.clear, "do not fit"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    random_student: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    ref = full_copy(random_student, tmp_path / "w", change)
    with pytest.raises(BadAdapter, match=message):
        check_weights(ref, random_student)


@pytest.mark.parametrize("kind", ["missing weights", "garbage weights", "empty weights", "truncated weights"])
def test_broken_files_of_full_weights_are_refused(random_student: Path, tmp_path: Path, kind: str) -> None:
    ref = full_copy(random_student, tmp_path / "w", lambda _: None)
    BROKEN_FILES[kind][1](tmp_path / "w" / "model.safetensors")
    with pytest.raises(BadAdapter, match=str(tmp_path)):
        check_weights(ref, random_student)
