from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfguide.labels import find_labels, is_classification


@pytest.mark.parametrize(
    ("definition", "outputs", "expected"),
    [
        ("Is it true?", ["Yes"], True),
        ("Say whether they agree.", ["True", "False."], True),
        ("Choose.", ["B"], True),
        ("Choose.", ["Option A", "Option C"], True),
        ("Who spoke?", ["Speaker 1", "Speaker 2"], True),
        ("Label the tone as positive or negative.", ["negative", "Positive"], True),
        ("Return 1 if it is edible, else 2.", ["1", "2"], True),
        ("Does it support or undermine the claim?", ["supports", "undermines"], False),
        ("Say whether it supports or undermines the claim.", ["support", "undermine."], True),
        ("Is it religious or not?", ["religious", "secular", "neither"], False),
        ("Is it religious, secular or not?", ["religious", "secular", "neither"], True),
        ("Count the vowels.", ["1", "4"], False),
        ("Name the capital.", ["Paris", "Rome"], False),
        ("Translate into Hindi.", ["हाँ"], False),
        ("Write a cat poem.", ["a cat sat on the very large mat"], False),
        ("Write a cat poem.", ["concatenate"], False),
        ("Answer.", ["", "  "], False),
        ("", [], False),
    ],
)
def test_is_classification(definition: str, outputs: list[str], expected: bool) -> None:
    assert is_classification(definition, outputs) is expected


@pytest.mark.parametrize(
    ("definition", "positive", "negative", "expected"),
    [
        ("Is it so?", ["yes"], [], ["no", "yes"]),
        ("Is it so?", ["True."], [], ["False.", "True."]),
        ("Choose from the options.", ["C", "B"], [], ["A", "B", "C"]),
        ('Answer "A", "B", "C" or "D".', ["B"], [], ["A", "B", "C", "D"]),
        ("Which fact?", ["Fact 2"], ["Fact 3", "no fact"], ["Fact 2", "Fact 3"]),
        ("0 is sport, 1 is art, 2 is science.", ["1"], [], ["0", "1", "2"]),
        ("Rate 1 or 2. Never use 7.", ["1", "2"], [], ["1", "2"]),
        ("The letters are: E, C or N.", ["E", "N"], [], ["C", "E", "N"]),
        ("Classify: 'positive' if it is, 'neutral' if not.", ["positive"], [], ["neutral", "positive"]),
        ("The mood is happy, sad, angry, or other.", ["sad", "other"], [], ["angry", "happy", "other", "sad"]),
        ("It is Good (it shines) or Bad (it does not).", ["good"], [], ["bad", "good"]),
        ("Words such as 'run' occur. Say 'verb' or 'noun'.", ["verb", "noun"], [], ["noun", "verb"]),
        ("Call it trash. Otherwise it counts as gold.", ["trash"], ["gold"], ["trash"]),
        ("Say 'up', 'down', 'uncharacteristically' or '--'.", ["up"], [], ["down", "up"]),
        ("Say it.", ["his", "His", ""], [], ["his"]),
        ("Say it.", [" "], [], []),
    ],
)
def test_find_labels(definition: str, positive: list[str], negative: list[str], expected: list[str]) -> None:
    assert find_labels(definition, positive, negative) == expected


@given(st.text(max_size=60), st.lists(st.text(max_size=8), max_size=3), st.lists(st.text(max_size=8), max_size=2))
def test_labels_are_sorted_stripped_and_distinct(definition: str, positive: list[str], negative: list[str]) -> None:
    labels = find_labels(definition, positive, negative)
    assert labels == sorted({label.strip() for label in labels} - {""})
    assert bool(labels) == any(output.strip() for output in positive)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("blank", [" ", "\t \t", "(", "1", "'", ",", "a, "])
def test_a_long_definition_takes_linear_time(blank: str) -> None:
    assert "good" in find_labels(blank * 100_000 + "'good' or 'bad'", ["good"], ["x"])
