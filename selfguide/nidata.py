"""Super-NaturalInstructions on disk: one commit of the public repository, and what its licences are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfguide.errors import UserError
from selfguide.tables import make_table, show

URL = "https://github.com/allenai/natural-instructions"
COMMIT = "55a365637381ce7f3748fa2eac7aef1a113bbb82"
"""The head of its default branch when this was written, 1,613 tasks; the SELF-GUIDE authors' code refers to it."""
ABUSIVE = "Toxic Language Detection"
NUM_SHOWN = 15

_FETCHED = "refs/selfguide/fetched"
_FULL_HASH = re.compile(r"[0-9a-f]{40}")
_NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial", re.IGNORECASE)
# What a git hook or an alias may have set would lead git to another repository.
_FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_NAMESPACE")
# A transfer that stands still ends after a minute.
_SETTINGS = ("-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=60")


@dataclass(frozen=True)
class Clone:
    """A clone and how many of its tasks state which licence; a task may state several."""

    folder: Path
    commit: str
    num_tasks: int
    licences: Mapping[str, int]
    num_abusive: int
    """Tasks of the category that is about abusive text; others hold some too."""
    num_changed: int
    """Files that differ from the commit."""


def fetch_clone(folder: Path, url: str = URL, commit: str = COMMIT) -> Clone:
    """Brings the commit (40 hex digits, a tag or a branch) into the folder, without the repository's history.

    A fetch that was stopped is begun again, a checkout goes on; a clone that is whole is left as it is. Raises
    `UserError` where the folder holds something else, git is missing, or git fails.
    """
    _claim(folder, str(Path(url).resolve()) if Path(url).is_dir() else url)
    head = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", may_fail=True)
    if head != commit:
        target = _fetch(folder, commit)
        # The first checkout may have been stopped halfway; later ones must not overwrite what the user changed.
        _git(folder, "checkout", "--quiet", *(() if head else ("--force",)), "--detach", target)
        head = target
    if not (folder / "tasks").is_dir():
        raise UserError(f"{folder}: commit {head} has no folder tasks: it is no natural-instructions; change --from")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no").splitlines()
    return _describe(folder, head, len(changed))


def show_clone(clone: Clone) -> None:
    """The licences, most frequent first, and what to know before the data is used."""
    most = Counter(clone.licences).most_common()
    rows = most[:NUM_SHOWN]
    if rest := most[NUM_SHOWN:]:
        rows.append((f"{len(rest)} others (--json lists them)", sum(count for _, count in rest)))
    table = make_table(("tasks", "licence of the instances"), [(count, name) for name, count in rows])
    show(f"{clone.folder}: {clone.num_tasks:,} tasks, commit {clone.commit}", table, _advice(clone))


def document(clone: Clone) -> dict[str, Any]:
    """The clone as JSON."""
    return {
        "folder": str(clone.folder), "commit": clone.commit, "num_tasks": clone.num_tasks,
        "licences": dict(Counter(clone.licences).most_common()), "num_unknown": num_unknown(clone.licences),
        "num_non_commercial": num_non_commercial(clone.licences), "num_abusive": clone.num_abusive,
        "num_changed": clone.num_changed,
    }  # fmt: skip


def num_unknown(licences: Mapping[str, int]) -> int:
    return sum(count for name, count in licences.items() if name.lower().startswith("unknown"))


def num_non_commercial(licences: Mapping[str, int]) -> int:
    return sum(count for name, count in licences.items() if _NON_COMMERCIAL.search(name))


def _advice(clone: Clone) -> str:
    unknown, restricted = num_unknown(clone.licences), num_non_commercial(clone.licences)
    text = (
        "The collection is under Apache-2.0; each task's instances are under the licence of their own source, named in "
        f'"Instance License" of its file. Here {unknown:,} are stated as unknown and {restricted:,} as non-commercial: '
        "look at a task's licence before you use or share what was trained on it. Some tasks hold abusive text (hate "
        f"speech, insults, threats): {clone.num_abusive:,} are in the category {ABUSIVE}, and others hold some too."
    )
    if clone.num_changed:
        text += (
            f" {clone.num_changed:,} files differ from the commit; git -C {clone.folder} checkout . brings them back."
        )
    return text


