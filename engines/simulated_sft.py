"""Finetuning without a model: takes its time, keeps checkpoints, and leaves an adapter for simulated engines alone.

Loads neither PyTorch nor TRL.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.models import weights_digest
from engines.sft import PROGRESS_FILE, Saved
from engines.simulated_answers import score_tokens
from engines.types import AdapterRef, Canary, TrainResult, TrainSpec


class SimulatedFinetuner:
    """Jobs as `engines.sft.Finetuner` does them. The same rows and spec give the same adapter."""

    def train(self, spec: TrainSpec, rows: Path, work: Path, saved: Saved = lambda _: None) -> TrainResult:
        """Takes as many seconds as the rows' tokens at `spec.simulated_tokens_per_s`. A second call in `work` goes on
        from the last whole epoch; nothing is `saved` elsewhere."""
        began = time.monotonic()
        job = _read_job(spec, rows, work)
        done = max(map(_number, work.glob("epoch-*")), default=0)
        for epoch in range(done + 1, job.epochs + 1):
            _spend(job, epoch)
            _write_epoch(job, epoch)
        refs = [_ref(spec, work / f"epoch-{epoch}") for epoch in sorted(map(_number, work.glob("epoch-*")))]
        return TrainResult(
            checkpoints=tuple(refs) if _is_first() else (),
            loss_curve=tuple(_measure(job, step) for step in range(1, job.steps + 1)),
            tokens=job.epochs * job.tokens,
            completion_tokens=job.epochs * job.completion_tokens,
            steps=job.steps,
            epochs=job.epochs,
            rows=job.num_rows,
            train_s=time.monotonic() - began,
            canaries=tuple(_canary(row, refs[-1]) for row in job.canary_rows),
            epoch_logprobs=tuple(map(job.score, refs)) if spec.keep_epochs and _is_first() else (),
        )


@dataclass(frozen=True)
class _Job:
    """`digest` is of the rows and of what in the spec decides what would be learnt; tokens are those of an epoch."""

    spec: TrainSpec
    work: Path
    digest: bytes
    num_rows: int
    tokens: int
    completion_tokens: int
    steps_per_epoch: int
    epochs: int
    canary_rows: Sequence[dict[str, Any]]

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def score(self, ref: AdapterRef) -> tuple[tuple[float, ...], ...]:
        return tuple(_canary(row, ref).tuned_logprobs for row in self.canary_rows)


def _read_job(spec: TrainSpec, rows: Path, work: Path) -> _Job:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(rows, columns=["input_ids", "prompt_tokens"], use_threads=False).combine_chunks()
    if not table.num_rows:
        raise ValueError(f"{rows}: no rows to train on")
    lengths, prompts = pc.list_value_length(table["input_ids"]), table["prompt_tokens"]
    steps_per_epoch = math.ceil(table.num_rows / (spec.batch_size * spec.gradient_accumulation))
    epochs = max(spec.epochs, math.ceil(spec.min_steps / steps_per_epoch))
    tokens = pc.sum(lengths).as_py()
    same = replace(
        spec, model="", epochs=epochs, min_steps=0, canary_rows=0, keep_epochs=False, simulated_tokens_per_s=1
    )
    digest = hashlib.sha256(repr(same).encode())
    for column in (pc.list_flatten(table["input_ids"]), lengths, prompts):
        digest.update(column.cast("int64").to_numpy().tobytes())
    count = min(spec.canary_rows, table.num_rows)
    picked = table.take([i * table.num_rows // count for i in range(count)]).to_pylist() if count else []
    completion_tokens = tokens - pc.sum(prompts).as_py()
    return _Job(spec, work, digest.digest(), table.num_rows, tokens, completion_tokens, steps_per_epoch, epochs, picked)


def _is_first() -> bool:
    """Of several processes, the first one writes."""
    return os.environ.get("RANK", "0") == "0"


def _spend(job: _Job, epoch: int) -> None:
    """An epoch's time, with a line of progress for each step."""
    began = time.monotonic()
    step_s = job.tokens / job.spec.simulated_tokens_per_s / job.steps_per_epoch
    with Path(job.work / PROGRESS_FILE if _is_first() else os.devnull).open("a", encoding="utf-8") as file:
        for number in range(1, job.steps_per_epoch + 1):
            time.sleep(max(0.0, began + number * step_s - time.monotonic()))
            step = (epoch - 1) * job.steps_per_epoch + number
            line = {"step": step, "steps": job.steps, "loss": _measure(job, step)["loss"]}
            file.write(json.dumps(line) + "\n")
            file.flush()


def _measure(job: _Job, step: int) -> dict[str, float]:
    done = step / job.steps
    loss = (2 + job.digest[step % len(job.digest)] / 256) * math.exp(-2 * done)
    return {
        "step": float(step), "epoch": step / job.steps_per_epoch, "loss": loss,
        "learning_rate": job.spec.learning_rate * (1 - done), "grad_norm": loss,
    }  # fmt: skip


def _write_epoch(job: _Job, epoch: int) -> None:
    """The weights of an epoch appear whole; unless they are to be kept, those of the one before go."""
    if not _is_first():
        return
    folder, half = job.work / f"epoch-{epoch}", job.work / f"half-{epoch}"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    content = hashlib.sha256(job.digest + epoch.to_bytes(4, "big")).digest()
    lora = job.spec.method == "lora"
    if lora:
        config = {"peft_type": "LORA", "r": job.spec.lora_rank, "lora_alpha": job.spec.lora_alpha, "bias": "none"}
        (half / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (half / f"{'adapter_' if lora else ''}model.safetensors").write_bytes(_as_safetensors(content))
    half.rename(folder)
    if not job.spec.keep_epochs:
        shutil.rmtree(job.work / f"epoch-{epoch - 1}", ignore_errors=True)


def _as_safetensors(content: bytes) -> bytes:
    """One tensor, of a name that no model has: a real engine refuses it."""
    entry = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"simulated": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _ref(spec: TrainSpec, folder: Path) -> AdapterRef:
    rank = spec.lora_rank if spec.method == "lora" else 0
    return AdapterRef(weights_digest(folder), str(folder), rank, spec.base_digest, spec.method)


def _canary(row: dict[str, Any], ref: AdapterRef) -> Canary:
    """What simulated engines will say of the row, so that those which are wrong are found out."""
    cut = row["prompt_tokens"]
    prefix, completion = tuple(row["input_ids"][:cut]), tuple(row["input_ids"][cut:])
    return Canary(prefix, completion, score_tokens(prefix, completion, None), score_tokens(prefix, completion, ref))
