from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from selfguide import nidata
from selfguide.cli import app
from selfguide.errors import UserError
from selfguide.nidata import fetch_clone
from selfguide.tasks import find_tasks, load_task

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
TASK: dict[str, Any] = {
    "Categories": ["Title Generation"],
    "Definition": ["Say it."],
    "Positive Examples": [{"input": "a", "output": "b", "explanation": 'the key "Instance License": ["no"] in a text'}],
    "Instances": [{"id": "task1-x", "input": "i", "output": ["o"]}],
    "Instance License": ["MIT"],
}
ABUSIVE = ["Toxic Language Detection"]
TASKS: dict[str, dict[str, Any]] = {
    "task1_a": TASK,
    "task2_b": TASK | {"Instance License": ["CC BY-NC 4.0", "MIT", "MIT"]},
    "task3_c": TASK | {"Instance License": ["Unknown"], "Categories": ABUSIVE},
    "task4_d": TASK | {"Instance License": ['Own "terms" (see [1], \\o/)']},
    "task5_e": {key: value for key, value in TASK.items() if key != "Instance License"},
    "task6_f": TASK | {"Instance License": []},
}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _own_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine's, and a person who commits."""
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "HOME": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "someone@example.org")


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A repository of two commits, `old` and the tip of `main`, which has all the tasks."""
    folder = tmp_path / "mirror"
    (folder / "tasks").mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for step, names in {"old": ["task1_a"], "new": list(TASKS)}.items():
        for name in names:
            (folder / "tasks" / f"{name}.json").write_text(json.dumps(TASKS[name], indent=1))
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", step)
        git(folder, "tag", step)
    return folder


def tip(mirror: Path, name: str = "main") -> str:
    return git(mirror, "rev-parse", name)


def tasks_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "tasks").iterdir())


@pytest.mark.parametrize("form", ["hash", "tag", "branch", "old hash"])
def test_one_commit_is_fetched_without_history(mirror: Path, tmp_path: Path, form: str) -> None:
    commit = {"hash": tip(mirror), "tag": "new", "branch": "main", "old hash": tip(mirror, "old")}[form]
    clone = fetch_clone(tmp_path / "ni", mirror.as_uri(), commit)
    assert clone.commit == tip(mirror, "old" if form == "old hash" else "new")
    assert tasks_in(tmp_path / "ni") == (["task1_a"] if form == "old hash" else sorted(TASKS))
    assert git(tmp_path / "ni", "rev-list", "--count", "HEAD") == "1"
    assert git(tmp_path / "ni", "status", "--porcelain") == ""
    assert [load_task(path).name for path in find_tasks([tmp_path / "ni"])] == tasks_in(tmp_path / "ni")


def test_what_is_whole_is_left_alone(mirror: Path, tmp_path: Path) -> None:
    folder, commit = tmp_path / "ni", tip(mirror)
    first = fetch_clone(folder, mirror.as_uri(), commit)
    shutil.rmtree(mirror / ".git")
    assert fetch_clone(folder, mirror.as_uri(), commit) == first
    folder.rename(tmp_path / "moved")
    assert fetch_clone(tmp_path / "moved", mirror.as_uri(), commit).num_tasks == len(TASKS)
    with pytest.raises(UserError, match="git fetch failed"):
        fetch_clone(tmp_path / "other", mirror.as_uri(), commit)


Stop = Callable[[Path, Path], None]


def stop_after_init(folder: Path, mirror: Path) -> None:
    git(folder.parent, "init", "--quiet", str(folder))


def stop_in_fetch(folder: Path, mirror: Path) -> None:
    stop_after_init(folder, mirror)
    git(folder, "config", "remote.origin.url", mirror.as_uri())
    (folder / ".git" / "objects" / "pack" / "tmp_pack_x").write_text("half")


def stop_in_checkout(folder: Path, mirror: Path) -> None:
    stop_in_fetch(folder, mirror)
    git(folder, "fetch", "--quiet", "--depth=1", "origin", tip(mirror))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "task1_a.json").write_text('{"ha')


@pytest.mark.parametrize("stop", [stop_after_init, stop_in_fetch, stop_in_checkout])
def test_a_stopped_command_goes_on(mirror: Path, tmp_path: Path, stop: Stop) -> None:
    folder = tmp_path / "ni"
    stop(folder, mirror)
    clone = fetch_clone(folder, mirror.as_uri(), tip(mirror))
    assert (clone.commit, clone.num_tasks, clone.num_changed) == (tip(mirror), len(TASKS), 0)
    assert load_task(folder / "tasks" / "task1_a.json").instruction == "Say it."


def test_a_fetched_commit_is_not_fetched_again(mirror: Path, tmp_path: Path) -> None:
    commit = tip(mirror)
    stop_in_checkout(tmp_path / "ni", mirror)
    shutil.rmtree(mirror / ".git")
    assert fetch_clone(tmp_path / "ni", mirror.as_uri(), commit).num_changed == 0


def test_another_commit_does_not_overwrite_what_was_changed(mirror: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ni"
    fetch_clone(folder, mirror.as_uri(), "old")
    own = folder / "tasks" / "task2_b.json"
    own.write_text("{}")
    with pytest.raises(UserError, match="git checkout failed"):
        fetch_clone(folder, mirror.as_uri(), "new")
    assert own.read_text() == "{}"
    own.unlink()
    assert fetch_clone(folder, mirror.as_uri(), "new").num_tasks == len(TASKS)
    (folder / "tasks" / "task1_a.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    changed = fetch_clone(folder, mirror.as_uri(), "new")
    assert changed.num_changed == 1
    assert (folder / "tasks" / "task1_a.json").read_text() == "{}"


def test_a_folder_of_something_else_is_refused(mirror: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{other}: is not empty and no clone of"):
        fetch_clone(other, mirror.as_uri(), "main")
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file; name a folder"):
        fetch_clone(other / "thesis.txt", mirror.as_uri(), "main")
    git(other, "init", "--quiet")
    with pytest.raises(UserError, match="is not empty and no clone of"):
        fetch_clone(other, mirror.as_uri(), "main")
    git(other, "remote", "add", "origin", "https://example.org/other")
    with pytest.raises(UserError, match=r"is a clone of https://example\.org/other, not of"):
        fetch_clone(other, mirror.as_uri(), "main")
    inside = mirror / "inside"  # a folder in a repository is no clone of its own
    inside.mkdir()
    (inside / "x").touch()
    with pytest.raises(UserError, match="is not empty and no clone of"):
        fetch_clone(inside, mirror.as_uri(), "main")


def test_a_mirror_may_be_a_path_and_end_in_git(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mirror)
    assert fetch_clone(tmp_path / "ni", "../mirror", "main").num_tasks == len(TASKS)
    fetch_clone(tmp_path / "uri", mirror.as_uri() + "/", "main")
    assert fetch_clone(tmp_path / "uri", mirror.as_uri(), "main").num_tasks == len(TASKS)


@pytest.mark.parametrize(
    ("commit", "expected"),
    [
        ("0" * 40, "git fetch failed (fatal: "),
        ("absent", "git fetch failed (fatal: couldn't find remote ref absent)"),
        ("8540acd3", "git fetch failed (fatal: couldn't find remote ref 8540acd3)"),
        ("--upload-pack=touch x", "--commit --upload-pack=touch x: is no name of a commit"),
        ("a:b", "is no name of a commit"),
    ],
)
def test_a_commit_that_is_not_there_is_named(mirror: Path, tmp_path: Path, commit: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        fetch_clone(tmp_path / "ni", mirror.as_uri(), commit)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mirror_of_something_else_is_named(mirror: Path, tmp_path: Path) -> None:
    git(mirror, "rm", "-r", "--quiet", "tasks")
    git(mirror, "commit", "--quiet", "-m", "empty")
    with pytest.raises(UserError, match="has no folder tasks"):
        fetch_clone(tmp_path / "ni", mirror.as_uri(), "main")


def test_without_git_the_remedy_is_said(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"git is not installed: install it .*, or bring a clone"):
        fetch_clone(tmp_path / "ni", mirror.as_uri(), "main")


def test_a_git_hook_leads_nowhere_else(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tip(mirror, "HEAD")
    monkeypatch.setenv("GIT_DIR", str(mirror / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(mirror / ".git" / "index"))
    assert fetch_clone(tmp_path / "ni", mirror.as_uri(), "old").num_tasks == 1
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    assert tip(mirror, "HEAD") == before
    assert git(mirror, "status", "--porcelain") == ""


def test_links_in_a_mirror_lead_nowhere(mirror: Path, tmp_path: Path) -> None:
    (mirror / "tasks" / "task7_link.json").symlink_to("/etc/hostname")
    git(mirror, "add", ".")
    git(mirror, "commit", "--quiet", "-m", "link")
    assert fetch_clone(tmp_path / "ni", mirror.as_uri(), "main").num_changed == 0
    assert not (tmp_path / "ni" / "tasks" / "task7_link.json").is_symlink()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "ni-v2", *map(str, arguments)], catch_exceptions=False)


def test_licences_are_counted(mirror: Path, tmp_path: Path) -> None:
    found = json.loads(run(tmp_path / "ni", "--from", mirror.as_uri(), "--commit", "main", "--json").stdout)
    assert found == {
        "folder": str(tmp_path / "ni"), "commit": tip(mirror), "num_tasks": 6,
        "licences": {"MIT": 2, "not stated": 2, "CC BY-NC 4.0": 1, "Unknown": 1, 'Own "terms" (see [1], \\o/)': 1},
        "num_unknown": 1, "num_non_commercial": 1, "num_abusive": 1, "num_changed": 0,
    }  # fmt: skip


def test_the_table_says_what_to_know(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    licence = "[red]x[/red]\x1b[31mred"
    (mirror / "tasks" / "task8.json").write_text(json.dumps(TASK | {"Instance License": [licence]}))
    git(mirror, "add", ".")
    git(mirror, "commit", "--quiet", "-m", "hostile")
    text = run(tmp_path / "ni", "--from", mirror.as_uri(), "--commit", "main").stdout
    assert f"7 tasks, commit {tip(mirror)}" in " ".join(text.split())
    assert r"[red]x[/red]\x1b[31mred" in text
    assert "\x1b[31mred" not in text
    prose = " ".join(text.split())
    assert "1 are stated as unknown and 1 as non-commercial" in prose
    assert "each task's instances are under the licence of their own source" in prose
    assert "abusive text" in prose


def test_rare_licences_are_summed_up(mirror: Path, tmp_path: Path) -> None:
    for index in range(nidata.NUM_SHOWN + 5):
        name = mirror / "tasks" / f"task1{index:02}.json"
        name.write_text(json.dumps(TASK | {"Instance License": [f"licence {index:02}"]}))
    git(mirror, "add", ".")
    git(mirror, "commit", "--quiet", "-m", "many")
    text = run(tmp_path / "ni", "--from", mirror.as_uri(), "--commit", "main").stdout
    assert "10 others (--json lists them)" in text
    assert "licence 19" not in text


def test_the_default_is_one_commit_of_the_public_repository() -> None:
    assert nidata.URL == "https://github.com/allenai/natural-instructions"
    assert len(nidata.COMMIT) == 40
    assert int(nidata.COMMIT, 16) >> 144 == 0x55A3


def test_licences_of_the_real_tasks(ni_v2_dir: Path, ni_v2_manifest: dict[str, dict[str, str]]) -> None:
    clone = nidata._describe(ni_v2_dir, "", 0)
    assert clone.num_tasks == len(ni_v2_manifest)
    assert "not stated" not in clone.licences
    assert clone.licences["Unknown"] == sum(row["instance_license"] == "Unknown" for row in ni_v2_manifest.values())
