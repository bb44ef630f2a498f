"""The work folder of a stage on a disk: shards that a hard link puts in place, and a lease that one links first."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from engines.files import remove_folder
from selfguide.errors import StageBusy
from selfguide.store.lease import describe_me, heart, lease_alive
from selfguide.store.whole import Journal, disk_errors, write_whole


class DiskWork:
    """A file `lease-<epoch>` names the holder. A holder that is dead, or silent on another host, is succeeded."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage
        self._folder = stage / "work"
        self._journal = Journal(self._folder / "events.jsonl")
        self._epoch = 0

    def take(self) -> int:
        """Takes the lease; returns its epoch. Raises `UserError` where another process holds it."""
        with disk_errors(self._stage):
            try:
                self._stage.mkdir(parents=True)
            except FileExistsError:
                for left_over in self._stage.glob(".*.part"):  # of a process that was killed as it finished
                    left_over.unlink()
            self._folder.mkdir(exist_ok=True)
            last = self.check_free()
            self._epoch = last + 1
            try:
                write_whole(self._lease(last + 1), describe_me(), replace=False, sync=False)
            except FileExistsError:
                message = f"{self._stage}: another process began here at the same moment; run the command again"
                raise StageBusy(message) from None
            if last:
                self._lease(last).unlink(missing_ok=True)
        lease = self._lease(self._epoch)
        heart().start(str(lease), lambda: os.utime(lease))  # not `touch`, which would make it again
        return self._epoch

    def check_free(self) -> int:
        """The last epoch, whose holder has left, is dead or silent; raises `UserError` where it is at work."""
        epoch = _last_epoch(os.listdir(self._folder) if self._folder.is_dir() else ())
        lease = self._lease(epoch)
        if lease.is_file() and lease_alive(lease):
            holder = lease.read_text(encoding="utf-8", errors="replace")
            raise StageBusy(f"{self._stage}: another process is at work here ({holder}); wait for it or end it")
        return epoch

    def check(self) -> None:
        """Raises `UserError` where another process has taken the stage over. It links its own lease first."""
        if not self._lease(self._epoch).exists() or self._lease(self._epoch + 1).exists():
            raise StageBusy(f"{self._stage}: another process has taken this stage over; this one stops")

    def leave(self) -> None:
        """Gives the lease back; its epoch is not used again."""
        lease = self._lease(self._epoch)
        heart().stop(str(lease))
        with suppress(OSError):  # a lease that stays is succeeded, once its holder is dead
            lease.rename(lease.with_name(f"epoch-{self._epoch}"))

    def append(self, event: dict[str, Any], *, durable: bool) -> None:
        self._journal.append(event, durable=durable)

    def events(self) -> list[dict[str, Any]]:
        return self._journal.read()

    def write_shard(self, first_row: int, content: bytes) -> None:
        """Raises `UserError` where it is written already, by whomever."""
        self.check()
        path = self.shard(first_row)
        try:
            write_whole(path, content, replace=False)
        except FileExistsError:
            raise StageBusy(f"{self._stage}: another process has written {path.name}; this one stops") from None

    def read_shard(self, first_row: int) -> bytes | None:
        with suppress(FileNotFoundError):
            return self.shard(first_row).read_bytes()
        return None

    def shard(self, first_row: int) -> Path:
        return self._folder / f"rows-{first_row:08d}.parquet"

    def publish(self, first_row: int, content: bytes) -> None:
        """Makes one shard the stage's rows; it stays in the work folder too, for whoever goes on after a kill."""
        rows = self._stage / "rows.parquet"
        rows.unlink(missing_ok=True)
        os.link(self.shard(first_row), rows)

    def clear(self) -> None:
        remove_folder(self._folder)

    def _lease(self, epoch: int) -> Path:
        return self._folder / f"lease-{epoch}"


def _last_epoch(names: Iterable[str]) -> int:
    """The highest epoch that was ever taken here."""
    parts = (name.partition("-") for name in names)
    return max((int(epoch) for kind, _, epoch in parts if kind in ("lease", "epoch") and epoch.isdecimal()), default=0)
