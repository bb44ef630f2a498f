"""What a stage costs its process beside its rows: CPU and wall time of taking, writing and finishing it.

    python -m benchmarks.bench_store [--quick] [--out FOLDER_OR_URL] [--stages 100] > store.json

Each stage has one shard of synthesis rows. Beside each repeat the same rows are written as bare Parquet, each file
synced and renamed, into a local folder: the ratio is ours over that.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ratio import emit, ratio, spread
from engines.files import locate
from selfguide.records import Ledger
from selfguide.store import SHARD_ROWS, RunStore
from selfguide.synthesis import SCHEMA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a new folder; a temporary one where none is named")
    parser.add_argument("--stages", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="20 stages")
    args = parser.parse_args()
    args.stages = min(args.stages, 20) if args.quick else args.stages
    with tempfile.TemporaryDirectory(prefix="selfguide-store-") as folder:
        store = RunStore(locate(args.out or f"{folder}/runs"))
        write_stage(store, 0)  # what is loaded with the first
        write_bare(Path(folder), 0)
        ours, bare = [], []
        for repeat in range(args.repeats):
            numbers = range(1 + repeat * args.stages, 1 + (repeat + 1) * args.stages)
            ours.append(measure(numbers, lambda number: write_stage(store, number)))
            bare.append(measure(numbers, lambda number: write_bare(Path(folder), number)))
    ratios = {"stage_over_bare_write": ratio([a["wall_ms"] / b["wall_ms"] for a, b in zip(ours, bare, strict=True)])}
    each = {name: spread([one[name] for one in ours]) for name in ours[0]}
    emit(
        "store", vars(args), ratios, stage=each, bare_write={name: spread([one[name] for one in bare]) for name in each}
    )


def measure(numbers: range, write: Callable[[int], None]) -> dict[str, float]:
    """Milliseconds for each."""
    cpu, wall = time.process_time(), time.perf_counter()
    for number in numbers:
        write(number)
    spent = {"cpu_ms": time.process_time() - cpu, "wall_ms": time.perf_counter() - wall}
    return {name: 1000 * seconds / len(numbers) for name, seconds in spent.items()}


def write_bare(folder: Path, number: int) -> None:
    part = folder / f"bare-{number}.part"
    pq.write_table(pa.Table.from_pylist([make_row(i) for i in range(SHARD_ROWS)], SCHEMA), part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(part.with_suffix(".parquet"))


def write_stage(store: RunStore, number: int) -> None:
    stage, rows = (
        store.task(f"task{number}").stage("synthesis", {"seed": number}),
        [make_row(i) for i in range(SHARD_ROWS)],
    )
    assert stage.done is None
    with stage.writing():
        stage.suspects()
        stage.commit(rows, SCHEMA)
        stage.log({"event": "shard", "rows": SHARD_ROWS})
        stage.finish(None, SCHEMA, Ledger.of(rows), **stage.tokens())
    assert stage.done is not None


def make_row(row: int) -> dict[str, Any]:
    sample = {"text": f"answer {row}", "finish_reason": "stop", "tokens": 4, "logprob": -1.0}
    known = {"row": row, "id": f"{row:016x}", "state": "accepted", "label": "a", "demonstrations": [1, 2, 3]}
    text = {"input": f"an input of some length, number {row}; " * 4, "tokens": 30, "finish_reason": "stop"}
    return {**dict.fromkeys(SCHEMA.names), **known, **text, "samples": [sample] * 4}


if __name__ == "__main__":
    main()
