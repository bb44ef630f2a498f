"""Fixtures over the real NI-V2 data, which the project does not carry: tests that need it skip without it.

NI_V2_DIR, or else ../shared/ni beside the repository, is a clone of natural-instructions, a folder with one in
it, or an archive folder with an `unpack` script that lays one out.
"""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path

import pytest

PLACE = Path(os.environ.get("NI_V2_DIR") or Path(__file__).parents[1] / ".." / "shared" / "ni").resolve()


@pytest.fixture(scope="session")
def ni_v2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a natural-instructions clone: tasks/*.json and splits/."""
    for root in (PLACE, PLACE / "natural-instructions"):
        if (root / "tasks").is_dir():
            return root
    if not (PLACE / "unpack").is_file():
        pytest.skip(f"no NI-V2 data in {PLACE}: set NI_V2_DIR to a clone of natural-instructions")
    folder = tmp_path_factory.mktemp("ni_v2")
    subprocess.run(["bash", PLACE / "unpack", folder], check=True, capture_output=True)
    return folder / "natural-instructions"


@pytest.fixture(scope="session")
def ni_v2_manifest() -> dict[str, dict[str, str]]:
    """The manifest's row of each task: is_classification, labels, ..."""
    path = PLACE / "manifest.csv"
    if not path.is_file():
        pytest.skip(f"no NI-V2 manifest in {PLACE}: set NI_V2_DIR to the archive folder")
    with path.open(newline="", encoding="utf-8") as file:
        return {row["task"]: row for row in csv.DictReader(file)}
