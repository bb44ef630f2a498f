"""What a task is, and where tasks come from: NI-V2 files, a natural-instructions clone, one's own files."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfguide.errors import UserError
from selfguide.labels import find_labels, is_classification
from selfguide.taskfile import SUFFIXES, Kind, NITask, OwnTask, fail, read_task_file, shorten

LabelsFrom = Literal["task", "examples", "instances"]

LONG_INPUT_CHARS = 10_000
SPLITS = ("default/train", "default/test", "default/excluded", "xlingual/test")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """A demonstration. In NI-V2 a few texts are surrounded by white space, which is kept."""

    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Instance:
    """A held-out row. `id` is unique in its task; there is at least one reference, and it may be empty."""

    id: str
    input: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One task, checked.

    `labels` are stripped: in the file's order where it declares them, else sorted by code point; none for
    generation. `digest` is the sha256 of what the task says (name, instruction, examples, instances, kind,
    labels): neither the file's place nor its formatting changes it. `remarks` say what is odd.
    """

    name: str
    instruction: str
    examples: tuple[Example, ...]
    instances: tuple[Instance, ...]
    kind: Kind
    labels: tuple[str, ...]
    labels_from: LabelsFrom | None
    category: str
    input_language: str
    output_language: str
    source: str
    digest: str
    remarks: tuple[str, ...]


def load_task(path: str | Path, *, kind: Kind | None = None, labels_from: LabelsFrom | None = None) -> Task:
    """Reads one task; what is wrong with the file raises UserError.

    Unless given, `kind` is what the file declares, or found from the definition and the examples' outputs.
    `labels_from` says where the labels of a classification task come from: "task" (declared in the file;
    the default where they are), "examples" (and the definition; the default otherwise) or "instances" (the
    test answers: remarked).
    """
    path = Path(path)
    fields = read_task_file(path)
    name = _check_name(path, path.stem if fields.name is None else fields.name)
    examples = tuple(Example(example.input, example.output) for example in fields.examples)
    instances = _number_instances(name, fields)
    kind = kind or fields.kind or _find_kind(fields)
    source = None if kind == "generation" else labels_from or ("task" if fields.labels else "examples")
    labels = _choose_labels(path, fields, source)
    return Task(
        name=name,
        instruction=fields.instruction,
        examples=examples,
        instances=instances,
        kind=kind,
        labels=labels,
        labels_from=source,
        category=fields.category,
        input_language=fields.input_language or "English",
        output_language=fields.output_language or "English",
        source=str(path),
        digest=_digest(name, fields.instruction, examples, instances, kind, labels),
        remarks=(
            *_remark_fields(fields),
            *_remark_rows(examples, instances),
            *_remark_labels(examples, instances, labels, source),
        ),
    )


