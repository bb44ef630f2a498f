"""A preview for a person. Line ends are shown as ⏎, every other control character as an escape."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from selfguide.text import printable

_HEAD, _QUIET, _GOOD, _BAD, _LOSS = "bold", "dim", "green", "yellow", "bold cyan"


def show_preview(document: dict[str, Any]) -> None:
    """Prints the document of `preview` on standard output."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for line in _lines(document):
        console.print(line)


def quote(text: str, style: str = "") -> Iterator[Text]:
    """Each line of the text behind a bar. A line end of the text's own is a ⏎: what has none ends without."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        last = number == len(lines) - 1
        if not last or line or number == 0:
            yield Text.assemble(("  │ ", _QUIET), (printable(line), style), ("" if last else "⏎", _QUIET))


def _lines(document: dict[str, Any]) -> Iterator[Text]:
    labels = f", labels {', '.join(document['labels'])}" if document["labels"] else ""
    prompts = "the chat template" if document["chat"] else "plain text"
    yield _line(f"{document['task']}: {document['kind']}{labels}", _HEAD)
    yield _line(f"student {document['student']}, prompts in {prompts}, context {document['context']:,} tokens")
    count = len(document["rows"])
    rows = f"the first {count} rows" if count > 1 else "the first row"
    yield _line(f"{rows} of a run by recipe {document['recipe']}; set filters see nothing else")
    seen: dict[str, str] = {}
    for row in document["rows"]:
        yield from _row(row, seen)
    yield from _later(document, seen)
    yield from _training(document["training"])
    yield from _evaluation(document["evaluation"], seen)


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def _prompt(prompt: dict[str, Any] | None, name: str, place: str, seen: dict[str, str]) -> Iterator[Text]:
    """The fixed part is shown once; `seen` says where."""
    if prompt is None:
        return
    yield _line(f"{name}, fixed part, {_tokens(prompt['fixed_tokens'])}{_as_before(prompt, place, seen)}")
    if seen.setdefault(prompt["fixed"], place) == place:
        yield from quote(prompt["fixed"], _QUIET)
    yield _line(f"{name}, varying part, {_tokens(prompt['varying_tokens'])}")
    yield from quote(prompt["varying"])


def _as_before(prompt: dict[str, Any], place: str, seen: dict[str, str]) -> str:
    before = seen.get(prompt["fixed"], place)
    return "" if before == place else f": as in {before}"


def _row(row: dict[str, Any], seen: dict[str, str]) -> Iterator[Text]:
    place = f"row {row['row']}"
    wanted = f", an input for {row['label']}" if row["label"] is not None else ""
    yield _line("")
    yield _line(f"── {place}{wanted}", _HEAD)
    yield from _prompt(row["input_prompt"], "input prompt", place, seen)
    if row["input_raw"]:
        yield from _answer(row["input_raw"])
        yield _line("parsed as the input")
        yield from quote(row["input"])
    yield _verdict("row" if row["verdict"]["state"] == "failed" else "input", row["verdict"])
    yield from _prompt(row["output_prompt"], "annotation prompt", place, seen)
    for number, sample in enumerate(row["samples"]):
        yield from _sample(number, sample)
    if pair := row["pair"]:
        if pair["votes"] is not None:
            yield _line(f"elected with {pair['votes']} votes, {pair['share']:.0%}")
            yield from quote(pair["output"])
        if pair["margin"] is not None:
            yield _line(
                f"calibrated over these rows alone, {pair['margin']:.2f} standard units ahead of the second label"
            )
            yield from quote(pair["output"])
        yield _verdict("pair", pair)


def _answer(raw: dict[str, Any], what: str = "came back") -> Iterator[Text]:
    yield _line(f"{what}, {_tokens(raw['tokens'])}, finish_reason {raw['finish_reason']}")
    yield from quote(raw["text"])


def _sample(number: int, sample: dict[str, Any]) -> Iterator[Text]:
    yield from _answer({**sample, "text": sample.get("raw", sample["text"])}, f"sample {number} came back")
    if "raw" in sample and sample["raw"] != sample["text"]:
        yield _line("parsed as")
        yield from quote(sample["text"])
    yield _verdict(f"sample {number}", sample | {"state": "rejected" if sample["filter"] else "accepted"})


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def _verdict(what: str, verdict: dict[str, Any]) -> Text:
    if verdict["filter"] is None:
        return Text(f"{what} {verdict['state']}", _GOOD)
    by = "by" if verdict["state"] == "rejected" else "with"
    return _line(f"{what} {verdict['state']} {by} {verdict['filter']}: {verdict['reason']}", _BAD)


def _later(document: dict[str, Any], seen: dict[str, str]) -> Iterator[Text]:
    later = document["later_prompt"]
    yield _line("")
    if later is None:
        yield _line("── a later row: no input was accepted, so there are no demonstrations to show", _HEAD)
        return
    yield _line(f"── a later row, with {later['demonstrations']} of these inputs as demonstrations (not sent)", _HEAD)
    yield from _prompt(later, "input prompt", "the later row", seen)


def _training(training: dict[str, Any]) -> Iterator[Text]:
    yield _line("")
    yield _line(f"── a training row, of {training['source']}", _HEAD)
    if "left_out" in training:
        yield _line(f"left out by {training['left_out']}", _BAD)
        return
    yield _line(f"prompt, {_tokens(training['prompt_tokens'])}, without loss")
    yield from quote(training["prompt"], _QUIET)
    yield _line(f"answer, {_tokens(training['loss_tokens'])}, with loss")
    yield from quote(training["loss"], _LOSS)


def _evaluation(evaluation: dict[str, Any] | None, seen: dict[str, str]) -> Iterator[Text]:
    yield _line("")
    if evaluation is None:
        yield _line("── evaluation: the task has no held-out rows", _HEAD)
        return
    yield _line(f"── evaluation, {evaluation['id']}, the untuned student", _HEAD)
    yield from _prompt(evaluation["prompt"], "prompt", "the evaluation", seen)
    if evaluation["raw"]:
        yield from _answer(evaluation["raw"])
    if evaluation["filter"] is not None:
        yield _verdict("row", evaluation)
    yield _line("prediction, then the references")
    for text in (evaluation["prediction"], *evaluation["references"]):
        yield from quote(text)
    rouge = evaluation["rouge_l"]
    scored = "unavailable" if rouge is None else f"{100 * rouge:.1f}"
    yield _line(f"exact match {100 * evaluation['exact_match']:.0f}, ROUGE-L {scored}")
