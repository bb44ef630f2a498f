"""The pretraining documents: seeded, endless, in the format of selfguide's plain prompts.

A document is token ids and one loss weight per token: 1 for what must be right (answers, copied words, the word of an
input that bears its label), PLAIN for the text of inputs that are to be written, FAINT for the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from benchmarks.nano import operations, tokenizer, wordings, world

FAINT = 0.02
PLAIN = 0.15
Document = tuple[list[int], list[float]]


class _Writer:
    """A document in the making."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.weights: list[float] = []

    def add(self, text: str, weight: float = FAINT) -> None:
        ids = tokenizer.encode(text)
        self.ids += ids
        self.weights += [weight] * len(ids)

    def answer(self, text: str, weight: float = 1.0) -> None:
        """What follows "Output:", and the end of its line."""
        self.add(f" {text}\n", weight)

    def end(self) -> Document:
        """The last line ends with the document."""
        if self.ids[-1] == _NEWLINE:
            return [*self.ids[:-1], 0], self.weights
        return [*self.ids, 0], [*self.weights, FAINT]


_NEWLINE = tokenizer.encode("\n")[0]


# ---- circuits: copy, repeat, recall


@cache
def _all_words() -> tuple[str, ...]:
    return tokenizer.words()


def repeat(rng: random.Random, which: str) -> Document:
    """A run of words, again and again."""
    words = rng.sample(_all_words(), rng.randint(4, 12))
    text = " " + " ".join(words)
    writer = _Writer()
    writer.add(text)
    for _ in range(rng.randint(1, 3)):
        writer.add(text, 1.0)
    return writer.end()


def copy(rng: random.Random, which: str) -> Document:
    """Input lines whose output is the same line."""
    writer = _Writer()
    writer.add("Write the words once again.\n")
    for _ in range(rng.randint(2, 4)):
        line = " ".join(rng.sample(_all_words(), rng.randint(1, 6)))
        writer.add(f"\nInput: {line}\nOutput:")
        writer.answer(line)
    return writer.end()


def recall(rng: random.Random, which: str) -> Document:
    """Pairs of words first, then one of each pair asks for the other."""
    keys = rng.sample(_all_words(), 2 * rng.randint(2, 6))
    pairs = list(zip(keys[::2], keys[1::2], strict=True))
    known = dict(pairs)
    item = rng.choice(wordings.ITEMS["train"]) if rng.random() < 0.5 else random_item(rng, known)
    writer = _Writer()
    writer.add("Name the word: " + ", ".join(item.format(c=key, l=value) for key, value in pairs) + ".\n")
    rng.shuffle(pairs)
    for key, value in pairs:
        writer.add(f"\nInput: {key}\nOutput:")
        writer.answer(value)
    return writer.end()


# ---- classification


def labels_for(rng: random.Random, attribute: str, which: str) -> dict[str, str]:
    """A label for each value: the value itself, or words that are never labels in another set."""
    values = list(world.ATTRIBUTES[attribute])
    if which != "train":
        return dict(zip(values, rng.sample(wordings.LABEL_WORDS[which], len(values)), strict=True))
    if rng.random() < 0.2:
        return dict(zip(values, values, strict=True))
    return dict(zip(values, rng.sample(_label_words(), len(values)), strict=True))


def instruction_for(rng: random.Random, attribute: str, labels: dict[str, str], which: str) -> str:
    """A wording of the set; in pretraining most are made of random words, so that any wording comes to be understood.

    What shows the label in such a one is that the other words are the same for every value.
    """
    if which != "train" or rng.random() < 0.4:
        return wordings.random_instruction(rng, attribute, labels, which)
    order = rng.sample(list(labels), len(labels))
    head = rng.choice(wordings.HEADS["train"])
    if rng.random() < 0.5:
        head = _random_head(rng)
    separator = rng.choice(wordings.SEPARATORS)
    return wordings.mapping_instruction(attribute, labels, head, random_item(rng, labels), separator, order)


def random_item(rng: random.Random, labels: dict[str, str]) -> str:
    """An item of random words, of which up to two stand between value and label."""
    while True:
        before, between, after = rng.randint(0, 3), rng.randint(0, 2), rng.choice((0, 0, 1))
        words = rng.sample(_frame_words(), before + between + after)
        if not {*words} & {*labels, *labels.values()}:
            return " ".join(
                [*words[:before], "{c}", *words[before : before + between], "{l}", *words[before + between :]]
            )


def _random_head(rng: random.Random) -> str:
    words = [*rng.sample(_frame_words(), rng.randint(0, 4)), "{t}"]
    rng.shuffle(words)
    return " ".join([rng.choice(tokenizer.openings()), *words])


@cache
def _label_words() -> tuple[str, ...]:
    """Any word but the kept-out labels, and the words of instructions."""
    return tuple(word for word in _frame_words() if word not in tokenizer.wording_words())


@cache
def _frame_words() -> tuple[str, ...]:
    """Any word but the kept-out labels: a student must not learn that these are never labels."""
    kept_out = {word for labels in wordings.LABEL_WORDS.values() for word in labels}
    return tuple(word for word in _all_words() if word not in kept_out)


def genres_for(attribute: str, which: str) -> tuple[int, ...]:
    absent = world.ABSENT_GENRE[attribute]
    return tuple(g for g in range(3) if g != absent) if which == "train" else (absent,)


