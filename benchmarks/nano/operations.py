"""What generation tasks do to a list of words: operations, their phrases, and the pairs that are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.nano import world

Words = Sequence[str]


def _opposite(words: Words) -> list[str]:
    return [world.opposites().get(word, word) for word in words]


def _plural(words: Words) -> list[str]:
    return [world.plurals().get(word, word) for word in words]


def _kind(words: Words) -> list[str]:
    known = world.values_of_words()
    return [known[word][1] if known.get(word, ("",))[0] == "animal" else word for word in words]


def _no_colors(words: Words) -> list[str]:
    known = world.values_of_words()
    return [word for word in words if known.get(word, ("",))[0] != "color"]


OPERATIONS: dict[str, tuple[Callable[[Words], list[str]], tuple[str, ...]]] = {
    "reverse": (lambda w: list(w[::-1]), ("reverse the order of the words", "write the words backwards")),
    "drop_first": (lambda w: list(w[1:]), ("drop the first word", "leave out the word at the front")),
    "drop_last": (lambda w: list(w[:-1]), ("drop the last word", "leave out the word at the end")),
    "swap_ends": (lambda w: [w[-1], *w[1:-1], w[0]] if len(w) > 1 else list(w),
                  ("swap the first and the last word", "exchange the words at both ends")),
    "double_first": (lambda w: [*w[:1], *w], ("write the first word twice", "double the word at the front")),
    "double_last": (lambda w: [*w, *w[-1:]], ("write the last word twice", "double the word at the end")),
    "rotate": (lambda w: [*w[1:], *w[:1]], ("move the first word to the end", "put the front word last")),
    "opposite": (_opposite, ("replace words with their opposites", "turn each quality into its opposite")),
    "plural": (_plural, ("make animals and vehicles plural", "write animals and vehicles as many")),
    "kind": (_kind, ("replace animals with their kind", "name the kind of each animal")),
    "no_colors": (_no_colors, ("drop all colors", "leave out each color")),
}  # fmt: skip

PAIRS = tuple((one, two) for one in OPERATIONS for two in OPERATIONS if one != two)

HELD_OUT_PAIRS = (
    ("reverse", "opposite"), ("opposite", "drop_first"), ("plural", "swap_ends"), ("double_first", "kind"),
    ("rotate", "plural"), ("drop_last", "reverse"), ("kind", "double_last"), ("no_colors", "rotate"),
)  # fmt: skip
HELD_IN_PAIRS = (
    ("reverse", "plural"), ("swap_ends", "opposite"), ("rotate", "kind"), ("opposite", "double_first"),
    ("drop_first", "plural"), ("kind", "drop_last"),
)  # fmt: skip

_KEPT_OUT = {frozenset(pair) for pair in (*HELD_OUT_PAIRS, *HELD_IN_PAIRS)}
TRAIN_PAIRS = tuple(pair for pair in PAIRS if frozenset(pair) not in _KEPT_OUT)
"""Neither order of a kept-out pair is in the pretraining text."""

PAIR_FRAMES = {
    "train": ("{A}, then {b}.", "First {a}. Then {b}.", "{A} and {b}.", "{A}. Now {b}."),
    "dev": ("{A}; after that {b}.",),
    "test": ("Two steps: {a}; next {b}.",),
}
SINGLE_FRAMES = ("{A}.", "Please {a}.")


@dataclass(frozen=True)
class Transformation:
    """One or two operations in order, and the instruction that asks for them."""

    names: tuple[str, ...]
    instruction: str

    def apply(self, text: str) -> str:
        words: Words = text.split()
        for name in self.names:
            words = OPERATIONS[name][0](words)
        return " ".join(words)


def instruct(names: tuple[str, ...], frame: str, variants: Sequence[int]) -> Transformation:
    """The instruction in a frame, each operation by the chosen variant of its phrases."""
    phrases = [OPERATIONS[name][1][variant] for name, variant in zip(names, variants, strict=True)]
    a, b = phrases[0], phrases[-1]
    return Transformation(names, frame.format(a=a, b=b, A=a[0].upper() + a[1:]))
