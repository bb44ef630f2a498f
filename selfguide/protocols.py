"""The named evaluation protocols: which of a task's instances are test rows, and which are left for validation.

- "official" (Super-NaturalInstructions): the first `evaluation.num_instances` are test rows, with all references; the
  `evaluation.num_validation` behind them may serve as validation.
- "authors" (SELF-GUIDE): a tenth of the whole list is validation, the rest is test; for classification both have the
  list's shares of each label; the first reference alone counts. The authors' shuffle had no seed; here it follows from
  the recipe's seed and the task's name.

Validation and test rows are disjoint under either. Rows keep the order of the file, and none is ever dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from selfguide.config import Evaluation
from selfguide.records import row_seed
from selfguide.tasks import Instance, Task


def test_instances(task: Task, evaluation: Evaluation, seed: int) -> tuple[Instance, ...]:
    """The rows that scores are reported on. Under "authors" each has one reference, the first."""
    if evaluation.protocol == "official":
        return task.instances[: evaluation.num_instances]
    held = _validation_rows(task, seed)
    return tuple(_first_reference(row) for index, row in enumerate(task.instances) if index not in held)


def validation_instances(task: Task, evaluation: Evaluation, seed: int) -> tuple[Instance, ...]:
    """The rows that a search may look at, none of which is a test row; there may be none."""
    if evaluation.protocol == "official":
        first = evaluation.num_instances
        return task.instances[first : first + evaluation.num_validation]
    return tuple(_first_reference(task.instances[index]) for index in sorted(_validation_rows(task, seed)))


def _first_reference(row: Instance) -> Instance:
    return replace(row, references=row.references[:1])


def _validation_rows(task: Task, seed: int) -> set[int]:
    """A tenth of the rows, rounded down, as in the authors' sizes (709 instances: 70 and 639)."""
    strata: dict[str, list[int]] = {}
    for index in sorted(range(len(task.instances)), key=lambda index: row_seed(seed, task.name, "split", index)):
        label = task.instances[index].references[0].strip() if task.kind == "classification" else ""
        strata.setdefault(label, []).append(index)
    quotas = _apportion(strata, len(task.instances) // 10)
    return {index for label, rows in strata.items() for index in rows[: quotas[label]]}


def _apportion(strata: Mapping[str, Sequence[int]], total: int) -> dict[str, int]:
    """`total` rows over the strata in proportion to their sizes; those of largest remainder get one more."""
    num_rows = sum(map(len, strata.values()))
    shares = {label: divmod(len(rows) * total, num_rows) for label, rows in strata.items()}
    quotas = {label: whole for label, (whole, _) in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (-shares[label][1], label))
    for label in by_remainder[: total - sum(quotas.values())]:
        quotas[label] += 1
    return quotas