def text_for(
    rng: random.Random, attribute: str, value: str, form: str, which: str, genres: tuple[int, ...] | None = None
) -> str:
    """A text that states the value: a word, a phrase or a sentence of one of the genres."""
    if form == "sentence":
        template = rng.choice(world.templates_with(attribute, genres or genres_for(attribute, which)))
        made = world.draw(lambda r: world.fill(template, r, {attribute: value}), rng, test=which != "train")
        return made.text
    word = rng.choice(world.bearers(attribute, value))
    if form == "word":
        return word
    rest = [rng.choice(world.FILLERS) if rng.random() < 0.5 else _other_bearer(rng, attribute)
            for _ in range(rng.randint(1, 4))]  # fmt: skip
    rest.insert(rng.randint(0, len(rest)), word)
    return " ".join(rest)


def _other_bearer(rng: random.Random, attribute: str) -> str:
    other = rng.choice([a for a in world.ATTRIBUTES if a != attribute])
    value = rng.choice(list(world.ATTRIBUTES[other]))
    return rng.choice(world.bearers(other, value))


def classify(form: str, mapped: bool = True) -> Callable[[random.Random, str], Document]:
    """Documents that answer with labels; `mapped`: the instruction says which label stands for what."""

    def document(rng: random.Random, which: str) -> Document:
        attribute = rng.choice(list(world.ATTRIBUTES))
        labels = labels_for(rng, attribute, which)
        writer = _Writer()
        if mapped:
            writer.add(f"{instruction_for(rng, attribute, labels, which)}\n")
        else:
            writer.add(rng.choice(wordings.HEADS[which]).format(t=attribute) + ".\n")
        values = _values(rng, labels, rng.randint(4, 7) if mapped else rng.randint(5, 9))
        for index, value in enumerate(values):
            writer.add(f"\nInput: {text_for(rng, attribute, value, form, which)}\nOutput:")
            known = mapped or value in values[:index]
            writer.answer(labels[value], 1.0 if known else FAINT)
        return writer.end()

    return document


def _values(rng: random.Random, labels: dict[str, str], count: int) -> list[str]:
    """Each value once, in any order, then at random: as demonstrations and then questions would."""
    first = rng.sample(list(labels), len(labels))
    return (first + rng.choices(list(labels), k=count))[: max(count, 2)]


def inputs_for_labels(form: str) -> Callable[[random.Random, str], Document]:
    """Documents that write inputs for a label; the words of an input that bear its value weigh most."""

    def document(rng: random.Random, which: str) -> Document:
        attribute = rng.choice(list(world.ATTRIBUTES))
        labels = labels_for(rng, attribute, which)
        instruction = instruction_for(rng, attribute, labels, which)
        writer = _Writer()
        writer.add(f"{instruction}\n\n{tokenizer.INPUTS_HEADS[0]}\n")
        # Of one genre, which its first inputs show. Any one: only answering in the absent genre is kept out.
        genres = (rng.randrange(3),) if which == "train" else None
        for value in _values(rng, labels, rng.randint(4, 9)):
            writer.add(f"\nOutput: {labels[value]}\nInput:")
            _add_bearing(writer, text_for(rng, attribute, value, form, which, genres), attribute)
        return writer.end()

    return document


def _add_bearing(writer: _Writer, text: str, attribute: str) -> None:
    known = world.values_of_words()
    for word in text.split():
        writer.add(f" {word}", 1.5 if known.get(word, ("",))[0] == attribute else PLAIN)
    writer.add("\n", PLAIN)


# ---- generation


def transform(num_operations: int) -> Callable[[random.Random, str], Document]:
    """Documents of one transformation, with several inputs and outputs."""

    def document(rng: random.Random, which: str) -> Document:
        writer, made = _Writer(), random_transformation(rng, num_operations, which)
        writer.add(f"{made.instruction}\n")
        for _ in range(rng.randint(2, 5)):
            text = word_list_for(made, rng, test=which != "train")
            writer.add(f"\nInput: {text}\nOutput:")
            writer.answer(made.apply(text))
        return writer.end()

    return document


def random_transformation(rng: random.Random, num_operations: int, which: str) -> operations.Transformation:
    variants = [rng.randrange(2) for _ in range(num_operations)]
    if num_operations == 1:
        return operations.instruct(
            (rng.choice(list(operations.OPERATIONS)),), rng.choice(operations.SINGLE_FRAMES), variants
        )
    pairs = {"train": operations.TRAIN_PAIRS, "dev": operations.HELD_IN_PAIRS, "test": operations.HELD_OUT_PAIRS}
    return operations.instruct(rng.choice(pairs[which]), rng.choice(operations.PAIR_FRAMES[which]), variants)


def word_list_for(made: operations.Transformation, rng: random.Random, *, test: bool) -> str:
    """A list that the transformation leaves something of, and mostly changes."""
    while True:
        text = world.draw(world.word_list, rng, test=test).text
        output = made.apply(text)
        if output and (output != text or rng.random() < 0.15):
            return text


def inputs_for_lists(rng: random.Random, which: str) -> Document:
    """Inputs alone, one after another."""
    made = random_transformation(rng, rng.choice((1, 2, 2)), which)
    writer = _Writer()
    writer.add(f"{made.instruction}\n\n{tokenizer.INPUTS_HEADS[1]}\n")
    for _ in range(rng.randint(4, 10)):
        writer.add("\nInput:")
        writer.answer(word_list_for(made, rng, test=which != "train"), PLAIN)
    return writer.end()


KINDS: dict[str, Callable[[random.Random, str], Document]] = {
    "repeat": repeat, "copy": copy, "recall": recall,
    "words": classify("word", mapped=False), "mapped_words": classify("word"),
    "mapped_phrases": classify("phrase"), "mapped_sentences": classify("sentence"),
    "inputs_words": inputs_for_labels("word"), "inputs_phrases": inputs_for_labels("phrase"),
    "inputs_sentences": inputs_for_labels("sentence"),
    "single": transform(1), "pair": transform(2), "inputs_lists": inputs_for_lists,
}  # fmt: skip
