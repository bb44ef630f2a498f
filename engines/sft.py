"""The only file that knows TRL and PEFT: supervised finetuning jobs, each from a file of rows to an adapter.

Runs in a process of its own, or, where the environment is that of `torchrun`, in one process for each GPU. Rows come
tokenized, by the same prompt code that samples and evaluates, so nothing is templated, truncated or dropped here; loss
is on the completion alone.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.base_model import BaseModel
from engines.models import weights_digest
from engines.types import AdapterRef, Canary, TrainResult, TrainSpec

_IGNORE = -100  # the label that PyTorch's cross-entropy leaves out
PROGRESS_FILE = "progress.jsonl"
CHECKPOINT_MARKER = "trainer_state.json"
"""The last file that a checkpoint gets."""
Saved = Callable[[Path], None]


class Finetuner:
    """Jobs one after another in one process. An adapter does not depend on the jobs before it; after one that raised,
    the process is not to be used again. The model stays in memory between jobs, until it is dropped."""

    def __init__(self) -> None:
        _quieten()
        self._base = BaseModel()

    def warm(self) -> None:
        """Loads the libraries, which takes seconds, before there is a job."""
        from datasets import Dataset  # noqa: F401
        from peft import LoraConfig  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
        from trl import SFTConfig, SFTTrainer  # noqa: F401

    def train(self, spec: TrainSpec, rows: Path, work: Path, saved: Saved = lambda _: None) -> TrainResult:
        """Finetunes `spec.model` on the Parquet file `rows` (columns `input_ids`, `prompt_tokens`).

        `work` keeps a checkpoint per epoch; a second call goes on from the last whole one. The adapters (or full
        weights) end up in `work/epoch-N`, and the caller drops `work` once they are safe: optimizer states are most of
        its bytes. `work/progress.jsonl` has one line per optimizer step. Of several processes, the first one writes,
        and calls `saved` with the folder of each checkpoint.
        """
        result = _train(self._base, spec, rows, work, saved)
        self._base.take_back()
        _forget_job()
        return result

    def drop(self) -> None:
        gc.unfreeze()
        self._base = BaseModel()
        _forget_job()


def train(spec: TrainSpec, rows: Path, work: Path) -> TrainResult:
    """One job alone; see `Finetuner.train`."""
    return Finetuner().train(spec, rows, work)


def _train(base: BaseModel, spec: TrainSpec, rows: Path, work: Path, saved: Saved = lambda _: None) -> TrainResult:
    import pyarrow.parquet as pq

    began = time.monotonic()
    data = pq.read_table(rows, columns=["input_ids", "prompt_tokens"]).to_pylist()
    if not data:
        raise ValueError(f"{rows}: no rows to train on")
    steps_per_epoch = math.ceil(len(data) / (spec.batch_size * spec.gradient_accumulation))
    spec = replace(spec, epochs=max(spec.epochs, math.ceil(spec.min_steps / steps_per_epoch)))
    trainer = _build_trainer(base, spec, data, work)
    trainer.add_callback(_save_callback(saved))
    picked = _pick_canaries(data, spec.canary_rows)
    if spec.keep_epochs:
        trainer.add_callback(_scoring_callback(trainer, picked, work))
    waits = spec.method == "lora" and _num_processes() > 1  # until it is sharded, the model lies in main memory
    before = [] if waits else _completion_logprobs(trainer.model, picked)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(work))
    after = _completion_logprobs(trainer.model, picked)
    if waits:
        with trainer.model.disable_adapter():
            before = _completion_logprobs(trainer.model, picked)
    completion_tokens = sum(len(row["input_ids"]) - row["prompt_tokens"] for row in data)
    return TrainResult(
        checkpoints=_export(spec, work) if is_first() else (),
        loss_curve=tuple(_loss_curve(trainer.state.log_history)),
        tokens=spec.epochs * sum(len(row["input_ids"]) for row in data),
        completion_tokens=spec.epochs * completion_tokens,
        steps=trainer.state.global_step,
        epochs=spec.epochs,
        rows=len(data),
        train_s=time.monotonic() - began,
        canaries=tuple(_canary(r, b, a) for r, b, a in zip(picked, before, after, strict=True)),
        epoch_logprobs=_epoch_logprobs(work) if spec.keep_epochs and is_first() else (),
    )


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _forget_job() -> None:
    """What a job leaves in the process: Accelerate's states, which all its objects share, and memory in cycles.

    What is left then stays, modules and model: frozen, or each job walks over all of it again, twice for 0.3 s.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _quieten() -> None:
    os.environ.update(
        {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _build_trainer(base: BaseModel, spec: TrainSpec, data: Sequence[dict[str, Any]], work: Path) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    on_cpu = not torch.cuda.is_available()
    per_process, rest = divmod(spec.batch_size, _num_processes())
    if rest:
        raise ValueError(f"batch_size {spec.batch_size} cannot be shared by {_num_processes()} GPUs")
    model, tokenizer = base.lend(spec, keep=_num_processes() == 1)
    config = SFTConfig(
        output_dir=str(work), num_train_epochs=spec.epochs, per_device_train_batch_size=per_process,
        gradient_accumulation_steps=spec.gradient_accumulation, learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.scheduler, warmup_steps=spec.warmup_ratio, weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm, seed=spec.seed, data_seed=spec.seed, logging_steps=1, save_strategy="epoch",
        save_total_limit=None if spec.keep_epochs else 1, report_to="none", bf16=not on_cpu, use_cpu=on_cpu,
        gradient_checkpointing=spec.gradient_checkpointing, fsdp=_is_sharded(on_cpu), dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    lora = LoraConfig(
        r=spec.lora_rank, lora_alpha=spec.lora_alpha, lora_dropout=spec.lora_dropout, task_type="CAUSAL_LM",
        target_modules=spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules),
    ) if spec.method == "lora" else None  # fmt: skip
    rows = [{"input_ids": row["input_ids"], "labels": _labels(row)} for row in data]
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora,
        processing_class=tokenizer, callbacks=[_progress_callback(work / PROGRESS_FILE)],
    )  # fmt: skip
    trainer.create_model_card = trainer.model.create_or_update_model_card = _no_card
    if len(trainer.train_dataset) != len(data):
        raise AssertionError(f"TRL kept {len(trainer.train_dataset)} of {len(data)} rows")
    return trainer


def _no_card(*_: Any, **__: Any) -> None:
    """For TRL and PEFT, which write one each into every checkpoint, in 50 ms; nobody would read them."""


def _is_sharded(on_cpu: bool) -> bool:
    """Whether FSDP2 splits all weights over the processes, layer by layer. On CPUs, which Accelerate does not shard,
    each process holds the whole model. FSDP's own recomputation is left alone: it renames modules, and PEFT then saves
    no adapter."""
    return _num_processes() > 1 and not on_cpu


def _labels(row: dict[str, Any]) -> list[int]:
    ids: list[int] = row["input_ids"]
    return [_IGNORE] * row["prompt_tokens"] + ids[row["prompt_tokens"] :]


def _progress_callback(path: Path) -> Any:
    from transformers import TrainerCallback

    class WriteSteps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs and state.is_world_process_zero:
                line = {"step": state.global_step, "steps": state.max_steps, "loss": float(logs["loss"])}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    return WriteSteps()


def _save_callback(saved: Saved) -> Any:
    from transformers import TrainerCallback

    class HandOver(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return HandOver()


def _scoring_callback(trainer: Any, picked: Sequence[dict[str, Any]], work: Path) -> Any:
    """Scores the canaries as each epoch ends, on disk before its checkpoint is: a kill leaves no epoch without."""
    from transformers import TrainerCallback

    class ScoreEpochs(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            scores = _completion_logprobs(trainer.model, picked)
            if state.is_world_process_zero:
                path = work / f"logprobs-{state.global_step}.json"
                path.with_suffix(".part").write_text(json.dumps(scores), encoding="utf-8")
                path.with_suffix(".part").replace(path)

    return ScoreEpochs()


def _epoch_logprobs(work: Path) -> tuple[tuple[tuple[float, ...], ...], ...]:
    steps = [checkpoint.name.split("-")[1] for checkpoint in _checkpoints(work)]
    read = (json.loads((work / f"logprobs-{step}.json").read_text(encoding="utf-8")) for step in steps)
    return tuple(tuple(map(tuple, scores)) for scores in read)


def _checkpoints(work: Path) -> list[Path]:
    """In the order of their steps."""
    return sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _last_whole_checkpoint(work: Path) -> str | None:
    for folder in reversed(_checkpoints(work)):
        try:
            json.loads((folder / CHECKPOINT_MARKER).read_text())
        except (OSError, ValueError):
            if is_first():
                shutil.rmtree(folder)
        else:
            return str(folder)
    return None


def _export(spec: TrainSpec, work: Path) -> tuple[AdapterRef, ...]:
    """Gives the weights of each checkpoint a folder of their own.

    The checkpoints stay: should the caller be killed before it has put the weights away, the next call ends at once.
    """
    checkpoints = _checkpoints(work)
    epochs = range(spec.epochs - len(checkpoints) + 1, spec.epochs + 1)
    refs = []
    for epoch, checkpoint in zip(epochs, checkpoints, strict=True):
        folder = work / f"epoch-{epoch}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors" or path.name in ("adapter_config.json", "config.json"):
                os.link(path, folder / path.name)
        rank = spec.lora_rank if spec.method == "lora" else 0
        refs.append(AdapterRef(weights_digest(folder), str(folder), rank, spec.base_digest, spec.method))
    return tuple(refs)


def _loss_curve(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return [{key: float(entry[key]) for key in keys if key in entry} for entry in history if "loss" in entry]


def _pick_canaries(data: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Rows spread evenly over the file, so that a class at its end is seen too."""
    count = min(count, len(data))
    return [data[i * len(data) // count] for i in range(count)]


def _completion_logprobs(model: Any, rows: Sequence[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Natural-log probability of each row's completion tokens, in float32, row by row, dropout off."""
    import torch

    was_training = model.training
    model.eval()
    scores = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, row["prompt_tokens"] - 1 : -1].float()
        picked = torch.log_softmax(logits, -1).gather(1, ids[0, row["prompt_tokens"] :, None])
        scores.append(tuple(picked[:, 0].tolist()))
    model.train(was_training)
    return scores


def _canary(row: dict[str, Any], before: tuple[float, ...], after: tuple[float, ...]) -> Canary:
    cut = row["prompt_tokens"]
    return Canary(tuple(row["input_ids"][:cut]), tuple(row["input_ids"][cut:]), before, after)
