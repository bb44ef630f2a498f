"""Files by path or by URL: the only home of PyArrow's file systems.

A `Url` is to an object store what `pathlib.Path` is to a disk, as far as run folders and adapters need it. Objects are
immutable and appear whole. Credentials are what PyArrow finds in the environment; none are read or kept here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from engines.types import UserError

_SCHEMES = {"s3": "s3", "gs": "gs", "gcs": "gs"}
_OPTIONS = {"region", "scheme", "endpoint_override", "tls_ca_file_path", "project_id", "retry_limit_seconds"}
"""What a URL may say of its store; none of it is secret."""
_BLOCK_BYTES = 8 << 20
_REMEDIES = (
    (r"NO_SUCH_BUCKET|bucket does not exist", "there is no such bucket", "make it, or name another"),
    (
        r"ACCESS_DENIED|SIGNATURE|ACCESS_KEY|CLIENT_TOKEN|EXPIRED_TOKEN|UNAUTHENTICATED|PERMISSION_DENIED|OAuth|\b40[13]\b",
        "the store refuses access",
        "give this process credentials that may list, read, write and delete there",
    ),
    (
        r"NETWORK_CONNECTION|curlCode|REQUEST_TIMEOUT|UNAVAILABLE|DEADLINE_EXCEEDED",
        "the store does not answer",
        "check endpoint_override and the network, then run the same command again",
    ),
)


@dataclass(frozen=True, order=True)
class Url:
    """A file or folder in an object store. Its methods do what those of `pathlib.Path` of the same names do."""

    scheme: str
    path: str
    """Bucket and key."""
    query: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" + (f"?{self.query}" if self.query else "")

    def __truediv__(self, name: str | Path) -> Url:
        return Url(self.scheme, f"{self.path}/{name}", self.query)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.scheme, self.path.rpartition("/")[0], self.query)

    @property
    def parents(self) -> tuple[Url, ...]:
        return (self.parent, *self.parent.parents) if "/" in self.path else ()

    def with_name(self, name: str) -> Url:
        return self.parent / name

    def resolve(self) -> Url:
        return self

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """An object store has no folders to make."""

    def is_file(self) -> bool:
        with suppress(FileNotFoundError), _store(self) as store:
            store.open_input_file(self.path).close()  # one request, where asking for its type takes two
            return True
        return False

    def is_dir(self) -> bool:
        return next(self.iterdir(), None) is not None

    @property
    def modified(self) -> tuple[int, int] | None:
        """When the object was written (nanoseconds, the store's clock) and its bytes; None where there is none."""
        with _store(self) as store:
            info = store.get_file_info(self.path)
        return (info.mtime_ns, info.size) if info.is_file else None

    def read_bytes(self) -> bytes:
        with _store(self) as store, store.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes) -> None:
        """One PUT, or one upload in parts; whole or not there."""
        with _store(self) as store:
            stream = store.open_output_stream(self.path)
            stream.write(content)
            stream.close()

    def unlink(self, *, missing_ok: bool = False) -> None:
        try:
            with _store(self) as store:
                store.delete_file(self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def iterdir(self) -> Iterator[Url]:
        for info in self.infos(recursive=False):
            yield Url(self.scheme, info.path, self.query)

    def glob(self, pattern: str) -> Iterator[Url]:
        """Files and folders whose path below this one fits, part by part."""
        wanted, depth, seen = pattern.split("/"), len(self.path) + 1, set[str]()
        for info in self.infos(recursive=len(wanted) > 1):
            parts = info.path[depth:].split("/")
            if len(parts) < len(wanted):
                continue
            found = "/".join(parts[: len(wanted)])
            if found not in seen and all(map(fnmatchcase, parts, wanted)):
                seen.add(found)
                yield self / found

    def infos(self, *, recursive: bool = True) -> list[Any]:
        """What lies below, in the order of the paths: PyArrow's `FileInfo`s. Empty where nothing does."""
        from pyarrow.fs import FileSelector

        with _store(self) as store:
            return sorted(
                store.get_file_info(FileSelector(self.path, recursive=recursive, allow_not_found=True)),
                key=lambda info: str(info.path),
            )


AnyPath: TypeAlias = Path | Url
Place: TypeAlias = Any
"""An `AnyPath`, for those who know which: a union would have each of them say so at every use."""


def locate(place: str | AnyPath) -> AnyPath:
    """A local path or a `Url`; raises `UserError` for what is neither, and for secrets in a URL."""
    if not isinstance(place, str) or "://" not in place:
        return Path(place) if isinstance(place, str) else place
    parts = urlsplit(place)
    scheme = _SCHEMES.get(parts.scheme)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if parts.scheme == "file" and not parts.netloc:
        return Path(parts.path)
    if scheme is None:
        raise UserError(f"{shown}: unknown kind of URL; name a folder, s3://bucket/folder or gs://bucket/folder")
    if "@" in parts.netloc:
        raise UserError(f"{shown}: a URL must not hold credentials; put them into the environment")
    if unknown := sorted({key for key, _ in parse_qsl(parts.query, keep_blank_values=True)} - _OPTIONS):
        raise UserError(f"{shown}: unknown option {unknown[0]}; a URL may have {', '.join(sorted(_OPTIONS))}")
    key = re.sub("/+", "/", parts.path).strip("/")
    if not parts.netloc or not key:
        raise UserError(
            f"{shown}: names no {'folder in the ' if parts.netloc else ''}bucket; write {scheme}://bucket/folder"
        )
    return Url(scheme, f"{parts.netloc}/{key}", parts.query)


def cache_folder() -> Path:
    """This node's own: what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfguide"


def is_file(path: AnyPath) -> bool:
    """False too for a name that is too long for a file, at which `Path.is_file` raises."""
    with suppress(OSError):
        return path.is_file()
    return False


def is_folder(path: AnyPath) -> bool:
    """As `is_file`."""
    with suppress(OSError):
        return path.is_dir()
    return False


def list_folders(folder: AnyPath) -> list[AnyPath]:
    """The folders in a folder, by name."""
    if isinstance(folder, Url):
        return [folder / info.base_name for info in folder.infos(recursive=False) if not info.is_file]
    return sorted(path for path in folder.glob("*") if path.is_dir())


def folder_bytes(folder: AnyPath) -> int:
    if isinstance(folder, Url):
        return sum(info.size for info in folder.infos() if info.is_file)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_folder(folder: AnyPath) -> None:
    """Missing is removed."""
    if not isinstance(folder, Url):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError), _store(folder) as store:
        store.delete_dir(folder.path)


def move_folder(source: AnyPath, target: AnyPath) -> None:
    """A rename; in an object store each object is copied there, and only then are the old ones removed."""
    if isinstance(source, Path) and isinstance(target, Path):
        source.rename(target)
        return
    assert isinstance(source, Url)
    assert isinstance(target, Url)
    for info in source.infos():
        if info.is_file:
            with _store(source) as store:
                store.copy_file(info.path, target.path + info.path[len(source.path) :])
    remove_folder(source)


def fetch_folder(source: Url, target: Path) -> None:
    """Copies what lies in a folder of a store into a new local folder."""
    target.mkdir(parents=True)
    for info in source.infos():
        path = target / info.path[len(source.path) + 1 :]
        if info.is_file:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _store(source) as store, store.open_input_stream(info.path) as stream, path.open("wb") as file:
                shutil.copyfileobj(stream, file, _BLOCK_BYTES)


def send_folder(source: Path, target: Url, *, last: str = "") -> None:
    """Copies what lies in a local folder into a store; the file named `last`, the marker, after all others."""
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path.name == last):
        with _store(target) as store, path.open("rb") as file:
            stream = store.open_output_stream(f"{target.path}/{path.relative_to(source)}")
            shutil.copyfileobj(file, stream, _BLOCK_BYTES)
            stream.close()


@cache
def _file_system(scheme: str, bucket: str, query: str) -> Any:
    from pyarrow.fs import FileSystem

    options = [query] if query else []
    if scheme == "s3":
        options.append("allow_delayed_open=true")  # a small object is one request
    return FileSystem.from_uri(f"{scheme}://{bucket}?{'&'.join(options)}")[0]


@contextmanager
def _store(url: Url) -> Iterator[Any]:
    """The file system of a URL. What it refuses is one line with a remedy; a missing object `FileNotFoundError`."""
    from pyarrow import ArrowException

    try:
        yield _file_system(url.scheme, url.path.partition("/")[0], url.query)
    except FileNotFoundError:
        raise
    except (OSError, ArrowException) as error:
        said = " ".join(str(error).split())
        known = next((rest for pattern, *rest in _REMEDIES if re.search(pattern, said)), None)
        what, remedy = known or (said[:200], "see what is wrong with it, then run the same command again")
        raise UserError(f"{url}: {what}; {remedy}") from error
