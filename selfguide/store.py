"""The run folder: `tasks/<task>/<stage>/<fingerprint>/`, shards while a stage runs, three files when it is done.

A stage's fingerprint covers what made it: its config, its version, the model's digest and its inputs' digests. Methods
that share a stage share its folder, and nothing is ever overwritten. Rows are written in shards of fixed ranges of row
index, each an immutable file that appears whole (write beside, fsync, link); a kill costs what is in flight and one
open shard. The marker `done.json` comes last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfguide.errors import UserError
from selfguide.nextstep import COMMAND_FILE
from selfguide.records import Ledger

FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""
SHARD_ROWS = 64
_BEAT_S, _SILENT_S = 15.0, 120.0
"""A lease is touched this often, and taken over from another host after this much silence. Seconds."""
TOKEN_COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens")


@dataclass(frozen=True)
class Artifact:
    """What a finished stage hands to the next: where it is, the digest of its rows, and its marker."""

    stage: str
    path: Path
    digest: str
    marker: Mapping[str, Any]

    @property
    def rows_path(self) -> Path:
        return self.path / "rows.parquet"

    def rows(self) -> list[dict[str, Any]]:
        return _read_rows(self.rows_path)


class RunStore:
    """A run folder. Raises `UserError` where it is not one, or one of a newer selfguide."""

    def __init__(self, root: Path, *, create: bool = True, command: Sequence[str] = ()) -> None:
        """`command`, the arguments of `selfguide`, is noted for people, and for `selfguide` without a verb."""
        self.root = root
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
            if self.root.is_dir() and any(self.root.iterdir()):
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
        return [TaskStore(path) for path in sorted((self.root / "tasks").glob("*")) if path.is_dir()]


class TaskStore:
    """One task's stages."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, name: str, made_by: Mapping[str, Any], inputs: Sequence[Artifact] = ()) -> Stage:
        """The stage that `made_by` (config, versions, digests) and `inputs` make, new, unfinished or done."""
        lineage = [f"{one.stage}/{one.path.name}" for one in inputs]
        text = json.dumps([name, made_by, [one.digest for one in inputs]], sort_keys=True, default=str)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Stage(name, self.root / name / fingerprint, dict(made_by), lineage)

    def artifacts(self) -> list[Artifact]:
        """Every finished stage, oldest first."""
        markers = [path for path in self.root.glob("*/*/done.json") if "." not in path.parent.name]
        return sorted(map(_read_artifact, markers), key=lambda one: one.marker["finished"])

    def retire(self, stage: str) -> int:
        """Sets aside what `--force stage` wants made again; returns how many folders that were."""
        folders = [path for path in (self.root / stage).glob("*") if path.is_dir() and "." not in path.name]
        for path in folders:
            _check_free(path / "work")
            with _disk_errors(path):
                path.rename(path.with_name(f"{path.name}.replaced-{time.time_ns()}"))
        return len(folders)


