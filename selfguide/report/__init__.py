"""Reports of a run folder, from its artifacts alone: never from logs, never from the process that ran.

`docs/report.md` describes the document; `report.md` says the same to a person, and for a sweep so does `report.html`.
"""

from __future__ import annotations

import json
from typing import Any

from engines.files import AnyPath
from selfguide.report.collect import collect
from selfguide.report.markdown import render
from selfguide.report.sweep import collect_sweep
from selfguide.report.sweep_html import render_page
from selfguide.report.sweep_markdown import render_sweep
from selfguide.report.sweep_reading import is_sweep
from selfguide.store import write_whole


def read_report(folder: AnyPath) -> dict[str, Any]:
    """The document of `docs/report.md`. Reads only; raises `UserError` where `folder` is no run folder."""
    return collect_sweep(folder) if is_sweep(folder) else collect(folder)


def write_report(folder: AnyPath) -> tuple[dict[str, Any], str]:
    """Writes `report.json`, `report.md` and, for a sweep, `report.html`; returns the document and the Markdown."""
    document = read_report(folder)
    write_whole(folder / "report.json", (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
    if document["sweep"]:
        markdown = render_sweep(document)
        write_whole(folder / "report.html", render_page(document).encode())
    else:
        markdown = render(document)
    write_whole(folder / "report.md", markdown.encode())
    return document, markdown
