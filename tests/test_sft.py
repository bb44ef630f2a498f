"""The finetuning job: what it learns from, that it is reproducible, and that it goes on where it ended."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engines.adapters import check_adapter, check_weights
from engines.models import weights_digest
from engines.sft import train
from engines.tokenizer import load_tokenizer
from engines.types import TrainResult, TrainSpec
from tests.training import PAIRS, Run, make_work, steps_of

# ---- what it learns from


def _first_batch(spec: TrainSpec, rows: Path, work: Path) -> list[tuple[list[int], list[int], list[int]]]:
    from engines.base_model import BaseModel
    from engines.sft import _build_trainer

    batch = next(iter(_build_trainer(BaseModel(), spec, pq.read_table(rows).to_pylist(), work).get_train_dataloader()))
    columns = (batch[key].tolist() for key in ("input_ids", "labels", "attention_mask"))
    return list(zip(*columns, strict=True))


def test_labels_are_the_completion_and_the_end(
    in_process: Run, spec: TrainSpec, rows: Path, random_student: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(random_student))
    batch = in_process(_first_batch, replace(spec, batch_size=8), rows, make_work(tmp_path / "work"))
    seen = []
    for ids, labels, mask in batch:
        learnt = [label for label in labels if label != -100]
        assert learnt[-1] == tokenizer.eos_id
        whole = [token for token, attended in zip(ids, mask, strict=True) if attended]
        assert whole[-len(learnt) :] == learnt
        seen.append((tokenizer.decode(whole[: -len(learnt)]), tokenizer.decode(learnt)))
    assert sorted(seen) == sorted(PAIRS)


def test_the_loss_is_that_of_the_completions(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    """One step over all rows: its loss is what the canaries, scored one by one, had before training."""
    result = in_process(train, replace(spec, batch_size=8, epochs=1), rows, make_work(tmp_path / "work"))
    before = [logprob for canary in result.canaries for logprob in canary.base_logprobs]
    assert len(result.canaries) == len(PAIRS)
    assert result.completion_tokens == len(before)
    assert result.loss_curve[0]["loss"] == pytest.approx(-sum(before) / len(before), abs=1e-4)


def test_training_teaches_completions_and_their_end(
    in_process: Run, spec: TrainSpec, rows: Path, random_student: Path, tmp_path: Path
) -> None:
    result: TrainResult = in_process(train, replace(spec, epochs=15), rows, make_work(tmp_path / "work"))
    for canary in result.canaries:
        assert sum(canary.tuned_logprobs) > sum(canary.base_logprobs) + 1
        assert canary.tuned_logprobs[-1] > canary.base_logprobs[-1] + 1  # the end of sequence
    ref = result.checkpoints[-1]
    assert (ref.kind, ref.rank, ref.digest) == ("lora", 4, weights_digest(Path(ref.url)))
    check_adapter(ref, random_student, max_rank=4)


def test_full_weights(in_process: Run, spec: TrainSpec, rows: Path, random_student: Path, tmp_path: Path) -> None:
    full = replace(spec, method="full", epochs=1)
    result: TrainResult = in_process(train, full, rows, make_work(tmp_path / "work"))
    ref = result.checkpoints[-1]
    assert (ref.kind, ref.rank) == ("full", 0)
    check_weights(ref, random_student)
    assert ref.digest != weights_digest(random_student)
    assert {path.name for path in Path(ref.url).iterdir()} >= {"config.json", "model.safetensors"}
    assert all(canary.base_logprobs != canary.tuned_logprobs for canary in result.canaries)


# ---- how long, and how often the same


def test_tiny_sets_train_for_min_steps(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    """Whole epochs: the first number of them that is enough."""
    work = make_work(tmp_path / "work")
    result = in_process(train, replace(spec, epochs=1, min_steps=9), rows, work)
    assert (result.epochs, result.steps, result.rows) == (3, 12, 8)
    assert steps_of(work) == list(range(1, 13))
    assert [entry["step"] for entry in result.loss_curve] == list(range(1, 13))


def test_the_seed_decides(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    seeds = [spec.seed, spec.seed, spec.seed + 1]
    results = [
        in_process(train, replace(spec, seed=seed), rows, make_work(tmp_path / f"{i}")) for i, seed in enumerate(seeds)
    ]
    digests = [result.checkpoints[-1].digest for result in results]
    assert digests[0] == digests[1] != digests[2]


def test_every_epoch_is_kept_where_asked(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    """With the trainer's word on it; looking at an epoch changes nothing of the next, nor does going on behind it."""
    alone: TrainResult = in_process(train, replace(spec, epochs=3), rows, make_work(tmp_path / "alone"))
    every, work = replace(spec, epochs=3, keep_epochs=True), make_work(tmp_path / "work")
    result: TrainResult = in_process(train, every, rows, work)
    assert [Path(ref.url).name for ref in result.checkpoints] == ["epoch-1", "epoch-2", "epoch-3"]
    assert len({ref.digest for ref in result.checkpoints}) == 3
    assert result.checkpoints[-1].digest == alone.checkpoints[-1].digest
    assert result.epoch_logprobs[-1] == tuple(canary.tuned_logprobs for canary in alone.canaries)
    assert len(set(result.epoch_logprobs)) == 3
    assert alone.epoch_logprobs == ()
    shutil.rmtree(work / "checkpoint-12")
    again: TrainResult = in_process(train, every, rows, work)
    assert again.checkpoints == result.checkpoints
    assert again.epoch_logprobs == result.epoch_logprobs


def _train_with_a_row_lost(spec: TrainSpec, rows: Path, work: Path) -> str:
    from unittest.mock import patch

    from datasets import Dataset

    whole = Dataset.from_list
    with patch.object(Dataset, "from_list", lambda data: whole(data[1:])):
        try:
            train(spec, rows, work)
        except AssertionError as error:
            return str(error)
    return "trained on what was left"


def test_a_row_lost_on_the_way_fails_the_job(in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path) -> None:
    assert in_process(_train_with_a_row_lost, spec, rows, make_work(tmp_path / "work")) == "TRL kept 7 of 8 rows"


# ---- going on


def test_a_second_call_goes_on_from_the_last_checkpoint(
    in_process: Run, spec: TrainSpec, rows: Path, tmp_path: Path
) -> None:
    """It is there until the caller has the weights; broken ones, left by a kill, are passed over."""
    work = make_work(tmp_path / "work")
    first: TrainResult = in_process(train, spec, rows, work)
    for step, state in (("50", None), ("60", '{"global_step": 6')):
        (work / f"checkpoint-{step}").mkdir()
        if state:
            (work / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    second: TrainResult = in_process(train, spec, rows, work)
    assert steps_of(work) == list(range(1, 9)), "steps were done twice"
    assert second.checkpoints == first.checkpoints
    assert second.canaries == first.canaries
    assert second.loss_curve == first.loss_curve
