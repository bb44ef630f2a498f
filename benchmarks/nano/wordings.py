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
        "if {c} say {l}", "{c} means {l}", "for {c} answer {l}", "when it is {c} write {l}", "call {c} {l}",
        "{c} stands for {l}", "if it is {c} then say {l}", "the word for {c} is {l}", "whenever you see {c} say {l}",
        "{c} is {l}", "{c} {l}", "for a text about {c} choose {l}", "{c} goes with {l}", "use for {c} the {l}",
    ),
    "dev": ("{c} becomes {l}", "on {c} reply {l}", "a {c} one will be {l}", "take {c} as {l}"),
    "test": ("mark {c} as {l}", "{c} should give {l}", "with {c} put {l}", "on seeing {c} go for {l}"),
}  # fmt: skip
"""The value first, then, one to three words on, its label."""
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
