"""Scores of a file of predictions, made anywhere, as the official evaluation of Super-NaturalInstructions does it.

One JSON object a line: `task`, `prediction`, `references` (a text or a list), and optionally `category` and `language`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from selfguide import metrics
from selfguide.errors import UserError
from selfguide.gpt2 import GPT2Tokenizer
from selfguide.tables import make_table, show
from selfguide.taskfile import describe_type, fail
from selfguide.tasks import find_tasks, load_task

GPT2_TOKENS = 50_257
TRACKS = {"default": "English", "xlingual": "Other languages than English"}
"""The official tracks: ROUGE-L over stemmed words, and over GPT-2's tokens. No mean mixes the two."""
_TITLES = {"exact_match": "EM", "rouge_l": "ROUGE-L"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file. Category and language may be None; a language decides the track, and none is English."""

    task: str
    prediction: str | None
    references: tuple[str, ...]
    category: str | None
    language: str | None

    @property
    def track(self) -> str:
        return "default" if self.language is None or self.language.lower() == "english" else "xlingual"


def score_file(
    path: Path, tasks: Path | None = None, gpt2: GPT2Tokenizer | None = None, *, authors: bool = False
) -> dict[str, Any]:
    """A document of means x 100, to 4 decimals, by track: over all rows, by category, by task; and notices.

    Means are over rows (micro-averages); a missing prediction counts as "". `tasks` is where the tasks' files are: they
    say category and language where a row does not. ROUGE-L of the track "xlingual" is None without GPT-2's tokenizer.
    `authors` adds the SELF-GUIDE authors' metrics, for which a task's labels are its distinct first references.
    Raises `UserError` for a line that is no such row.
    """
    rows = list(read_rows(path))
    if not rows:
        fail(path, "there is no row in it: write one JSON object a line")
    known = _read_tasks(tasks, {row.task for row in rows}) if tasks else {}
    rows = [_complete(row, known) for row in rows]
    scored = list(zip(rows, _score_rows(rows, gpt2, authors=authors), strict=True))
    by_track = {track: [one for one in scored if one[0].track == track] for track in TRACKS}
    tracks = {track: _summarise(found) for track, found in by_track.items() if found}
    notices = [*_notices(rows, gpt2), *(_notice_absent(rows, known) if tasks else ())]
    return {"num_rows": len(rows), "tracks": tracks, "notices": notices}


def read_rows(path: Path) -> Iterator[Row]:
    """The file's rows; empty lines are passed over."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _read_row(line, f"{path}: line {number}")
    except OSError as error:
        fail(path, f"the file cannot be read ({error.strerror}): correct the path")
    except UnicodeDecodeError:
        fail(path, "the file is not UTF-8 text: save it as UTF-8")


def show_scores(document: Mapping[str, Any]) -> None:
    """A table for each track: its tasks, its categories, all."""
    parts = []
    for track, scores in document["tracks"].items():
        lines = [*scores["tasks"].items()]
        lines += [(f"category {name}", means) for name, means in scores["categories"].items()]
        lines += [("all", scores["overall"])]
        columns = [key for key in scores["overall"] if key != "n"]
        cells = [[name, means["n"], *(_shown(means[key]) for key in columns)] for name, means in lines]
        parts.append(make_table(["task", "rows", *(_TITLES.get(key, key) for key in columns)], cells, TRACKS[track]))
    show(*parts)


def _shown(mean: float | None) -> str:
    return "unavailable" if mean is None else f"{mean:.4f}"


# ---- lines


def _read_row(line: str, place: str) -> Row:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}): write one object a line") from None
    if not isinstance(content, dict):
        raise UserError(f"{place} holds {describe_type(content)}: write an object with task, prediction and references")
    task, *others = (
        _read_text(content.get(field), f"{place}: {field}") for field in ("task", "prediction", "category", "language")
    )
    if not task:
        raise UserError(f"{place}: task is missing or empty: name the task that the row is of")
    prediction, category, language = others
    references = _read_references(content.get("references"), f"{place}: references")
    return Row(task, prediction, references, category, language)


