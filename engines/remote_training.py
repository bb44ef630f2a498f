"""Training for a run folder in an object store: in a folder of the trainer's node, which may be lost at any moment.

Each epoch's checkpoint is sent as it is saved, its marker last; another node goes on from what was sent.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from engines.files import Url, cache_folder, fetch_folder, list_folders, remove_folder, send_folder
from engines.sft import CHECKPOINT_MARKER, Finetuner, is_first
from engines.simulated_sft import SimulatedFinetuner
from engines.types import TrainResult, TrainSpec

_ROWS = "train.parquet"


def train_by_url(finetuner: Finetuner | SimulatedFinetuner, spec: TrainSpec, rows: Url, work: Url) -> TrainResult:
    """`Finetuner.train` between URLs. The processes of one sharded trainer share the node's folder."""
    folder = cache_folder() / "trainers" / hashlib.sha256(str(work).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    _fetch_file(rows, folder / _ROWS)
    for info in work.infos(recursive=False):
        if info.is_file:  # progress, and scores of epochs
            _fetch_file(work / info.base_name, folder / info.base_name)
    _fetch_checkpoints(work, folder, keep_all=spec.keep_epochs)

    def saved(checkpoint: Path) -> None:
        for path in (*folder.glob("*.json"), *folder.glob("*.jsonl")):
            (work / path.name).write_bytes(path.read_bytes())
        send_folder(checkpoint, work / checkpoint.name, last=CHECKPOINT_MARKER)
        for sent in list_folders(work):
            if sent.name.startswith("checkpoint-") and not (folder / sent.name).is_dir():
                remove_folder(sent)

    result = finetuner.train(spec, folder / _ROWS, folder, saved)
    refs = []
    for ref in result.checkpoints:
        target = work / Path(ref.url).name
        send_folder(Path(ref.url), target)
        refs.append(replace(ref, url=str(target)))
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
    return replace(result, checkpoints=tuple(refs))


def _fetch_file(source: Url, target: Path) -> None:
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    beside.write_bytes(source.read_bytes())
    beside.replace(target)


def _fetch_checkpoints(work: Url, folder: Path, *, keep_all: bool) -> None:
    """The last whole one, or all, unless they are here already."""
    sent = [one for one in list_folders(work) if one.name.startswith("checkpoint-")]
    whole = [one for one in sent if (one / CHECKPOINT_MARKER).is_file()]
    for checkpoint in sorted(whole, key=lambda one: int(one.name.split("-")[1]))[0 if keep_all else -1 :]:
        assert isinstance(checkpoint, Url)
        target = folder / checkpoint.name
        if (target / CHECKPOINT_MARKER).is_file():
            continue
        part = folder / f".{uuid.uuid4().hex}.part"
        fetch_folder(checkpoint, part)
        shutil.rmtree(target, ignore_errors=True)  # cut off by a kill
        part.rename(target)
