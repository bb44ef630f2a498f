"""What a method is given: the task, the recipe, and the means to carry it out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cluster.transforms import Transforms
from selfguide.config import Filters, Recipe
from selfguide.filters import Context
from selfguide.prompts import VERSION, Prompts
from selfguide.protocols import test_instances, validation_instances
from selfguide.records import row_id, row_seed
from selfguide.store import Stage, TaskStore
from selfguide.tasks import Instance, Task

if TYPE_CHECKING:
    from cluster.pool import Pool
    from cluster.trainers import Trainers
    from engines.tokenizer import Tokenizer

Progress = Callable[[str, str, dict[str, Any]], None]
"""Hears (task, stage, counts) whenever a stage has got on."""


@dataclass(frozen=True)
class Student:
    """The untuned student: its folder, who it is, and how it is spoken to."""

    folder: str
    digest: str
    tokenizer: Tokenizer
    chat: bool
    max_model_len: int


@dataclass(frozen=True)
class TaskRun:
    """One task under one recipe. Cheap to make; holds no rows."""

    task: Task
    recipe: Recipe
    student: Student
    pool: Pool
    trainers: Trainers
    store: TaskStore
    progress: Progress = lambda task, stage, counts: None
    transforms: Transforms = field(default_factory=Transforms)
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.task, self.student.tokenizer, self.student.max_model_len, chat=self.student.chat)

    @property
    def is_classification(self) -> bool:
        return self.task.kind == "classification" and len(self.task.labels) > 1

    @property
    def is_english(self) -> bool:
        """The official cross-lingual track is every task with another language on either side."""
        return self.task.input_language == self.task.output_language == "English"

    @property
    def is_calibrated(self) -> bool:
        """Whether outputs are labels elected over the whole set; generation tasks are sampled in either mode."""
        return self.recipe.annotation.mode == "calibrated" and self.is_classification

    @property
    def target_rows(self) -> int | None:
        """Pairs at which synthesis stops; None where all candidates are tried, as calibration demands."""
        return None if self.is_calibrated else self.recipe.synthesis.target_rows

    @property
    def filters(self) -> Filters:
        """The recipe's chains, with the additions for classification where they apply."""
        filters, more = self.recipe.filters, self.recipe.filters.classification
        if not self.is_classification:
            return filters
        chains = {name: (*getattr(filters, name), *getattr(more, name)) for name in ("samples", "pairs", "sets")}
        return filters.model_copy(update=chains)

    @cached_property
    def evaluation_instances(self) -> tuple[Instance, ...]:
        return test_instances(self.task, self.recipe.evaluation, self.recipe.seed)

    @cached_property
    def validation_instances(self) -> tuple[Instance, ...]:
        """What a search may look at; none of them is a test row."""
        return validation_instances(self.task, self.recipe.evaluation, self.recipe.seed)

    @property
    def num_demonstrations(self) -> int | None:
        """Gold examples in the prompts of base and tuned student; None is all."""
        count = self.recipe.evaluation.demonstrations
        return None if count == "all" else count

    def context(self, side: str) -> Context:
        """What the filters may know, for judging inputs ("input") or outputs ("output")."""
        texts = tuple(getattr(example, side) for example in self.task.examples)
        return Context(
            gold_texts=texts,
            gold_tokens=tuple(map(len, self.student.tokenizer.encode_many(texts))),
            gold_inputs=tuple(example.input for example in self.task.examples),
            evaluation_inputs=tuple(instance.input for instance in self.task.instances),
            labels=self.task.labels,
            seed=self.recipe.seed,
            label_tokens=tuple(map(len, self.student.tokenizer.encode_many(self.task.labels))),
        )

    def made_by(self, version: int, **config: Any) -> dict[str, Any]:
        """What every stage that speaks to the student depends on, beside its own config."""
        common = {
            "task": self.task.digest,
            "model": self.student.digest,
            "prompts": VERSION,
            "chat": self.student.chat,
            "dtype": self.recipe.model.dtype,
        }
        return {**common, "seed": self.recipe.seed, "context": self.student.max_model_len, "version": version, **config}

    def row_id(self, stage: Stage, row: int) -> str:
        return row_id(self.task.name, stage.name, stage.fingerprint, row)

    def row_seed(self, purpose: str, row: int) -> int:
        return row_seed(self.recipe.seed, self.task.digest, purpose, row)

    def report(self, stage: str, **counts: Any) -> None:
        self.progress(self.task.name, stage, counts)

    def lock(self, stage: Stage) -> asyncio.Lock:
        """Methods of one run may want the same stage at the same time: the first one makes it."""
        return self._locks.setdefault(str(stage.path), asyncio.Lock())


def chosen(section: Any) -> dict[str, Any]:
    """A recipe section as the fingerprint sees it."""
    return dict(section.model_dump(mode="json"))
