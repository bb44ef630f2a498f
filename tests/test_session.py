"""Connecting to Ray."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from cluster.placement import ClusterSpec
from cluster.session import _connect

SLOW = Exception("The current node timed out during startup. This could happen because the GCS is overloaded.")


@pytest.mark.parametrize(
    ("failures", "num_starts", "raised"),
    [
        ([SLOW, SLOW], 3, None),
        ([SLOW] * 3, 3, "timed out during startup"),
        ([ValueError("port taken")], 1, "port taken"),
    ],
)
def test_a_node_that_starts_too_slowly_is_started_again_and_no_other_failure_is(
    monkeypatch: pytest.MonkeyPatch, failures: list[Exception], num_starts: int, raised: str | None
) -> None:
    starts: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        starts.append(options)
        if len(starts) <= len(failures):
            raise failures[len(starts) - 1]

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if raised is None:
        _connect(ClusterSpec())
    else:
        with pytest.raises(Exception, match=raised):
            _connect(ClusterSpec())
    assert len(starts) == num_starts