def find_tasks(paths: Iterable[str | Path]) -> list[Path]:
    """The task files that the paths name, sorted, none twice. UserError where a path names nothing.

    A path is a file, a folder of task files, the root of a natural-instructions clone, or a glob pattern.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _expand(str(path)):
            found.setdefault(file.resolve(), file)
    return sorted(found.values())


def load_split(root: str | Path, name: str, *, missing_ok: bool = False) -> list[str]:
    """The tasks of an official split (one of SPLITS) that the clone at `root` holds, in the split's order.

    A clone may be partial: named tasks without a file raise UserError; with `missing_ok` they are logged as
    a warning and left out.
    """
    root = Path(root)
    if name not in SPLITS:
        raise UserError(f"there is no split {shorten(name)}: name one of {', '.join(SPLITS)}")
    path = root / "splits" / f"{name}_tasks.txt"
    if not path.is_file():
        fail(path, "there is no such file: give the root of a natural-instructions clone")
    try:
        named = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        fail(path, f"the file cannot be read ({error}): fetch the clone again")
    present = [task for task in named if (root / "tasks" / f"{task}.json").is_file()]
    if len(present) < len(named):
        absent = sorted(set(named) - set(present))
        some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        message = f"{len(absent)} of its {len(named)} tasks are absent from {root / 'tasks'} ({some})"
        if not missing_ok:
            fail(path, f"{message}: complete the clone, or allow missing tasks")
        _log.warning("%s: %s and left out", path, message)
    return present


def _expand(path: str) -> list[Path]:
    exists = os.path.exists(path)  # `Path.exists` raises where a name is too long
    matches = [Path(path)] if exists else [Path(match) for match in glob.glob(path, recursive=True)]
    try:
        files = [file for match in matches for file in (_files_in(match) if match.is_dir() else [match])]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): correct its permissions") from None
    if not files:
        place = "holds no .json, .yaml or .yml file" if exists else "matches no file"
        raise UserError(f"{path}: {place}: name task files, a folder of them, or an NI-V2 clone")
    return files


def _files_in(folder: Path) -> list[Path]:
    folder = folder / "tasks" if (folder / "tasks").is_dir() else folder
    files = (file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    return [file for file in files if not file.name.startswith(".")]


def _check_name(path: Path, name: str) -> str:
    """The name becomes a folder of the run, so it must not be able to lead out of it."""
    if not _NAME.fullmatch(name):
        allowed = "up to 200 of letters, digits, '_', '.' and '-', beginning with a letter, digit or '_'"
        fail(path, f"the task's name {shorten(name)} is not {allowed}: rename the file, or set its name")
    return name


def _number_instances(name: str, fields: NITask | OwnTask) -> tuple[Instance, ...]:
    """Rows without an id are numbered; where an id repeats, all rows are."""
    numbers = [f"{name}-{index}" for index in range(len(fields.instances))]
    given = [row.id for row in fields.instances]
    ids = [number if one is None else one for number, one in zip(numbers, given, strict=True)]
    ids = ids if len(set(ids)) == len(ids) else numbers
    rows = [(row.input, tuple(row.output)) for row in fields.instances]
    return tuple(Instance(one, *row) for one, row in zip(ids, rows, strict=True))


def _find_kind(fields: NITask | OwnTask) -> Kind:
    outputs = [example.output for example in fields.examples]
    labelled = fields.labels or is_classification(fields.instruction, outputs)
    return "classification" if labelled else "generation"


def _choose_labels(path: Path, fields: NITask | OwnTask, source: LabelsFrom | None) -> tuple[str, ...]:
    if source == "task":
        if not fields.labels:
            fail(path, "labels_from is task, but the file declares no labels: add them, or use examples")
        return tuple(fields.labels)
    if source == "examples":
        positive = [example.output for example in fields.examples]
        negative = [example.output for example in fields.negative]
        return tuple(find_labels(fields.instruction, positive, negative))
    if source == "instances":
        if not fields.instances:
            fail(path, "labels_from is instances, but the file has none: add them, or use examples")
        return tuple(sorted({text.strip() for row in fields.instances for text in row.output} - {""}))
    return ()


def _digest(
    name: str,
    instruction: str,
    examples: tuple[Example, ...],
    instances: tuple[Instance, ...],
    kind: Kind,
    labels: tuple[str, ...],
) -> str:
    pairs = [(example.input, example.output) for example in examples]
    rows = [(row.id, row.input, row.references) for row in instances]
    content = json.dumps([name, instruction, pairs, rows, kind, labels], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _remark_fields(fields: NITask | OwnTask) -> list[str]:
    ids = [row.id for row in fields.instances if row.id is not None]
    source, target = fields.input_language, fields.output_language
    known = ("", "English")
    remarks = [
        (len(set(ids)) < len(ids), "instance ids repeat: all instances are numbered anew"),
        (not target, "no language is stated: taken as English, which decides how ROUGE-L is computed"),
        (source not in known, f"the input is not English but {source}"),
        (target not in known, f"the output is not English but {target}: ROUGE-L needs GPT-2's tokenizer"),
    ]
    return [text for applies, text in remarks if applies]


def _remark_rows(examples: tuple[Example, ...], instances: tuple[Instance, ...]) -> list[str]:
    shown = {example.input.strip() for example in examples}
    blank = [pair for pair in examples if not (pair.input.strip() and pair.output.strip())]
    empty = [row for row in instances if not all(text.strip() for text in (row.input, *row.references))]
    repeated = [row for row in instances if row.input.strip() in shown]
    long = [row for row in instances if len(row.input) > LONG_INPUT_CHARS]
    of_all = f"of {len(instances)} instances have"
    remarks = [
        (len(examples) == 1, "there is only one example"),
        (blank, f"{len(blank)} of {len(examples)} examples have an empty input or output"),
        (not instances, "there are no instances: nothing can be evaluated"),
        (empty, f"{len(empty)} {of_all} an empty input or reference"),
        (repeated, f"{len(repeated)} {of_all} the input of an example"),
        (long, f"{len(long)} {of_all} an input of more than {LONG_INPUT_CHARS:,} characters"),
    ]
    return [text for applies, text in remarks if applies]


def _remark_labels(
    examples: tuple[Example, ...],
    instances: tuple[Instance, ...],
    labels: tuple[str, ...],
    source: LabelsFrom | None,
) -> list[str]:
    if source is None:
        return []
    strange = sorted({example.output.strip() for example in examples} - set(labels))
    outside = [row for row in instances if not {text.strip() for text in row.references} & set(labels)]
    other = ", or use labels_from: instances (which reads the test answers)" if source == "examples" else ""
    remarks = [
        (source == "instances", "the labels are taken from the instances, which are the test answers"),
        (len(labels) < 2, f"too few labels are found in {source} ({len(labels)}): declare labels{other}"),
        (strange, f"{len(strange)} outputs of examples are not among the labels ({shorten(strange[:1])})"),
        (outside, f"{len(outside)} of {len(instances)} instances have no reference among the labels"),
    ]
    return [text for applies, text in remarks if applies]
