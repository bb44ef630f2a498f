"""How classification tasks are worded: label words and frames, in three sets that share nothing.

"train" is pretraining text; "dev" is for the held-in tasks, on which every choice is made; "test" for the held-out
ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

LABEL_WORDS = {
    "dev": (
        "alpha bravo chess dance echo flame globe heron ivory joker karma ladle nylon opera piano quest radar "
        "salsa tempo umber vapor waltz yodel zebra"
    ).split(),
    "test": (
        "anchor beacon candle dagger engine flute guitar hammer island jigsaw kettle lantern magnet needle orbit "
        "pepper quartz ribbon signal ticket umpire violet walrus yonder zipper"
    ).split(),
}  # fmt: skip
"""Never a label in pretraining, where any other word of the vocabulary may be one."""

HEADS = {
    "train": (
        "Judge the {t}", "Look at the {t} in the text", "Read the text and tell the {t}", "Consider the {t}",
        "Find the {t} and name it", "Tell which {t} it is", "Name the {t}", "The question is about the {t}",
    ),
    "dev": ("Classify the text by {t}", "Check the {t}"),
    "test": ("Sort each text by its {t}", "Your job is to rate the {t}"),
}  # fmt: skip

ITEMS = {
    "train": (
        "if {c} say {l}", "say {l} if {c}", "{c} means {l}", "answer {l} for {c}", "for {c} answer {l}",
        "write {l} when it is {c}", "when it is {c} write {l}", "{l} stands for {c}", "call {c} {l}", "use {l} for {c}",
        "{c} is {l}", "if it is {c} then the answer is {l}", "the answer is {l} if it is {c}",
        "the word for {c} is {l}", "say {l} whenever you see {c}", "whenever you see {c} you say {l}", "{l} means {c}",
        "choose {l} for a text about {c}", "for a text about {c} choose {l}",
    ),
    "dev": ("reply {l} to {c}", "{c} becomes {l}", "return {l} in case of {c}", "with {c} the output will be {l}"),
    "test": ("mark {c} as {l}", "put {l} where it is {c}", "{c} should give {l}", "go for {l} on seeing {c}"),
}  # fmt: skip
SEPARATORS = (", ", "; ", " and ")


def mapping_instruction(
    attribute: str, labels: Mapping[str, str], head: str, item: str, separator: str, order: Sequence[str]
) -> str:
    """The instruction that names the attribute and gives each value its label, in the order of `order`."""
    items = separator.join(item.format(c=value, l=labels[value]) for value in order)
    return f"{head.format(t=attribute)}: {items}."


def random_instruction(rng: random.Random, attribute: str, labels: Mapping[str, str], which: str) -> str:
    """A wording of one of the three sets, its parts drawn at random."""
    order = list(labels)
    rng.shuffle(order)
    head, item, separator = rng.choice(HEADS[which]), rng.choice(ITEMS[which]), rng.choice(SEPARATORS)
    return mapping_instruction(attribute, labels, head, item, separator, order)
