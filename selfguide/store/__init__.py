"""The run folder: `tasks/<task>/<stage>/<fingerprint>/`, shards while a stage runs, three files when it is done.

A stage's fingerprint covers what made it: its config, its version, the model's digest and its inputs' digests. Methods
that share a stage share its folder, and nothing is ever overwritten. Rows are written in shards of fixed ranges of row
index, each an immutable file that appears whole; a kill costs what is in flight and one open shard. The marker
`done.json` comes last. The folder may be on a disk (`disk`) or in an object store (`objects`).
"""

from selfguide.store.lease import leases
from selfguide.store.runs import RunStore, TaskStore
from selfguide.store.stages import FORMAT, SHARD_ROWS, TOKEN_COUNTS, Artifact, Stage, busy_seconds
from selfguide.store.whole import Journal, write_rows, write_whole

__all__ = [
    "FORMAT", "SHARD_ROWS", "TOKEN_COUNTS", "Artifact", "Journal", "RunStore", "Stage", "TaskStore", "busy_seconds",
    "leases", "write_rows", "write_whole",
]  # fmt: skip
