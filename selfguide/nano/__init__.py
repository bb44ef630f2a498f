"""The embedded student: a Llama of a few million parameters and a benchmark of small tasks, all of it made by code.

`benchmarks/nano/` holds the world they come from and the command that makes them again; `MODEL_CARD.md` says what the
student is, and what it is not.
"""

from __future__ import annotations

from pathlib import Path

NAME = "nano"
"""What `model.path` calls the embedded student."""
STUDENT = Path(__file__).parent / "student"
TASKS = Path(__file__).parent / "tasks"
DEMO_TASKS = (
    "nano102_heat_classification", "nano105_animal_classification",
    "nano121_opposite_then_drop_first", "nano124_rotate_then_plural",
)  # fmt: skip
"""Four held-out tasks, chosen before any of them had a score."""


def student_path(path: str) -> str:
    """`model.path` as a folder or hub name: NAME stands for the embedded student's folder."""
    return str(STUDENT) if path == NAME else path
