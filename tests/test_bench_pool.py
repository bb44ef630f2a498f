"""The rows that the pool is measured with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pool_workloads import UNSEEDED, WORKLOADS, Drawer, Sizes, attainable_hits, write_adapters
from engines.adapters import check_adapter
from engines.types import AdapterRef, Request, Sampling, ScoreRequest, Work, num_prompt_tokens

ADAPTER = AdapterRef("a", "", 8, "")
DRAWER = Drawer(Sizes().times(0.05), range(50), [ADAPTER])


@pytest.mark.parametrize("workload", [*WORKLOADS, UNSEEDED])
def test_all_contestants_draw_the_same_rows_and_each_repeat_others(workload: str) -> None:
    rows = DRAWER.rows(workload, 0)
    assert rows == DRAWER.rows(workload, 0)
    assert len({row.id for row in rows}) == len(rows) == getattr(DRAWER.sizes, workload.partition("-")[0])
    others = DRAWER.rows(workload, 1)
    assert attainable_hits([*rows, *others], 16) == pytest.approx(mean_hits(rows, others), abs=1e-12)


def mean_hits(*repeats: list[Work]) -> float:
    """Over all rows, if no repeat finds anything of another."""
    tokens = [sum(map(num_prompt_tokens, rows)) for rows in repeats]
    return sum(attainable_hits(rows, 16) * n for rows, n in zip(repeats, tokens, strict=True)) / sum(tokens)


def test_rows_without_seeds_are_the_seeded_ones_otherwise() -> None:
    pairs = zip(DRAWER.rows("short", 0), DRAWER.rows(UNSEEDED, 0), strict=True)
    for seeded, other in pairs:
        assert isinstance(seeded, Request)
        assert isinstance(other, Request)
        assert seeded.prompt_ids == other.prompt_ids
        assert seeded.sampling.seed is not None
        assert other.sampling.seed is None


def test_attainable_hits_are_whole_blocks_seen_before_by_the_same_student_never_a_whole_prompt() -> None:
    def ask(ids: range, adapter: AdapterRef | None = None, n: int = 1) -> Request:
        return Request("", list(ids), Sampling(n=n), adapter)

    assert attainable_hits([ask(range(10)), ask(range(10))], 4) == 8 / 20
    assert attainable_hits([ask(range(8)), ask(range(8))], 4) == 4 / 16  # the last token has to be read
    assert attainable_hits([ask(range(10)), ask(range(10), ADAPTER)], 4) == 0
    assert attainable_hits([ask(range(10)), ask(range(1, 11))], 4) == 0
    assert attainable_hits([ask(range(10), n=2)], 4) == 8 / 10
    assert attainable_hits([ScoreRequest("", range(6), range(4)), ask(range(6))], 4) == 4 / 16


def test_the_adapters_fit_the_student(random_student: Path, tmp_path: Path) -> None:
    [ref] = write_adapters(tmp_path / "adapters", random_student, "base", 1, 8)
    check_adapter(ref, random_student, 8)
