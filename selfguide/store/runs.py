"""A run folder and its tasks."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from engines.files import AnyPath, Place, list_folders, move_folder
from selfguide.errors import UserError
from selfguide.nextstep import COMMAND_FILE
from selfguide.store.stages import FORMAT, Artifact, Stage, open_work, read_artifact
from selfguide.store.whole import disk_errors, write_whole


class RunStore:
    """A run folder. Raises `UserError` where it is not one, or one of a newer selfguide."""

    def __init__(self, root: AnyPath, *, create: bool = True, command: Sequence[str] = ()) -> None:
        """`command`, the arguments of `selfguide`, is noted for people, and for `selfguide` without a verb."""
        self.root: Place = root
        self._check_format(create)
        if create and command:
            line = shlex.join(["selfguide", *command])
            write_whole(root / COMMAND_FILE, f"{line}\n".encode(errors="replace"))

    def _check_format(self, create: bool) -> None:
        path = self.root / "run.json"
        try:
            if path.is_file():
                known = json.loads(path.read_text(encoding="utf-8")).get("format")
                if known != FORMAT:
                    raise UserError(
                        f"{path}: format {known}, this selfguide reads and writes {FORMAT}; take the selfguide that "
                        "made it, or another folder"
                    )
                return
            with suppress(FileNotFoundError):
                if any(self.root.iterdir()):
                    raise UserError(f"{self.root}: is not empty and no run folder; choose another --out folder")
            if not create:
                return
            self.root.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"format": FORMAT, "created": time.time()}).encode())
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.root}: cannot be used as a run folder ({error}); choose another with --out"
            ) from error

    def task(self, name: str) -> TaskStore:
        return TaskStore(self.root / "tasks" / _folder_name(name))

    def tasks(self) -> list[TaskStore]:
        return [TaskStore(path) for path in list_folders(self.root / "tasks")]


class TaskStore:
    """One task's stages."""

    def __init__(self, root: AnyPath) -> None:
        self.root: Place = root
        self.made: dict[str, float] = {}
        """Seconds of each "stage/fingerprint" that was finished through this object, not found done."""

    def stage(self, name: str, made_by: Mapping[str, Any], inputs: Sequence[Artifact] = ()) -> Stage:
        """The stage that `made_by` (config, versions, digests) and `inputs` make, new, unfinished or done."""
        lineage = [f"{one.stage}/{one.path.name}" for one in inputs]
        text = json.dumps([name, made_by, [one.digest for one in inputs]], sort_keys=True, default=str)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Stage(name, self.root / name / fingerprint, dict(made_by), lineage, self.made)

    def artifacts(self) -> list[Artifact]:
        """Every finished stage, oldest first."""
        markers = [path for path in self.root.glob("*/*/done.json") if "." not in path.parent.name]
        return sorted(map(read_artifact, markers), key=lambda one: one.marker["finished"])

    def retire(self, stage: str) -> int:
        """Sets aside what `--force stage` wants made again; returns how many folders that were."""
        folders = [path for path in list_folders(self.root / stage) if "." not in path.name]
        for path in folders:
            open_work(path).check_free()
            with disk_errors(path):
                move_folder(path, path.with_name(f"{path.name}.replaced-{time.time_ns()}"))
        return len(folders)


def _folder_name(task: str) -> str:
    """A task's name as one path segment; a name that had to be changed gets a hash, so that no two collide."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", task).lstrip(".")[:100]
    return safe if safe and safe == task else f"{safe}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"