class Stage:
    """One stage's folder. Write only inside `with stage.writing():`, which fences off a second writer."""

    def __init__(self, name: str, path: Path, made_by: dict[str, Any], inputs: list[str]) -> None:
        self.name = name
        self.path = path
        self.fingerprint = path.name
        self._made_by = made_by
        self._inputs = inputs
        self._epoch = 0

    @property
    def done(self) -> Artifact | None:
        """The finished stage, or None. Raises `UserError` where its files are not as they were written."""
        marker = self.path / "done.json"
        if not marker.is_file():
            return None
        artifact = _read_artifact(marker)
        if not artifact.rows_path.is_file() or _file_digest(artifact.rows_path) != artifact.digest:
            raise UserError(_damaged(artifact.rows_path, "missing, or not as it was written"))
        return artifact

    @property
    def work(self) -> Path:
        return self.path / "work"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Takes the stage's lease; raises `UserError` where another process holds it."""
        with _disk_errors(self.path):
            self.work.mkdir(parents=True, exist_ok=True)
            self._epoch = _take_lease(self.work)
        lease, left = self.work / f"lease-{self._epoch}", threading.Event()
        threading.Thread(target=_beat, args=(lease, left), daemon=True).start()
        try:
            self.log({"event": "begin", "epoch": self._epoch})
            yield
        finally:
            left.set()
            with suppress(OSError):  # a lease that stays is succeeded, once its holder is dead
                lease.unlink(missing_ok=True)

    def _check_lease(self) -> None:
        if _epoch(self.work) != self._epoch:
            raise UserError(f"{self.path}: another process has taken this stage over; this one stops")

    def log(self, event: Mapping[str, Any]) -> None:
        """Adds one line to the stage's events; on disk when this returns."""
        line = json.dumps({"time": time.time(), **event}, default=str) + "\n"
        path = self.work / "events.jsonl"
        with _disk_errors(path), path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                line = "\n" + line  # behind what a process that died here, or a full disk, has left of a line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first; what is left of a torn line is passed over."""
        path = self.path / "events.jsonl" if self.done else self.work / "events.jsonl"
        events = []
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            with suppress(ValueError, RecursionError):
                events.append(json.loads(line))
        return [event for event in events if isinstance(event, dict) and event.keys() >= {"event", "time"}]

    def suspects(self) -> set[str]:
        """Ids of rows that were in flight when an engine died."""
        return {row for event in self.events() if event["event"] == "engine_died" for row in event["rows"]}

    def tokens(self) -> dict[str, int]:
        """Tokens spent on this stage by all processes that worked on it, as far as their events tell."""
        total, current = dict.fromkeys(TOKEN_COUNTS, 0), dict.fromkeys(TOKEN_COUNTS, 0)
        for event in [*self.events(), {"event": "begin"}]:
            if event["event"] == "begin":
                total = {key: total[key] + current[key] for key in total}
                current = dict.fromkeys(TOKEN_COUNTS, 0)
            current |= {key: event[key] for key in TOKEN_COUNTS if key in event}
        return total

    # ---- shards

    def committed(self) -> list[dict[str, Any]]:
        """Rows of all shards up to the first gap, in order: final, whatever happens later."""
        rows: list[dict[str, Any]] = []
        while (path := self._shard(len(rows))).is_file():
            rows += _read_rows(path)
            if len(rows) % SHARD_ROWS:
                break  # the last shard of a stage may be short
        return rows

    def commit(self, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
        """Writes the shard that begins with `rows[0]`; `row` indexes are contiguous from a multiple of SHARD_ROWS."""
        self._check_lease()
        path = self._shard(rows[0]["row"])
        try:
            write_rows(path, rows, schema, replace=False)
        except FileExistsError:
            raise UserError(f"{self.path}: another process has written {path.name}; this one stops") from None

    def _shard(self, first_row: int) -> Path:
        return self.work / f"rows-{first_row:08d}.parquet"

    def finish(
        self, rows: Sequence[Mapping[str, Any]] | Path, schema: pa.Schema | None, ledger: Ledger, **facts: Any
    ) -> Artifact:
        """Merges rows, events and marker into place. `rows` may be a file that is already written in `work`."""
        self._check_lease()
        self.log({"event": "end"})
        events = self.events()
        with _disk_errors(self.path):
            for left_over in self.path.glob(".*.part"):  # of a process that was killed as it finished
                left_over.unlink()
            if isinstance(rows, Path):
                rows.replace(self.path / "rows.parquet")
            else:
                assert schema is not None
                write_rows(self.path / "rows.parquet", rows, schema)
            shutil.copyfile(self.work / "events.jsonl", self.path / "events.jsonl")
        marker = {
            "stage": self.name, "fingerprint": self.fingerprint, "format": FORMAT, "inputs": self._inputs,
            "made_by": self._made_by, "rows_digest": _file_digest(self.path / "rows.parquet"),
            "ledger": ledger.as_dict(), "seconds": busy_seconds(events), "finished": time.time(), **facts,
        }  # fmt: skip
        write_whole(self.path / "done.json", json.dumps(marker, indent=1, default=str).encode())
        shutil.rmtree(self.work)
        return _read_artifact(self.path / "done.json")


def write_whole(path: Path, content: bytes, *, replace: bool = True) -> None:
    """The file appears whole or not at all; with `replace=False` an existing one raises `FileExistsError`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _disk_errors(path):
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                beside.replace(path)
            else:
                os.link(beside, path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What a disk refuses, the user can mend; a file that is there already is the caller's business."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        remedy = "free space or choose another --out, then run the same command again"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, *, replace: bool = True) -> None:
    """Rows as Parquet, zstd-compressed; whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes(), replace=replace)


