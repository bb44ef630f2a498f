"""`selfguide` without a verb: a short help, and the next useful command here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfguide import cli
from selfguide.nextstep import next_step
from selfguide.store import RunStore


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_step_is_the_demonstration(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfguide"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    shown = capsys.readouterr().out.rstrip().splitlines()
    assert shown[-1].split() == ["selfguide", "demo"]
    assert any(line.split()[:1] == ["demo"] for line in shown), "the help does not know it"


def test_an_unfinished_run_goes_on_with_the_command_that_began_it(here: Path) -> None:
    store = RunStore(Path("runs/mine"), command=["run", "my task.yaml", "--out", "runs/mine"])
    stage = store.task("t").stage("synthesis", {})
    with stage.writing():
        assert "being worked on" in next_step(here)[0]
    assert next_step(here) == [
        "runs/mine is unfinished (synthesis). It goes on with:", "  selfguide run 'my task.yaml' --out runs/mine",
    ]  # fmt: skip
    (here / "runs/mine/command.txt").unlink()
    assert next_step(here)[1].startswith("  selfguide run TASK --out runs/mine ")
    shutil.rmtree(stage.work)
    assert next_step(here)[1] == "  selfguide report runs/mine"


def test_the_newest_run_counts(here: Path) -> None:
    for number, name in enumerate(("old", "new")):
        RunStore(Path("runs") / name)
        assert "Nothing has been run here yet" in next_step(here)[0] or number  # no stage has begun in it
        (Path("runs") / name / "tasks").mkdir()
        os.utime(Path("runs") / name / "run.json", (number + 1, number + 1))
    assert next_step(here)[1] == "  selfguide report runs/new"


def test_no_arguments_answer_in_half_a_second(here: Path) -> None:
    """Of this process's own time, whatever else the machine does."""
    script = (
        "import sys, time; sys.argv = ['selfguide']\n"
        "from selfguide.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert float(done.stderr) < 0.5
