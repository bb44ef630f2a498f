"""The synthetic world, its tasks and its corpus: what is held out is held out, and the tokenizers agree."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.nano import corpus, operations, tasks, tokenizer, wordings, world
from selfguide.tasks import load_task

NAMES = sorted(tasks.HELD_IN | tasks.HELD_OUT)


def texts_of(document: corpus.Document) -> str:
    return "".join(tokenizer.pieces()[token] for token in document[0]).replace("▁", " ")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """A few hundred of each kind."""
    rng = random.Random(0)
    return [texts_of(make(rng, "train")) for make in corpus.KINDS.values() for _ in range(200)]


def test_the_fast_encoder_is_the_tokenizer(tmp_path: Path, documents: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer.write_tokenizer(tmp_path)
    real = AutoTokenizer.from_pretrained(tmp_path)
    for text in documents[::7]:
        text = text.removesuffix(tokenizer.END)
        assert real.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        assert real.decode(tokenizer.encode(text)) == text
    foreign = "Grüße, 42 tigers! 猫"
    assert real.decode(real.encode(foreign, add_special_tokens=False)) == foreign


def test_no_word_bears_two_values() -> None:
    words = [w for a, values in world.ATTRIBUTES.items() for v in values for w in world.bearers(a, v)]
    assert len(words) == len(set(words))
    assert not {*words} & {*world.THINGS, *world.FILLERS}
    assert all(world.opposites()[other] == one for one, other in world.opposites().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_task_loads_and_its_answers_are_the_worlds(name: str, tmp_path: Path) -> None:
    [path] = tasks.write(tmp_path, [name])
    task = load_task(path)
    assert task.kind == ("classification" if "classification" in name else "generation")
    assert len(task.instances) == tasks.NUM_INSTANCES
    for one in task.instances:
        assert one.references == (tasks.truth(name, one.input),)
        assert world.is_test(one.input)
    assert not {e.input for e in task.examples} & {one.input for one in task.instances}
    assert {e.output for e in task.examples} >= {*task.labels}
    assert not task.remarks


def test_another_draw_changes_the_examples_alone() -> None:
    first, second = tasks.build(NAMES[0], draw=0), tasks.build(NAMES[0], draw=1)
    assert first["Positive Examples"] != second["Positive Examples"]
    assert first["Instances"] == second["Instances"]


def test_held_in_and_held_out_share_no_wording() -> None:
    for frames in (wordings.HEADS, wordings.ITEMS, operations.PAIR_FRAMES, wordings.LABEL_WORDS):
        sets = [set(some) for some in frames.values()]
        assert sum(map(len, sets)) == len(set().union(*sets))
    pairs = {frozenset(pair) for pair in operations.TRAIN_PAIRS}
    assert not pairs & {frozenset(p) for p in (*operations.HELD_OUT_PAIRS, *operations.HELD_IN_PAIRS)}
    assert not {*operations.HELD_OUT_PAIRS} & {*operations.HELD_IN_PAIRS}


def test_the_corpus_holds_nothing_of_the_tasks(documents: list[str]) -> None:
    inputs = {one["input"] for name in NAMES for one in tasks.build(name)["Instances"]}
    kept_out = {word for words in wordings.LABEL_WORDS.values() for word in words}
    for text in documents:
        lines = text.splitlines()
        assert not {line.removeprefix("Input: ") for line in lines if line.startswith("Input: ")} & inputs
        if lines[0].startswith(("Name the word", "Write the words once", " ")):
            continue  # circuits may hold any word
        assert not {word for line in lines if line.startswith("Output: ") for word in line.split()} & kept_out


def test_weights_are_as_many_as_tokens_and_answers_weigh_most() -> None:
    rng = random.Random(1)
    for kind, make in corpus.KINDS.items():
        for which in ("train", "dev"):
            ids, weights = make(rng, which)
            assert len(ids) == len(weights), kind
            assert ids[-1] == 0
            assert max(weights) >= (corpus.PLAIN if kind == "inputs_lists" else 1)


@pytest.mark.parametrize("names", operations.PAIRS[::7])
def test_operations_are_applied_in_order(names: tuple[str, str]) -> None:
    made = operations.instruct(names, "{A}, then {b}.", (0, 0))
    words = "tiger huge car".split()
    first, second = (operations.OPERATIONS[name][0] for name in names)
    assert made.apply("tiger huge car") == " ".join(second(first(words)))
