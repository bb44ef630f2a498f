"""What a stage costs its process beside its rows: CPU and wall time of taking, writing and finishing it.

    python benchmarks/bench_store.py --out FOLDER_OR_URL --stages 100

Each stage has one shard of synthesis rows. The folder should be new.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from engines.files import locate
from selfguide.records import Ledger
from selfguide.store import SHARD_ROWS, RunStore
from selfguide.synthesis import SCHEMA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", required=True)
    parser.add_argument("--stages", type=int, default=100)
    options = parser.parse_args()
    store = RunStore(locate(options.out))
    write_stage(store, -1)  # what is loaded with the first
    cpu, wall = time.process_time(), time.perf_counter()
    for number in range(options.stages):
        write_stage(store, number)
    spent = {"cpu_ms": time.process_time() - cpu, "wall_ms": time.perf_counter() - wall}
    print(json.dumps({name: round(1000 * seconds / options.stages, 2) for name, seconds in spent.items()}))


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
