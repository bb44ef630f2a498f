"""The benchmark: held-in and held-out tasks in NI-V2's format. `python -m benchmarks.nano.tasks FOLDER` writes them.

Held out from pretraining are the wordings, the label words, the pairs of operations, for each attribute the genre of
its sentences, and by the hash rule of `world.is_test` every test instance. All choices are made on the held-in tasks,
whose wordings, label words and pairs differ from those of the held-out ones.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
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


def build(name: str, num_instances: int = NUM_INSTANCES) -> dict[str, Any]:
    """The task as an NI-V2 document; deterministic in its name."""
    which = "test" if name in HELD_OUT else "dev"
    spec = (HELD_OUT | HELD_IN)[name]
    rng = random.Random(name)
    pairs = _classified(spec, which, rng, num_instances) if isinstance(spec, Classify) else _transformed(
        spec.made(which), rng, num_instances)  # fmt: skip
    kind = "Text Categorization" if isinstance(spec, Classify) else "Text to Text"
    instruction = spec.instruction(which) if isinstance(spec, Classify) else spec.made(which).instruction
    examples = len(spec.labels) if isinstance(spec, Classify) else 3
    gold, rest = pairs[: max(3, examples)], pairs[max(3, examples) :]
    return {
        "Contributors": ["the selfguide authors"], "Source": ["synthetic"], "URL": [""], "Categories": [kind],
        "Reasoning": [], "Definition": [instruction], "Input_language": ["English"], "Output_language": ["English"],
        "Instruction_language": ["English"], "Domains": ["Synthetic"],
        "Positive Examples": [{"input": x, "output": y, "explanation": ""} for x, y in gold],
        "Negative Examples": [],
        "Instances": [{"id": f"{name}-{i}", "input": x, "output": [y]} for i, (x, y) in enumerate(rest)],
        "Instance License": ["Apache 2.0"],
    }  # fmt: skip


def _classified(spec: Classify, which: str, rng: random.Random, num_instances: int) -> list[tuple[str, str]]:
    """One example of each value first (three at least), then instances with values at random; no text twice."""
    values = rng.sample(list(spec.labels), len(spec.labels))
    values += rng.choices(list(spec.labels), k=num_instances + max(3, len(values)) - len(values))
    texts: dict[str, str] = {}
    for value in values:
        while (text := corpus._text(rng, spec.attribute, value, "sentence", which)) in texts:
            pass
        texts[text] = spec.labels[value]
    return list(texts.items())


def _transformed(made: operations.Transformation, rng: random.Random, num_instances: int) -> list[tuple[str, str]]:
    texts: dict[str, str] = {}
    while len(texts) < num_instances + 3:
        text = corpus.word_list_for(made, rng, test=True)
        texts[text] = made.apply(text)
    return list(texts.items())


def truth(name: str, text: str) -> str | None:
    """The world's own answer to an input of the task; None where the input has none."""
    spec = (HELD_OUT | HELD_IN)[name]
    if isinstance(spec, Transform):
        return spec.made("test" if name in HELD_OUT else "dev").apply(text) or None
    value = world.truth_of(text, spec.attribute)
    return None if value is None else spec.labels[value]


def write(folder: Path) -> list[Path]:
    """All tasks as JSON files, sorted by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json" for name in sorted(HELD_IN | HELD_OUT)]
    for path in paths:
        path.write_text(json.dumps(build(path.stem), indent=1) + "\n")
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]))