def _read_references(value: object, place: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if texts is None or texts == []:
        raise UserError(f"{place} is missing or empty: give at least one")
    if not isinstance(texts, list):
        raise UserError(f"{place} is {describe_type(texts)}: write a text or a list of texts")
    if None in texts:
        raise UserError(f"{place} holds null: write texts in quotes")
    return tuple(_read_text(text, f"{place}[{index}]") or "" for index, text in enumerate(texts))


def _read_text(value: object, place: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place} is {describe_type(value)}: write it as text in quotes")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} holds half of a surrogate pair: write the whole character") from None
    return value


# ---- tasks


def _read_tasks(folder: Path, names: set[str]) -> dict[str, tuple[str, str]]:
    """Category and language of each named task that has a file; English is what is English on both sides."""
    found = {}
    for path in find_tasks([folder]):
        if path.stem in names:
            task = load_task(path)
            languages = sorted({task.input_language, task.output_language})
            found[path.stem] = (task.category, " / ".join(languages))
    return found


def _complete(row: Row, known: Mapping[str, tuple[str, str]]) -> Row:
    category, language = known.get(row.task, (None, None))
    return replace(row, category=row.category or category or None, language=row.language or language)


# ---- means


def _score_rows(rows: Sequence[Row], gpt2: GPT2Tokenizer | None, *, authors: bool) -> Iterator[dict[str, float | None]]:
    """The scores of each row, 0 to 1, by metric."""
    labels: dict[str, dict[str, None]] = {}
    for row in rows:
        labels.setdefault(row.task, {})[row.references[0]] = None
    for row in rows:
        prediction, references = row.prediction or "", row.references
        scores = {"exact_match": metrics.exact_match(prediction, references), "rouge_l": _score_rouge(row, gpt2)}
        if authors:
            scores["authors_em"] = metrics.authors_em(prediction, references, tuple(labels[row.task]))
            scores["authors_rouge_char"] = metrics.authors_rouge_char(prediction, references)
        yield scores


def _score_rouge(row: Row, gpt2: GPT2Tokenizer | None) -> float | None:
    if row.track == "default":
        return metrics.rouge_l(row.prediction or "", row.references)
    if gpt2 is None:
        return None
    return gpt2.rouge_l(row.prediction or "", row.references)


Scored = tuple[Row, Mapping[str, float | None]]


def _summarise(scored: Sequence[Scored]) -> dict[str, Any]:
    by_category = _group(scored, lambda row: "_".join(row.category.lower().split()) if row.category else None)
    return {"overall": _mean(scored), "categories": by_category, "tasks": _group(scored, lambda row: row.task)}


def _group(scored: Iterable[Scored], key: Callable[[Row], str | None]) -> dict[str, Any]:
    """Means by key, sorted; rows without one are in none."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        if (name := key(one[0])) is not None:
            groups.setdefault(name, []).append(one)
    return {name: _mean(groups[name]) for name in sorted(groups)}


def _mean(scored: Sequence[Scored]) -> dict[str, Any]:
    means: dict[str, float | None] = {}
    for metric in scored[0][1]:
        known = [score for _, scores in scored if (score := scores[metric]) is not None]
        means[metric] = round(100 * fmean(known), 4) if len(known) == len(scored) else None
    return {"n": len(scored), **means}


# ---- notices


def _notices(rows: Sequence[Row], gpt2: GPT2Tokenizer | None) -> Iterator[str]:
    if missing := sum(row.prediction is None for row in rows):
        yield f"{missing:,} of {len(rows):,} predictions are missing: they count as empty answers"
    if unstated := sum(row.language is None for row in rows):
        yield f"{unstated:,} of {len(rows):,} rows state no language: they are taken as English"
    foreign = {row.task for row in rows if row.track == "xlingual"}
    if foreign and gpt2 is None:
        yield f"no ROUGE-L for what is not English ({_tasks(foreign)}): it needs GPT-2's tokenizer, --gpt2 FOLDER"
    if foreign and gpt2 and gpt2.num_tokens != GPT2_TOKENS:
        yield f"the tokenizer has {gpt2.num_tokens:,} tokens, GPT-2's {GPT2_TOKENS:,}: this ROUGE-L is not the official"


def _notice_absent(rows: Iterable[Row], known: Mapping[str, Any]) -> Iterator[str]:
    if absent := {row.task for row in rows} - known.keys():
        yield f"no file under --tasks is of {_tasks(absent)}"


def _tasks(names: Iterable[str]) -> str:
    """How many, and the first of them by name."""
    first, *others = sorted(names)
    return f"{first} and {len(others):,} more" if others else first