# ---- git


def _claim(folder: Path, url: str) -> None:
    """Makes the folder a repository that fetches from `url`, unless it is one; refuses to touch anything else."""
    there = list(folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    origin = ""
    if (folder / ".git").is_dir():
        origin = _git(folder, "config", "--get", "remote.origin.url", may_fail=True)
    if origin and _same(origin) != _same(url):
        raise UserError(
            f"{folder}: is a clone of {origin}, not of {url}; name another folder, or that address as --from"
        )
    if not origin:
        if [path for path in there if path.name != ".git"]:
            raise UserError(f"{folder}: is not empty and no clone of {url}; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        _git(folder, "init", "--quiet", "--template=")
        _git(folder, "config", "core.symlinks", "false")
        _git(folder, "config", "remote.origin.url", url)


def _same(url: str) -> str:
    return url.rstrip("/").removesuffix(".git")


def _fetch(folder: Path, commit: str) -> str:
    """The hash of the commit, which is in the repository when this returns."""
    if _FULL_HASH.fullmatch(commit):
        if _git(folder, "cat-file", "-t", commit, may_fail=True) == "commit":
            return commit
    elif not re.fullmatch(r"[A-Za-z0-9][\w./-]*", commit):
        raise UserError(f"--commit {commit}: is no name of a commit; give 40 hex digits, a tag or a branch")
    # A name of its own keeps what is there from being sent again when a tag or branch is asked for anew.
    _git(folder, "fetch", "--depth=1", "--no-tags", "origin", f"+{commit}:{_FETCHED}", progress=True)
    return _git(folder, "rev-parse", "--verify", f"{_FETCHED}^{{commit}}")


def _git(folder: Path, verb: str, *args: str, may_fail: bool = False, progress: bool = False) -> str:
    """What git prints; with `may_fail` nothing where it fails. Raises `UserError` with git's own words otherwise."""
    # Named, so that git never goes looking for a repository in the folders above.
    place = ["-C", str(folder), *(() if verb == "init" else ("--git-dir=.git", "--work-tree=."))]
    environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    watched = progress and sys.stderr.isatty()
    try:
        done = subprocess.run(
            ["git", *_SETTINGS, *place, verb, *args], check=False, text=True, errors="replace",
            env=environment | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=None if watched else subprocess.PIPE,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError("git is not installed: install it (https://git-scm.com), or bring a clone yourself") from None
    if done.returncode and not may_fail:
        said = [line for line in (done.stderr or "").splitlines() if line.startswith(("fatal:", "error:"))]
        why = said[0] if said else "its message is above" if watched else f"exit code {done.returncode}"
        raise UserError(f"{folder}: git {verb} failed ({why}); mend that, and the same command goes on from here")
    return "" if done.returncode else done.stdout.strip()


# ---- what the tasks say


def _describe(folder: Path, commit: str, num_changed: int) -> Clone:
    licences: Counter[str] = Counter()
    num_tasks = num_abusive = 0
    for path in sorted((folder / "tasks").glob("*.json")):
        text = path.read_bytes()
        licences.update(set(_read_list(text, b"Instance License")) or {"not stated"})
        num_abusive += ABUSIVE in _read_list(text, b"Categories")
        num_tasks += 1
    return Clone(folder, commit, num_tasks, licences, num_abusive, num_changed)


def _read_list(text: bytes, key: bytes) -> list[str]:
    """The list of texts under the key, without parsing the megabytes around it.

    Quotes inside a JSON text are escaped, so that the quoted key with its colon can be nothing but a key.
    """
    match = re.search(rb'"' + key + rb'"\s*:\s*(\[\s*(?:"(?:[^"\\]|\\.)*"\s*,?\s*)*\])', text)
    if match is None:
        return []
    try:
        value = json.loads(match[1])
    except ValueError:
        return []
    return [one.strip() for one in value if isinstance(one, str) and one.strip()]
