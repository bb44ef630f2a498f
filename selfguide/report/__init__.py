"""Reports of a run folder, from its artifacts alone: never from logs, never from the process that ran.

`docs/report.md` describes the document; `report.md` says the same to a person.
"""

from __future__ import annotations

import json
from typing import Any

from engines.files import AnyPath
from selfguide.report.collect import collect
from selfguide.report.markdown import render
from selfguide.store import write_whole


def read_report(folder: AnyPath) -> dict[str, Any]:
    """The document of `docs/report.md`. Reads only; raises `UserError` where `folder` is no run folder."""
    return collect(folder)


def write_report(folder: AnyPath) -> tuple[dict[str, Any], str]:
    """Writes `report.json` and `report.md` into the run folder; returns the document and the Markdown."""
    document = read_report(folder)
    markdown = render(document)
    write_whole(folder / "report.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    write_whole(folder / "report.md", markdown.encode())
    return document, markdown
