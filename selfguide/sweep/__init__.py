"""Many tasks at once over one cluster: each is a job that runners carry out, in any order, whatever dies."""

from __future__ import annotations

from selfguide.sweep.driver import run_jobs
from selfguide.sweep.jobs import Job, Outcome

__all__ = ["Job", "Outcome", "run_jobs"]
