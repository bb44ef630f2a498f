"""What machine and cluster have, what a recipe needs of them, and what is wrong, in seconds and before anything starts.

Torch, Ray and the tokenizer are asked in processes of their own: a broken one is then a line, not a crash.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.files import AnyPath
from selfguide.doctor.case import Case, Finding
from selfguide.doctor.hardware import check_disk, check_hardware, check_locks
from selfguide.doctor.placing import check_placement, check_ray
from selfguide.doctor.software import check_software
from selfguide.doctor.student import check_student

if TYPE_CHECKING:
    from selfguide.config import Recipe

__all__ = ["Finding", "examine", "show_findings"]

_CHECKS = (check_software, check_hardware, check_student, check_ray, check_placement, check_disk, check_locks)
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def examine(recipe: Recipe, out: AnyPath) -> list[Finding]:
    """Everything in order. Starts no engine and fetches nothing. Where `out` is a URL one small object is written and
    removed again; else nothing is written."""
    case = Case(recipe, out)
    return [finding for check in _CHECKS for finding in check(case)]


def show_findings(findings: Sequence[Finding]) -> None:
    """A table on a terminal, a line each elsewhere."""
    from rich.text import Text

    from selfguide.tables import make_table, show
    from selfguide.text import printable

    counts = [(level, sum(one.level == level for one in findings)) for level in ("error", "warning")]
    summary = ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts)
    if sys.stdout.isatty():
        rows = [(Text(one.level, _STYLES[one.level]), one.check, one.found, one.remedy) for one in findings]
        show(make_table(("level", "check", "found", "what to do"), rows), summary)
        return
    for one in findings:
        print(printable(f"{one.level:8} {one.check}: {one.found}" + (f"; {one.remedy}" if one.remedy else "")))
    print(summary)
