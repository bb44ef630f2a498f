from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from selfguide.errors import UserError
from selfguide.metrics import (
    authors_em,
    authors_rouge_char,
    english_tokens,
    exact_match,
    rouge_l,
    rouge_l_ids,
    rouge_tokenizer,
    score_rows,
)
from selfguide.stemmer import stem
from selfguide.tasks import load_task

SCORER = RougeScorer(["rougeL"], use_stemmer=True)


def official_rouge(prediction: str, references: Sequence[str]) -> float:
    return max(float(SCORER.score(text, prediction)["rougeL"].fmeasure) for text in references)


def lcs_f1(a: Sequence[object], b: Sequence[object]) -> float:
    """F1 of the longest common subsequence by the textbook's table."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous, row = row, [0]
        for j, y in enumerate(b):
            row.append(previous[j] + 1 if x == y else max(previous[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


# Words that stem, words that a stemmer must leave, digits, symbols, letters whose lower case is longer.
WORDS = ["running", "ran", "Runs", "skies", "dying", "y" * 30, "agreed", "25", "a", "the", "İ", "日本", "?"]
texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="abeginsty0 -'", max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Yes.", ["yes"], 1.0),
        ("  positive\n", ["Positive!"], 1.0),
        ("25", ["5"], 0.0),
        ("the answer is yes", ["yes"], 0.0),
        ("a cat", ["cat"], 0.0),
        ("well-known", ["well known"], 0.0),
        ("well-known", ["wellknown"], 1.0),
        ("b", ["a", "b"], 1.0),
        ("", [""], 1.0),
        ("", ["yes"], 0.0),
        ("?", ["!"], 1.0),
        ("。", ["！"], 0.0),
        ("हाँ", ["हाँ"], 1.0),
        ("ﬁne", ["fine"], 0.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the cat sat", ["the cat sat"], 1.0),
        ("He was running", ["he was runs!"], 1.0),
        ("25", ["5"], 0.0),
        ("a b c d", ["a c"], 2 / 3),
        ("nothing alike", ["x", "y", "nothing"], 2 / 3),
        ("?", ["?"], 0.0),
        ("", [""], 0.0),
        ("हाँ", ["हाँ"], 0.0),
    ],
)
def test_rouge_l(prediction: str, references: list[str], expected: float) -> None:
    assert rouge_l(prediction, references) == pytest.approx(expected)
    assert rouge_l(prediction, references) == official_rouge(prediction, references)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_rouge_l_equals_rouge_score(prediction: str, references: list[str]) -> None:
    assert rouge_l(prediction, references) == official_rouge(prediction, references)


# ---- the stemmer

PORTER = PorterStemmer()
PIECES = (
    "ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness fulness ousness aliti "
    "iviti biliti fulli logi icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent ion "
    "ou ism ate iti ous ive ize ed ing eed ied ies sses ss s y ll e at bl iz lly"
).split()
words = st.tuples(
    st.text(alphabet="abeilostywxz1", max_size=7), st.lists(st.sampled_from(PIECES), max_size=3).map("".join)
).map("".join)


@given(st.lists(words | st.text(alphabet="aeiouybcdls19", max_size=9), min_size=1, max_size=50))
def test_stems_are_nltks(some: list[str]) -> None:
    assert [stem(word) for word in some] == [PORTER.stem(word) for word in some]


ODD = "yyyyed dies died spied geologi rationalli 11ed".split()


@pytest.mark.parametrize("word", [*PORTER.pool, *ODD])
def test_stems_of_odd_words_are_nltks(word: str) -> None:
    assert stem(word) == PORTER.stem(word)


def test_stems_of_real_words_are_nltks(ni_v2_dir: Path) -> None:
    found: set[str] = set()
    for path in sorted(ni_v2_dir.glob("tasks/*.json"))[::100]:
        found.update(*(re.findall("[a-z0-9]+", row.input.lower()) for row in load_task(path).instances[:500]))
    assert len(found) > 5000
    assert {word: stem(word) for word in found} == {word: PORTER.stem(word) for word in found}


def test_rouge_l_equals_rouge_score_on_real_rows(ni_v2_dir: Path) -> None:
    rng, rows = random.Random(0), []
    for path in sorted(ni_v2_dir.glob("tasks/*.json"))[::40]:
        task = load_task(path)
        for row in task.instances[:100]:
            other = rng.choice(task.instances)
            words = row.references[0].split()
            edited = " ".join(rng.sample(words, len(words))[: 1 + len(words) // 2])
            answer = rng.choice([other.references[0], edited, row.references[0] + "!", other.input[:300]])
            rows.append((answer, row.references))
    assert len(rows) > 2000
    predictions, references = [answer for answer, _ in rows], [texts for _, texts in rows]
    em, rouge = score_rows(predictions, references)
    assert rouge == [official_rouge(*row) for row in rows]
    assert em == [exact_match(*row) for row in rows]
    assert 0 < sum(em) < len(em)


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
def test_rouge_l_ids_is_the_longest_common_subsequence(a: list[int], b: list[int]) -> None:
    assert rouge_l_ids(a, [b]) == pytest.approx(lcs_f1(a, b))


def test_a_very_long_token_is_scored() -> None:
    assert rouge_l("y" * 100_000, ["y" * 100_000]) == 1.0


def test_score_rows_wants_references_for_each_row() -> None:
    assert score_rows([], []) == ([], [])
    with pytest.raises(ValueError, match="zip"):
        score_rows(["yes", "no"], [["yes"]])


def test_only_english_is_scored_without_a_tokenizer() -> None:
    assert rouge_tokenizer("English") is english_tokens
    for language in ("Hindi", "English, Hindi", ""):
        with pytest.raises(UserError, match="GPT-2"):
            rouge_tokenizer(language)


def test_another_tokenizer_scores_other_scripts() -> None:
    tokenize = rouge_tokenizer("Japanese", list)
    em, rouge = score_rows(["東京都"], [["東京"]], tokenize)
    assert em == [0.0]
    assert rouge == pytest.approx([0.8])


@pytest.mark.parametrize(
    ("prediction", "references", "labels", "expected"),
    [
        ("The answer is Yes", ["Yes"], ["Yes", "No"], 1.0),
        ("Yes, or No", ["Yes"], ["Yes", "No"], 0.0),
        ("No, or Yes", ["Yes"], ["Yes", "No"], 1.0),
        ("yes", ["Yes"], ["Yes", "No"], 0.0),
        ("I would say E. Certainly", ["E"], ["E", "C", "N"], 0.0),
        ("25", ["5"], ["1", "5"], 1.0),
        ("not hopeful", ["not hopeful"], ["not hopeful", "hopeful"], 1.0),
        ("No", ["Yes", "No"], ["Yes", "No"], 0.0),
        ("a.b", ["a.b"], ["a.b", "axb"], 1.0),
        ("axb", ["a.b"], ["a.b"], 0.0),
        ("", ["Yes"], ["Yes", "No"], 0.0),
        ("Yes", ["Yes"], [], 0.0),
        ("Yes", ["Yes"], ["", "Yes"], 1.0),
    ],
)
def test_authors_em(prediction: str, references: list[str], labels: list[str], expected: float) -> None:
    assert authors_em(prediction, references, labels) == expected


@given(texts, texts)
def test_authors_rouge_is_over_raw_characters(prediction: str, reference: str) -> None:
    assert authors_rouge_char(prediction, [reference, prediction]) == pytest.approx(lcs_f1(prediction, reference))


def test_authors_rouge_has_a_floor_where_the_official_has_none() -> None:
    prediction, references = "rather unlike", ["nothing to share"]
    assert rouge_l(prediction, references) == 0.0
    assert authors_rouge_char(prediction, references) > 0.2