def _read_artifact(marker: Path) -> Artifact:
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        _ = [content[key] for key in ("fingerprint", "inputs", "made_by", "ledger", "seconds", "finished")]
        return Artifact(content["stage"], marker.parent, content["rows_digest"], content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(_damaged(marker, f"{type(error).__name__}: {error}")) from error


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(pq.read_table(path).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise UserError(_damaged(path, " ".join(str(error).split())[:200])) from error


def _damaged(path: Path, how: str) -> str:
    """Of a file that was whole once; the stage's folder is made again where it is not there."""
    folder = path.parent.parent if path.parent.name == "work" else path.parent
    return f"{path}: is damaged ({how}); move {folder} away, then run the same command to make it again"


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_name(task: str) -> str:
    """A task's name as one path segment; a name that had to be changed gets a hash, so that no two collide."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", task).lstrip(".")[:100]
    return safe if safe and safe == task else f"{safe}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"


def busy_seconds(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds between the first and the last event of each process that worked on the stage, added up."""
    total, began, last = 0.0, 0.0, 0.0
    for event in events:
        if event["event"] == "begin":
            total += last - began
            began = event["time"]
        last = event["time"]
    return round(total + last - began, 3)


def _take_lease(work: Path) -> int:
    """A file `lease-<epoch>` names the holder. A holder that is dead, or silent on another host, is succeeded."""
    epoch = _check_free(work)
    pid = os.getpid()
    me = {"host": socket.gethostname(), "pid": pid, "started": _process_start(pid), "since": time.time()}
    try:
        write_whole(work / f"lease-{epoch + 1}", json.dumps(me).encode(), replace=False)
    except FileExistsError:
        message = f"{work.parent}: another process began here at the same moment; run the command again"
        raise UserError(message) from None
    (work / f"lease-{epoch}").unlink(missing_ok=True)
    (work / f"epoch-{epoch + 1}").touch()
    return epoch + 1


def _check_free(work: Path) -> int:
    """The last epoch, whose holder has left, is dead or silent; raises `UserError` where it is at work."""
    epoch = _epoch(work)
    lease = work / f"lease-{epoch}"
    if lease.is_file() and _alive(lease):
        holder = lease.read_text(encoding="utf-8", errors="replace")
        raise UserError(f"{work.parent}: another process is at work here ({holder}); wait for it or end it")
    return epoch


def _beat(lease: Path, left: threading.Event) -> None:
    """Touches the lease while its holder lives; ends when the holder leaves or has been succeeded."""
    while not left.wait(_BEAT_S) and lease.is_file():
        with suppress(OSError):
            os.utime(lease)  # not `touch`, which would make it again


def leases(root: Path) -> list[tuple[Path, bool]]:
    """The leases in a run folder that nobody has given back, and whether their holders are at work."""
    return [(path, _alive(path)) for path in sorted(root.glob("tasks/*/*/*/work/lease-*"))]


def _epoch(work: Path) -> int:
    """The highest epoch that was ever taken here."""
    names = (path.name.partition("-")[2] for path in (*work.glob("lease-*"), *work.glob("epoch-*")))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _alive(lease: Path) -> bool:
    """On this machine the process is looked for; on another one its heartbeat is all there is."""
    holder: object = None
    with suppress(ValueError, RecursionError):  # who holds a lease that cannot be read is told by its heartbeat alone
        holder = json.loads(lease.read_bytes())
    if not isinstance(holder, dict) or holder.get("host") != socket.gethostname():
        return time.time() - lease.stat().st_mtime < _SILENT_S
    # A process number is used again; together with its start it is not.
    pid = holder.get("pid", 0)
    started = _process_start(pid)
    return bool(pid != os.getpid() and started is not None and started == holder.get("started"))


def _process_start(pid: int) -> str | None:
    """Clock ticks from boot to the start of the process, or None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
