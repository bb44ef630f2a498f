"""A command before it is submitted: what its verb would refuse is refused here, and so is what a job could not find.

Relative paths are the job's: they start at the working dir, which Ray copies to the cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence, Set
from contextlib import chdir
from pathlib import Path
from typing import Any

from typer.exceptions import TyperException

from cluster.submit import MAX_UPLOAD_BYTES, uploaded_files
from selfguide.cli_options import recipe_settings
from selfguide.errors import UserError
from selfguide.recipefile import load_recipe
from selfguide.tasks import find_tasks, load_task

VERBS = ("run", "sweep", "search", "evaluate", "replicate")
"""What runs on a cluster, and resumes."""
_PLACE = re.compile(r"/|[a-z][a-z0-9+.-]+:/")
"""An absolute path, or a URL (of which a Path keeps one slash)."""


def name_job(args: Sequence[str]) -> str:
    """The same command, the same name: `run-1a2b3c4d`."""
    return f"{args[0]}-{hashlib.sha256(json.dumps(list(args)).encode()).hexdigest()[:8]}"


def check_submission(verbs: Any, args: Sequence[str], working_dir: Path) -> list[str]:
    """Raises `UserError` for a command that cannot succeed as a job; returns what the user should know of the others.

    `verbs`: the command line's commands by name, whose own parsers read the command.
    """
    verb, *rest = args
    known = [one for one in VERBS if one in verbs]
    if verb not in known:
        raise UserError(f"{verb}: is nothing to submit; choose {', '.join(known)}")
    working_dir = working_dir.resolve()
    if not working_dir.is_dir():
        raise UserError(f"--working-dir {working_dir}: there is no such folder")
    try:
        with verbs[verb].make_context(verb, rest) as context:
            given = dict(context.params)
    except TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
        raise UserError(f"{verb}: {message} (selfguide {verb} --help)") from None
    _check_out(str(given["out"]))
    uploaded = uploaded_files(working_dir)
    _check_size(uploaded, working_dir)
    with chdir(working_dir):
        return list(_check_inputs(verb, given, uploaded))


def _check_out(out: str) -> None:
    if not _PLACE.match(out):
        raise UserError(
            f"--out {out}: is relative, and would be lost with the job's copy of the working dir; name an absolute "
            "path on storage that every node of the cluster sees"
        )


def _check_size(uploaded: dict[Path, int], working_dir: Path) -> None:
    total = sum(uploaded.values())
    if total > MAX_UPLOAD_BYTES:
        large = max(uploaded, key=uploaded.__getitem__)
        raise UserError(
            f"--working-dir {working_dir}: {total >> 20} MiB would be uploaded, {MAX_UPLOAD_BYTES >> 20} are allowed "
            f"(largest: {large.relative_to(working_dir)}, {uploaded[large] >> 20} MiB); name a smaller folder, list in "
            ".rayignore what the job does not need, and put data on the cluster's storage"
        )


def _check_inputs(verb: str, given: dict[str, Any], uploaded: dict[Path, int]) -> Iterator[str]:
    """In the working dir. What an absolute path names may be on the cluster alone."""
    recipe = load_recipe(given["recipe"], recipe_settings(given["changes"], given["model"]))
    if not recipe.model.path and verb != "replicate":
        from selfguide.api import NO_STUDENT

        raise UserError(NO_STUDENT)
    tasks = [str(path) for path in given.get("paths") or filter(None, [given.get("task")])]
    here = [path for path in tasks if os.path.exists(path) or not _PLACE.match(path)]
    files = find_tasks(here)
    patterns = any(not os.path.exists(path) for path in here)
    others = [given["recipe"], recipe.model.path, *map(given.get, ("folder", "adapter", "grid"))]
    held = {place for file in uploaded for place in (file, *file.parents)}
    for path in [*(files if patterns else here), *filter(None, others)]:
        if os.path.exists(path):
            yield from _check_path(Path(path), held)
    if verb in ("run", "evaluate"):
        for file in files:
            load_task(file, kind=given["kind"], labels_from=given["labels_from"])


def _check_path(path: Path, held: Set[Path]) -> Iterator[str]:
    if path.is_absolute():
        yield f"{path}: is not uploaded; the cluster must have it at this path"
        return
    place = Path(os.path.abspath(path))
    if not place.is_relative_to(Path.cwd()):
        raise UserError(
            f"{path}: lies outside the working dir, where the job would not find it; name a --working-dir that holds "
            "it, or its absolute path on the cluster"
        )
    if place not in held:
        raise UserError(
            f"{path}: would not be uploaded, since it is in /runs, or .gitignore or .rayignore names it; move it, or "
            "name its absolute path on the cluster"
        )
