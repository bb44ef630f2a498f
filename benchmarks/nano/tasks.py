"""The benchmark: held-in and held-out tasks in NI-V2's format. `python -m benchmarks.nano.tasks FOLDER` writes them.

Held out from pretraining are the wordings, the label words, the pairs of operations, for each attribute one genre of
sentences in documents that answer (not in those that write inputs), and by the hash rule of `world.is_test` every test
instance. All choices are made on the held-in tasks, whose wordings, label words and pairs differ from those of the
held-out ones.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.nano import corpus, operations, wordings, world

NUM_INSTANCES = 300


@dataclass(frozen=True)
class Classify:
    """One attribute; labels by value; indices into the wordings of the set."""

    attribute: str
    labels: Mapping[str, str]
    head: int
    item: int
    separator: int = 0
    natural: bool = False

    def instruction(self, which: str) -> str:
        head, item = wordings.HEADS[which][self.head], wordings.ITEMS[which][self.item]
        separator = wordings.SEPARATORS[self.separator]
        return wordings.mapping_instruction(self.attribute, self.labels, head, item, separator, list(self.labels))


@dataclass(frozen=True)
class Transform:
    """A pair of operations and the variant of each phrase."""

    pair: tuple[str, str]
    variants: tuple[int, int] = (0, 0)

    def made(self, which: str) -> operations.Transformation:
        return operations.instruct(self.pair, operations.PAIR_FRAMES[which][0], self.variants)


def _labels(attribute: str, words: str) -> dict[str, str]:
    return dict(zip(world.ATTRIBUTES[attribute], words.split(), strict=True))


def _classify(attribute: str, words: str, head: int, item: int, separator: int = 0) -> Classify:
    return Classify(attribute, _labels(attribute, words), head, item, separator)


HELD_OUT: dict[str, Classify | Transform] = {
    "nano101_size_classification": _classify("size", "anchor beacon", 0, 0),
    "nano102_heat_classification": _classify("heat", "candle dagger", 1, 1, 1),
    "nano103_quality_classification": _classify("quality", "engine flute", 0, 2),
    "nano104_place_classification": _classify("place", "guitar hammer", 1, 3, 2),
    "nano105_animal_classification": _classify("animal", "island jigsaw kettle", 0, 1),
    "nano106_material_classification": _classify("material", "lantern magnet needle", 1, 0, 1),
    "nano107_vehicle_classification": _classify("vehicle", "orbit pepper quartz", 0, 3),
    "nano108_color_classification": _classify("color", "ribbon signal ticket umpire", 1, 2, 1),
    "nano109_person_classification": _classify("person", "violet walrus yonder", 0, 0, 2),
    "nano110_sound_classification": _classify("sound", "zipper beacon", 1, 2),
    **{f"nano12{i}_{'_then_'.join(pair)}": Transform(pair, (i % 2, i // 2 % 2))
       for i, pair in enumerate(operations.HELD_OUT_PAIRS)},
}  # fmt: skip
"""Fixed before the student's long training, and never changed after a score was seen."""

HELD_IN: dict[str, Classify | Transform] = {
    "nano001_speed_classification": _classify("speed", "alpha bravo", 0, 0),
    "nano002_food_classification": _classify("food", "chess dance echo", 1, 1, 1),
    "nano003_color_classification": _classify("color", "flame globe heron ivory", 0, 2),
    "nano004_size_classification": _classify("size", "joker karma", 1, 3, 2),
    "nano005_animal_classification": _classify("animal", "ladle nylon opera", 0, 1, 1),
    "nano006_place_classification": _classify("place", "piano quest", 1, 0),
    **{f"nano02{i}_{'_then_'.join(pair)}": Transform(pair, (i % 2, i // 2 % 2))
       for i, pair in enumerate(operations.HELD_IN_PAIRS)},
}  # fmt: skip


def build(name: str, num_instances: int = NUM_INSTANCES, draw: int = 0) -> dict[str, Any]:
    """The task as an NI-V2 document; `draw` numbers other gold examples for the same instances."""
    which = "test" if name in HELD_OUT else "dev"
    spec = (HELD_OUT | HELD_IN)[name]
    pairs = _pairs(spec, which, random.Random(name), num_instances)
    gold = _pairs(spec, which, random.Random(f"{name} examples {draw}"), 0, avoid=dict(pairs))
    instruction = spec.instruction(which) if isinstance(spec, Classify) else spec.made(which).instruction
    return {
        "Contributors": ["the selfguide authors"], "Source": ["synthetic"], "URL": [""],
        "Categories": ["Text Categorization" if isinstance(spec, Classify) else "Text to Text"], "Reasoning": [],
        "Definition": [instruction],
        "Input_language": ["English"], "Output_language": ["English"], "Instruction_language": ["English"],
        "Domains": ["Synthetic"],
        "Positive Examples": [{"input": x, "output": y, "explanation": ""} for x, y in gold],
        "Negative Examples": [],
        "Instances": [{"id": f"{name}-{i}", "input": x, "output": [y]} for i, (x, y) in enumerate(pairs)],
        "Instance License": ["Apache 2.0"],
    }  # fmt: skip


def _pairs(
    spec: Classify | Transform, which: str, rng: random.Random, count: int, avoid: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """`count` inputs with their outputs, no input twice; for 0, gold examples: three, or one of each label if more."""
    texts: dict[str, str] = {}
    values: list[str] = []
    if isinstance(spec, Classify):
        least = max(3, len(spec.labels)) - len(spec.labels)
        values = rng.choices(list(spec.labels), k=count or least)
        values = values if count else rng.sample([*spec.labels, *values], k=len(spec.labels) + least)
    for index in range(count or max(3, len(values))):
        while not texts or len(texts) == index:
            if isinstance(spec, Classify):
                text = corpus.text_for(rng, spec.attribute, values[index], "sentence", which)
                output = spec.labels[values[index]]
            else:
                made = spec.made(which)
                text = corpus.word_list_for(made, rng, test=True)
                output = made.apply(text)
            if text not in (avoid or {}):
                texts.setdefault(text, output)
    return list(texts.items())


def truth(name: str, text: str) -> str | None:
    """The world's own answer to an input of the task; None where the input has none."""
    spec = (HELD_OUT | HELD_IN)[name]
    if isinstance(spec, Transform):
        return spec.made("test" if name in HELD_OUT else "dev").apply(text) or None
    value = world.truth_of(text, spec.attribute)
    return None if value is None else spec.labels[value]


def write(folder: Path, names: Iterable[str] = tuple(sorted(HELD_IN | HELD_OUT)), draw: int = 0) -> list[Path]:
    """The tasks as JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json" for name in names]
    for path in paths:
        path.write_text(json.dumps(build(path.stem, draw=draw), indent=1) + "\n")
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]))
