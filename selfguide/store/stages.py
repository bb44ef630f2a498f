"""A stage's folder: shards and events while it is written, rows, events and marker when it is done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from engines.files import AnyPath, Place, Url
from selfguide.errors import StageBusy, UserError
from selfguide.records import Ledger
from selfguide.store.disk import DiskWork
from selfguide.store.objects import ObjectWork
from selfguide.store.whole import (
    damaged,
    decode_table,
    disk_errors,
    encode_table,
    file_digest,
    last_written,
    read_lines,
    write_rows,
    write_whole,
)

FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""
SHARD_ROWS = 64
TOKEN_COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens")


@dataclass(frozen=True)
class Artifact:
    """What a finished stage hands to the next: where it is, the digest of its rows, and its marker."""

    stage: str
    path: Place
    digest: str
    marker: Mapping[str, Any]

    @property
    def rows_path(self) -> Place:
        return self.path / "rows.parquet"

    def rows(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """All columns, or those that are named: the samples of a row take longer to read than all the rest."""
        return list(decode_table(self.rows_path.read_bytes(), self.rows_path, columns).to_pylist())


class Stage:
    """One stage's folder. Write only inside `with stage.writing():`, which fences off a second writer."""

    def __init__(
        self, name: str, path: AnyPath, made_by: dict[str, Any], inputs: list[str], made: dict[str, float] | None = None
    ) -> None:
        """`made` is told the stage's seconds, by "stage/fingerprint", when it is finished through this object."""
        self.name = name
        self.path: Place = path
        self.fingerprint = path.name
        self._made_by = made_by
        self._inputs = inputs
        self._made = {} if made is None else made
        self._held: DiskWork | ObjectWork | None = None
        self._events: list[dict[str, Any]] = []  # while held: all there are
        self._shards: dict[int, tuple[bytes, pa.Table]] = {}  # while held: what was written or read
        self._verified: tuple[Any, Artifact] | None = None

    @property
    def done(self) -> Artifact | None:
        """The finished stage, or None. Raises `UserError` where its files are not as they were written."""
        try:
            artifact = read_artifact(self.path / "done.json")
        except FileNotFoundError:
            return None
        written = last_written(artifact.rows_path)
        if self._verified != (written, artifact):
            if written is None or file_digest(artifact.rows_path) != artifact.digest:
                raise UserError(damaged(artifact.rows_path, "missing, or not as it was written"))
            self._verified = (written, artifact)
        return artifact

    @property
    def work(self) -> Place:
        return self.path / "work"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Takes the stage's lease; raises `UserError` where another process holds it."""
        held = open_work(self.path)
        epoch = held.take()
        try:
            if (self.path / "done.json").is_file():
                raise StageBusy(f"{self.path}: another process has just finished this stage; run the command again")
            self._held, self._events, self._shards = held, _known(held.events()), {}
            self.log({"event": "begin", "epoch": epoch})
            yield
        finally:
            self._held = None
            held.leave()

    def log(self, event: Mapping[str, Any]) -> None:
        """Adds one line to the stage's events. The death of an engine, on which rests what is tried again, is durable
        when this returns; others outlive a kill of this process on a disk, in an object store with the next shard."""
        line = {"time": time.time(), **event}
        work = self._held or open_work(self.path)
        work.append(line, durable=event["event"] == "engine_died")
        self._events.append(line)

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first; what is left of a torn line is passed over."""
        if self._held:
            return list(self._events)
        path = self.path / "events.jsonl"
        return _known(read_lines(path.read_bytes()) if path.is_file() else open_work(self.path).events())

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
        return [row for _, table in self._read_shards() for row in table.to_pylist()]

    def commit(self, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
        """Writes the shard that begins with `rows[0]`; `row` indexes are contiguous from a multiple of SHARD_ROWS."""
        assert self._held, "not writing"
        table = pa.Table.from_pylist(list(rows), schema=schema)
        content = encode_table(table)
        self._held.write_shard(rows[0]["row"], content)
        self._shards[rows[0]["row"]] = content, table

    def _read_shards(self) -> Iterator[tuple[bytes, pa.Table]]:
        """Each as it lies there, and decoded; what this process wrote is not read again."""
        work, row = self._held or open_work(self.path), 0
        known = self._shards if self._held else {}
        while True:
            if row not in known:
                if (content := work.read_shard(row)) is None:
                    break
                known[row] = content, decode_table(content, work.shard(row))
            yield known[row]
            row += known[row][1].num_rows
            if row % SHARD_ROWS:
                break  # the last shard of a stage may be short

    def finish(
        self, rows: Sequence[Mapping[str, Any]] | AnyPath | None, schema: pa.Schema | None, ledger: Ledger, **facts: Any
    ) -> Artifact:
        """Puts rows, events and marker into place. `rows` None: the committed shards as they are; a path: that of a
        file which is already written in `work`."""
        assert self._held, "not writing"
        self._held.check()
        target = self.path / "rows.parquet"
        events = [*self._events, {"time": time.time(), "event": "end"}]
        with disk_errors(self.path):
            if rows is None:
                digest = self._publish_shards(ledger.candidates, schema)
            elif isinstance(rows, Path | Url):
                digest = _move_file(rows, target)
            else:
                assert schema is not None
                digest = write_rows(target, rows, schema)
        lines = [json.dumps(event, default=str) + "\n" for event in events]
        write_whole(self.path / "events.jsonl", "".join(lines).encode())
        marker = {
            "stage": self.name, "fingerprint": self.fingerprint, "format": FORMAT, "inputs": self._inputs,
            "made_by": self._made_by, "rows_digest": digest, "ledger": ledger.as_dict(),
            "seconds": busy_seconds(events), "finished": time.time(), **facts,
        }  # fmt: skip
        content = encode_marker(marker)
        self._held.check()  # an object store would let this process overwrite its successor's
        write_whole(self.path / "done.json", content)
        self._held.clear()
        self._made[f"{self.name}/{self.fingerprint}"] = marker["seconds"]
        artifact = Artifact(self.name, self.path, digest, json.loads(content))
        self._verified = (last_written(target), artifact)
        return artifact

    def _publish_shards(self, num_rows: int, schema: pa.Schema | None) -> str:
        """Makes the committed shards the stage's rows; one alone is not written again. Returns their digest.

        Shards that were read carry the numbers of Parquet's fields, which the schema has not: without them the file is
        the same whoever wrote which shard.
        """
        assert self._held
        shards = list(self._read_shards())
        found = sum(table.num_rows for _, table in shards)
        assert found == num_rows, f"{found} rows are committed, the ledger has {num_rows}"
        if len(shards) == 1:
            [(content, _)] = shards
            self._held.publish(0, content)
        else:
            tables = [table if schema is None else table.cast(schema) for _, table in shards]
            content = encode_table(pa.concat_tables(tables).combine_chunks())
            write_whole(self.path / "rows.parquet", content)
        return hashlib.sha256(content).hexdigest()


def open_work(stage: AnyPath) -> DiskWork | ObjectWork:
    """The work folder of the stage at that path, as its storage needs it."""
    return ObjectWork(stage) if isinstance(stage, Url) else DiskWork(stage)


def _move_file(source: AnyPath, target: AnyPath) -> str:
    """Returns the digest of what is in place now."""
    if isinstance(source, Path) and isinstance(target, Path):
        source.replace(target)
        return file_digest(target)
    content = source.read_bytes()
    write_whole(target, content)
    return hashlib.sha256(content).hexdigest()


def encode_marker(marker: Mapping[str, Any]) -> bytes:
    """JSON with a line for each key: `json` indents in Python, in ten times the time."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, default=str)}" for key, value in marker.items())
    return f"{{\n{lines}\n}}\n".encode()


def read_artifact(marker: AnyPath) -> Artifact:
    """Raises `FileNotFoundError` where there is no marker, `UserError` for one that is damaged."""
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        _ = [content[key] for key in ("fingerprint", "inputs", "made_by", "ledger", "seconds", "finished")]
        return Artifact(content["stage"], marker.parent, content["rows_digest"], content)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(damaged(marker, f"{type(error).__name__}: {error}")) from error


def _known(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.keys() >= {"event", "time"}]


def busy_seconds(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds between the first and the last event of each process that worked on the stage, added up."""
    total, began, last = 0.0, 0.0, 0.0
    for event in events:
        if event["event"] == "begin":
            total += last - began
            began = event["time"]
        last = event["time"]
    return round(total + last - began, 3)
