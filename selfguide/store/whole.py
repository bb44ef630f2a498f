"""Files that appear whole or not at all, on a disk or in an object store."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engines.files import AnyPath, Url
from selfguide.errors import UserError

_AT_ONCE = 16
"""Objects that are read side by side: each takes a store's answer time, not this machine's."""


def write_whole(path: AnyPath, content: bytes, *, replace: bool = True, sync: bool = True) -> None:
    """Beside, to the disk (`sync`), then in place; to an object store in one PUT.

    On a disk an existing file raises `FileExistsError` with `replace=False`; an object store knows no such condition.
    """
    if isinstance(path, Url):
        path.write_bytes(content)
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        try:
            with beside.open("wb") as file:
                file.write(content)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            if replace:
                beside.replace(path)
                return
            os.link(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        beside.unlink()


@contextmanager
def disk_errors(path: AnyPath) -> Iterator[None]:
    """What a disk refuses, the user can mend; a file that is there already is the caller's business."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        remedy = "free space or choose another --out, then run the same command again"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error


def write_rows(path: AnyPath, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> str:
    """Rows as Parquet; returns the file's digest."""
    content = encode_table(pa.Table.from_pylist(list(rows), schema=schema))
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def encode_table(table: pa.Table) -> bytes:
    """Parquet, zstd-compressed; equal tables are equal bytes. Dictionaries and statistics cost more than they save."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue().to_pybytes())


def decode_table(content: bytes, path: AnyPath, columns: Sequence[str] | None = None) -> pa.Table:
    """Raises `UserError` where `content`, which is that of `path`, is no whole Parquet file."""
    with _parquet(path):
        return pq.ParquetFile(pa.BufferReader(content)).read(columns=columns, use_threads=False)


@contextmanager
def _parquet(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(damaged(path, " ".join(str(error).split())[:200])) from error


def damaged(path: AnyPath, how: str) -> str:
    """Of a file that was whole once; the stage's folder is made again where it is not there."""
    folder = path.parent.parent if path.parent.name == "work" else path.parent
    return f"{path}: is damaged ({how}); move {folder} away, then run the same command to make it again"


def file_digest(path: AnyPath) -> str:
    if isinstance(path, Url):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_written(path: AnyPath) -> tuple[int, int] | None:
    """When the file was written and its bytes, which change with its content; None where there is none."""
    if isinstance(path, Url):
        return path.modified
    with suppress(OSError):
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_size
    return None


class Journal:
    """Lines of JSON that are added to one file; in an object store, small numbered objects in a folder of its name.

    `writer` sorts the objects of one writer behind those of earlier ones; by default, by the time.
    """

    def __init__(self, path: AnyPath, writer: str = "") -> None:
        self.path = path
        self._writer = writer or f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._count = 0
        self._waiting = b""

    def append(self, record: Mapping[str, Any], *, durable: bool = True) -> None:
        """One line. It outlives the machine when this returns; with `durable=False`, when the next durable one has
        been added or `flush` was called, though on a disk it outlives this process at once."""
        line = json.dumps(record, default=str).encode() + b"\n"
        if isinstance(self.path, Url):
            self._waiting += line
            if durable:
                self.flush()
            return
        with disk_errors(self.path), self.path.open("ab+") as file:
            if not self._count and file.tell() and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                line = b"\n" + line  # behind what a process that died here, or a full disk, has left of a line
            self._count = 0  # of a line that a full disk takes half of, too
            file.write(line)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        self._count = 1

    def flush(self) -> None:
        """Writes what waits to an object store."""
        if self._waiting:
            (self.path / f"{self._writer}-{self._count:06d}.jsonl").write_bytes(self._waiting)
            self._count, self._waiting = self._count + 1, b""

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first; what is left of a torn line is passed over."""
        if isinstance(self.path, Url):
            objects = list(self.path.glob("*.jsonl"))
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                return read_lines(b"".join(pool.map(Url.read_bytes, objects)))
        return read_lines(self.path.read_bytes()) if self.path.is_file() else []


def read_lines(content: bytes) -> list[dict[str, Any]]:
    records = []
    for line in content.splitlines():
        with suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
