"""No task file and no recipe, however broken, ends in a traceback (10,000 tries: benchmarks/mutate.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.mutate import EXAMPLES, run


@pytest.mark.parametrize("seed", [1, 2])
def test_broken_files_are_refused_in_one_line(seed: int, tmp_path: Path) -> None:
    counts = run(300, seed, [*EXAMPLES.glob("*.json"), *EXAMPLES.glob("*.yaml")], tmp_path)
    assert sum(counts.values()) == 300
    assert counts["refused load_task"] > 50
    assert counts["refused load_recipe"] > 20
