"""What each filter turns away and why, and that chains decide row by row, whatever falls into one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any, Literal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from selfguide.config import Filters
from selfguide.filters import Balance, Context, Duplicate, EvaluationCopy, Finished, GoldCopy, Length, Noise, ValidLabel
from selfguide.filters.base import RowFilter, SetFilter
from selfguide.filters.chain import InputJudge, PairJudge, judge_set, pairs_table
from selfguide.filters.consistency import Vote
from selfguide.filters.duplicates import NearDuplicate
from selfguide.filters.empty import Empty
from selfguide.filters.labels import Agreement
from selfguide.records import Ledger

CONTEXT = Context(
    gold_texts=("0123456789", "01234567890123456789"),
    gold_tokens=(4, 8),
    gold_inputs=("A gold input.", "Let me go!"),
    evaluation_inputs=("Held out.",),
    labels=("yes", "no"),
    seed=7,
)


def reason(one: RowFilter, text: str, context: Context = CONTEXT, **columns: Any) -> str | None:
    row = {"text": text, "tokens": 5, "finish_reason": "stop", "label": None} | columns
    table = pl.DataFrame(
        [row], schema={"text": pl.String, "tokens": pl.Int32, "finish_reason": pl.String, "label": str}
    )
    found: str | None = table.select(one.reason(context).alias("reason")).item()
    return found


def reasons(one: SetFilter, texts: Iterable[str], context: Context = CONTEXT) -> list[str | None]:
    texts = list(texts)
    table = pl.DataFrame({"row": range(10, 10 + len(texts)), "input": texts, "text": texts})
    table = table.cast({"input": pl.String, "text": pl.String})
    return one.reasons(table, context).to_list()


def kept(one: SetFilter, texts: Iterable[str], context: Context = CONTEXT) -> list[str]:
    texts = list(texts)
    return [text for text, why in zip(texts, reasons(one, texts, context), strict=True) if why is None]


# ---- one text at a time


@pytest.mark.parametrize("text", ["", " ", "\n\t\r ", "\u00a0\u2003\u3000"])
def test_white_space_is_empty(text: str) -> None:
    assert reason(Empty(), text) == "no text"


def test_one_visible_character_is_not_empty() -> None:
    assert reason(Empty(), "\n .\n") is None


@pytest.mark.parametrize(
    ("finish", "expected"), [("stop", None), ("length", "finish_reason length"), ("abort", "finish_reason abort")]
)
def test_only_a_stop_is_an_end(finish: str, expected: str | None) -> None:
    assert reason(Finished(), "half a sen", finish_reason=finish) == expected


def test_noise_is_case_sensitive_and_named() -> None:
    assert reason(Noise(), "Of course! Here it is") == "holds Of course!"
    assert reason(Noise(), "of course! here it is") is None
    assert reason(Noise(extra=("zzz",)), "a zzz b") == "holds zzz"
    assert reason(Noise(extra=("zzz",)), "Certainly! it is") == "holds Certainly!"
    assert reason(Noise(words=("zzz",)), "Certainly! it is") is None


def test_a_words_special_characters_are_themselves() -> None:
    noise = Noise(words=("a.c", "\n\n", "\\_"))
    assert [reason(noise, text) for text in ("abc", "x\ny", "a_b")] == [None, None, None]
    assert reason(noise, "a.c") == "holds a.c"
    assert reason(noise, "x\n\ny") == "holds \n\n"


def test_words_of_a_gold_example_are_no_noise_unless_the_recipe_says_so() -> None:
    assert reason(Noise(), "Let me see") is None  # a gold input holds "Let me "
    assert reason(Noise(), "Let me see", replace(CONTEXT, gold_texts=("x", "Let me y"), gold_inputs=())) is None
    assert reason(Noise(exempt_gold=False), "Let me see") == "holds Let me "
    assert reason(Noise(words=("Let me ",)), "let me") is None


def test_one_tasks_exemptions_do_not_reach_the_next() -> None:
    noise, other = Noise(), replace(CONTEXT, gold_inputs=())
    verdicts = [reason(noise, "Let me see", context) for context in (other, CONTEXT, other, CONTEXT)]
    assert verdicts == ["holds Let me ", None, "holds Let me ", None]


@pytest.mark.parametrize(("name", "value"), [("words", ("x",)), ("name", "noisy"), ("fresh", 1)])
def test_a_filter_cannot_be_changed(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        setattr(Noise(), name, value)


# Gold lengths 10 and 20: mean 15, standard deviation 5.
@pytest.mark.parametrize(
    ("length", "shortest", "longest"),
    [
        (Length(sigmas=2, floor=0), 5, 25),
        (Length(sigmas=1, floor=0), 10, 20),
        (Length(sigmas=2, floor=0, exclusive_upper=True), 5, 24),
        (Length(sigmas=0.5, floor=0), 12, 17),  # 12.5 and 17.5, cut to whole numbers
        (Length(sigmas=0.1, floor=0.2), 12, 18),  # the floor is wider
        (Length(sigmas=2, floor=0.2), 5, 25),  # the deviation is wider
    ],
)
def test_length_keeps_what_lies_within_both_bounds(length: Length, shortest: int, longest: int) -> None:
    kept = [count for count in range(1, 60) if reason(length, "x" * count) is None]
    assert kept == list(range(shortest, longest + 1))


def test_length_says_what_it_counted_and_what_is_allowed() -> None:
    assert reason(Length(floor=0), "x" * 30) == "30 characters, 5 to 25 allowed"
    assert reason(Length(floor=0, sigmas=9), "x" * 99) == "99 characters, 0 to 60 allowed"


def test_length_counts_characters_or_tokens() -> None:
    assert reason(Length(floor=0), "ü" * 25, tokens=1000) is None
    tokens = Length(unit="tokens", sigmas=1, floor=0)  # 4 and 8 tokens
    assert [reason(tokens, "x", tokens=count) for count in (4, 8)] == [None, None]
    assert reason(tokens, "x", tokens=9) == "9 tokens, 4 to 8 allowed"
    assert reason(tokens, "x", tokens=3) == "3 tokens, 4 to 8 allowed"


def test_equal_gold_lengths_leave_room_by_the_floor_and_only_by_it() -> None:
    same = replace(CONTEXT, gold_texts=("x" * 10, "y" * 10))

    def kept(length: Length) -> list[int]:
        return [count for count in range(40) if reason(length, "z" * count, same) is None]

    assert kept(Length()) == list(range(5, 16))
    assert kept(Length(floor=0)) == [10]
    assert kept(Length(floor=0, exclusive_upper=True)) == []  # the authors' code: everything goes


def test_copies_are_found_without_case_spacing_and_width() -> None:
    for text in ("A gold input.", " a  GOLD\ninput. ", "Ａ gold input."):
        assert reason(GoldCopy(), text) == "copy of a gold example"
    assert reason(GoldCopy(), "Another gold input.") is None
    assert reason(EvaluationCopy(), "held out.") == "copy of an evaluation input"
    assert reason(EvaluationCopy(), "A gold input.") is None
    assert reason(EvaluationCopy(), "Held out.", replace(CONTEXT, evaluation_inputs=())) is None


# ---- labels


@pytest.mark.parametrize(
    ("match", "text", "label"),
    [
        ("exact", "yes", "yes"),
        ("exact", ' "Yes." ', "yes"),
        ("exact", "**NO**", "no"),
        ("exact", "yes, it is", None),
        ("exact", "", None),
        ("first", "yes or no", "yes"),
        ("last", "yes or no", "no"),
        ("first", "I know", "no"),  # inside a word too, as the authors read it
        ("first", "No", None),  # case-sensitive
        ("first", "maybe", None),
        ("last", "maybe", None),
    ],
)
def test_reading_a_label(match: Literal["exact", "first", "last"], text: str, label: str | None) -> None:
    assert read(ValidLabel(match=match), text) == label
    assert reason(ValidLabel(match=match), text) == (None if label else "names no label")


def read(valid: ValidLabel, text: str, labels: tuple[str, ...] = CONTEXT.labels) -> str | None:
    found: str | None = pl.DataFrame({"text": [text]}).select(valid.read(replace(CONTEXT, labels=labels))).item()
    return found


@pytest.mark.parametrize("labels", list(permutations(["agree", "disagree", "strongly agree"])))
def test_of_labels_that_hold_each_other_the_longest_is_read(labels: tuple[str, ...]) -> None:
    texts = {"I disagree.": "disagree", "I strongly agree with it": "strongly agree", "agree": "agree"}
    for match in ("first", "last"):
        assert {text: read(ValidLabel(match=match), text, labels) for text in texts} == texts
    assert read(ValidLabel(match="first"), "agree, no, disagree", labels) == "agree"
    assert read(ValidLabel(match="last"), "agree, no, disagree", labels) == "disagree"


LABEL = st.text(min_size=1, max_size=6).map(str.strip).filter(bool)
PUNCTUATED = st.text(alphabet="ab.()[]{}*+?|^$\\/-#&~ \"'!", min_size=1, max_size=6).map(str.strip).filter(bool)


@given(st.lists(LABEL | PUNCTUATED, min_size=2, max_size=5, unique=True))
@settings(max_examples=200, deadline=None)
def test_every_label_reads_as_itself(labels: list[str]) -> None:
    for match in ("exact", "first", "last"):
        valid = ValidLabel(match=match)
        assert [read(valid, label, tuple(labels)) for label in labels] == labels


@pytest.mark.parametrize("match", ["exact", "first", "last"])
def test_without_labels_no_answer_names_one(match: Literal["exact", "first", "last"]) -> None:
    for text in ("yes", ""):
        assert reason(ValidLabel(match=match), text, replace(CONTEXT, labels=())) == "names no label"


def test_agreement_holds_the_annotation_against_the_condition() -> None:
    assert reason(Agreement(), "no", label="yes") == "written for yes, annotated no"
    assert reason(Agreement(), "yes", label="yes") is None
    assert reason(Agreement(), "yes", label=None) is None  # written for no label in particular


def test_balance_keeps_as_many_of_each_label_as_the_rarest_has() -> None:
    rows = ["yes"] * 9 + ["no"] * 3 + ["maybe"] * 5
    assert Counter(kept(Balance(), rows)) == {"yes": 3, "no": 3, "maybe": 3}
    assert Counter(kept(Balance(ratio=1.5), rows)) == {"yes": 4, "no": 3, "maybe": 4}
    assert Counter(kept(Balance(ratio=9), rows)) == Counter(rows)
    assert set(reasons(Balance(), rows)) == {None, "more than 3 rows of yes", "more than 3 rows of maybe"}


def test_balance_needs_no_label_to_occur() -> None:
    assert kept(Balance(), []) == []
    assert kept(Balance(), ["yes"] * 4) == ["yes"] * 4  # labels that never occur are no class of size 0


def test_balance_draws_by_the_runs_seed_alone() -> None:
    rows = ["yes"] * 40 + ["no"] * 20
    first = reasons(Balance(), rows)
    assert reasons(Balance(), rows) == first
    assert reasons(Balance(), rows, replace(CONTEXT, seed=8)) != first


def test_balance_cannot_ask_for_less_than_the_rarest() -> None:
    with pytest.raises(ValidationError):
        Balance(ratio=0.5)


# ---- duplicates


def test_the_first_of_equal_texts_stays() -> None:
    assert reasons(Duplicate(), ["a b", "A  b ", "c", "ａ b"]) == [None, "seen before", None, "seen before"]


def overlapping(num_shared: int, num_words: int = 60, first: int = 0) -> tuple[str, str]:
    """Two texts of equally many words, whose first `num_shared` are the same."""
    words = [f"word{first + i}" for i in range(num_words)]
    return " ".join(words), " ".join(words[:num_shared] + [f"x{i}" for i in range(num_words - num_shared)])


def test_near_duplicates_go_and_name_the_row_that_stays() -> None:
    text, near = overlapping(58)
    assert reasons(NearDuplicate(), [text, "else", near, text.upper()]) == [None, None, "near row 10", "near row 10"]


def test_similarity_below_the_threshold_stays() -> None:
    """Jaccard similarity of word triples, estimated from 128 hashes: a standard error of 0.04."""
    for first in range(40):
        text, other = overlapping(48, first=first)  # 46 of 70 triples: 0.66
        assert reasons(NearDuplicate(), [text, other]) == [None, None]
    lax = NearDuplicate(threshold=0.3, permutations=256)
    assert reasons(lax, overlapping(45))[1] == "near row 10"


def test_near_duplicates_compare_short_texts_and_the_column_that_is_asked_for() -> None:
    assert reasons(NearDuplicate(), ["two words", "Two  words", "two", "", ""])[1:] == [
        "near row 10", None, None, "near row 13",
    ]  # fmt: skip
    table = pl.DataFrame({"row": [1, 2], "input": ["a", "b"], "text": ["same", "same"]})
    assert NearDuplicate().reasons(table, CONTEXT).to_list() == [None, None]
    assert NearDuplicate(column="text").reasons(table, CONTEXT).to_list() == [None, "near row 1"]


# ---- the vote


def vote(one: Vote, answers: list[str], num_samples: int | None = None) -> tuple[str, int, float, str | None]:
    """The elected answer of one row with its votes, its share and why it goes."""
    dropped = (num_samples or len(answers)) - len(answers)
    samples = [{"text": text, "finish_reason": "stop", "tokens": 1, "logprob": None} for text in answers]
    samples += [{"text": "cut", "finish_reason": "length", "tokens": 1, "logprob": None}] * dropped
    judge = PairJudge(Filters(samples=(Finished(),), vote=one), CONTEXT)
    [row] = judge.judge(pairs_table([{"row": 3, "input": "i", "label": None, "samples": samples}])).to_dicts()
    return row["text"], row["votes"], row["share"], row["reason"]


def test_the_most_frequent_answer_is_elected() -> None:
    assert vote(Vote(), ["b", "a", "b", "c"]) == ("b", 2, 0.5, None)


def test_ties_go_to_the_shortest_then_to_the_alphabet() -> None:
    for answers in permutations(["long answer", "bb", "aa"]):
        assert vote(Vote(), list(answers))[0] == "aa"
    assert vote(Vote(), ["aaa", "b"])[0] == "b"


def test_the_share_is_of_all_samples_or_of_the_survivors() -> None:
    assert vote(Vote(), ["a"], num_samples=10) == ("a", 1, 0.1, "10% agree, 30% asked for")
    assert vote(Vote(of="survivors"), ["a"], num_samples=10) == ("a", 1, 1.0, None)
    assert vote(Vote(of="survivors"), ["a", "b", "b"], num_samples=10)[1:3] == (2, 2 / 3)


def test_the_share_that_is_asked_for_is_enough() -> None:
    assert vote(Vote(min_share=0.3), ["a"] * 3, num_samples=10)[3] is None
    assert vote(Vote(min_share=0.3), ["a"] * 2, num_samples=10)[3] == "20% agree, 30% asked for"
    assert vote(Vote(min_share=0), ["a"], num_samples=200)[3] is None


def test_the_medoid_is_the_answer_nearest_to_the_others() -> None:
    near = ["the cat sat on the mat", "the cat sat on a mat", "a cat sat on the mat"]
    for answers in permutations([*near, "no idea"]):
        assert vote(Vote(choose="medoid"), list(answers))[0] == near[0]
    _, votes, share, why = vote(Vote(choose="medoid", min_share=0.5), ["one two", "three four"])
    assert (votes, share) == (1, 0.0)
    assert why == "0% agree, 50% asked for"
    assert vote(Vote(choose="medoid"), ["alone"]) == ("alone", 1, 1.0, None)


def test_equally_near_answers_are_told_apart_by_length_then_alphabet() -> None:
    for answers in permutations(["cat b", "cat a", "cat cc"]):
        assert vote(Vote(choose="medoid"), list(answers))[0] == "cat a"


# ---- chains


def inputs(*chain: Any) -> InputJudge:
    return InputJudge(Filters(inputs=chain), CONTEXT)


def test_the_first_filter_of_the_chain_is_the_reason() -> None:
    text = "Sure, " + "x" * 90
    for chain, name in (((Noise(), Length()), "noise"), ((Length(), Noise()), "length")):
        [verdict] = inputs(*chain).judge([text], [1], ["stop"])
        assert verdict is not None
        assert verdict[0] == name


def test_a_duplicate_is_called_one_where_the_chain_looks_for_it() -> None:
    for chain, name in (((Duplicate(), Finished()), "duplicate"), ((Finished(), Duplicate()), "finished")):
        verdicts = inputs(*chain).judge(["a", "a"], [1, 1], ["stop", "length"])
        assert [verdict and verdict[0] for verdict in verdicts] == [None, name]


def test_a_text_is_a_duplicate_of_accepted_texts_alone() -> None:
    judge = inputs(Duplicate(), Finished())
    verdicts = judge.judge(["a", "A", "a "], [1, 1, 1], ["length", "stop", "stop"])
    assert verdicts == [("finished", "finish_reason length"), None, ("duplicate", "seen before")]


def test_without_filters_all_rows_stay() -> None:
    assert inputs().judge(["", "a", "a"], [0, 1, 1], ["length"] * 3) == [None, None, None]
    assert inputs(Empty(), Noise(), Duplicate()).judge([], [], []) == []


TEXTS = st.sampled_from(["a", " A", "b b", "B  b", "", "Sure, a", "x" * 30, "yes", "A gold input.", "Held out."])
ROWS = st.lists(st.tuples(TEXTS | st.text(max_size=8), st.integers(0, 9), st.sampled_from(["stop", "length"])))
CHAINS = st.permutations([Empty(), Finished(), Noise(), Length(), GoldCopy(), EvaluationCopy(), Duplicate()])


def judge_in_batches(judge: InputJudge, rows: list[tuple[str, int, str]], cuts: Iterable[int]) -> list[Any]:
    verdicts, edges = [], [0, *sorted(cuts), len(rows)]
    for start, end in pairwise(edges):
        batch = rows[start:end]
        verdicts += judge.judge([row[0] for row in batch], [row[1] for row in batch], [row[2] for row in batch])
    return verdicts


@given(CHAINS, st.integers(0, 7), ROWS, st.data())
@settings(max_examples=60, deadline=None)
def test_verdicts_do_not_depend_on_the_batches(
    chain: list[Any], num_filters: int, rows: list[tuple[str, int, str]], data: st.DataObject
) -> None:
    chain = chain[:num_filters]
    whole = judge_in_batches(inputs(*chain), rows, [])
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=4))
    assert judge_in_batches(inputs(*chain), rows, cuts) == whole
    resumed, at = inputs(*chain), data.draw(st.integers(0, len(rows)))
    resumed.recall([row[0] for row, verdict in zip(rows[:at], whole[:at], strict=True) if verdict is None])
    assert judge_in_batches(resumed, rows[at:], []) == whole[at:]


def sample(text: str, finish_reason: str = "stop", tokens: int = 2) -> dict[str, Any]:
    return {"text": text, "finish_reason": finish_reason, "tokens": tokens, "logprob": None}


def pair(row: int, samples: list[dict[str, Any]], label: str | None = None) -> dict[str, Any]:
    return {"row": row, "input": f"input {row}", "label": label, "samples": samples}


def test_a_pair_without_a_surviving_sample_has_their_commonest_reason() -> None:
    judge = PairJudge(Filters(samples=(Empty(), Finished(), Noise())), CONTEXT)
    rows = [
        pair(0, [sample("a", "length"), sample("Sure, a"), sample("b", "length")]),
        pair(1, []),
        pair(2, [sample(" "), sample("a")]),
    ]
    judged = judge.judge(pairs_table(rows)).to_dicts()
    assert [(row["filter"], row["reason"]) for row in judged[:2]] == [
        ("finished", "no sample left: finish_reason length"),
        ("empty", "no sample left: no samples"),
    ]
    assert (judged[2]["filter"], judged[2]["text"], judged[2]["share"]) == (None, "a", 0.5)


def test_answers_vote_by_the_label_that_they_name() -> None:
    judge = PairJudge(Filters(samples=(ValidLabel(match="first"),), pairs=(Agreement(),)), CONTEXT)
    samples = [sample("I think yes"), sample("yes!"), sample("no"), sample("who can tell")]
    [agreed, differs] = judge.judge(pairs_table([pair(0, samples, "yes"), pair(1, samples, "no")])).to_dicts()
    assert (agreed["text"], agreed["votes"], agreed["share"], agreed["filter"]) == ("yes", 2, 0.5, None)
    assert (differs["filter"], differs["reason"]) == ("agreement", "written for no, annotated yes")


def test_pairs_are_judged_by_the_elected_output() -> None:
    judge = PairJudge(Filters(samples=(), vote=Vote(min_share=0.6), pairs=(Length(floor=0, sigmas=1),)), CONTEXT)
    short, right = sample("short"), sample("just twelve.", tokens=4)
    rows = [pair(0, [short, short, right]), pair(1, [short, right, right]), pair(2, [short, right])]
    judged = judge.judge(pairs_table(rows)).to_dicts()
    assert [row["filter"] for row in judged] == ["length", None, "consistency"]  # the vote comes first
    assert [row["reason"] for row in judged[::2]] == ["5 characters, 10 to 20 allowed", "50% agree, 60% asked for"]
    assert (judged[1]["input"], judged[1]["tokens"]) == ("input 1", 4)


SAMPLES = st.builds(sample, TEXTS, st.sampled_from(["stop", "length"]), st.integers(1, 9))
PAIRS = st.lists(st.lists(SAMPLES, max_size=4), max_size=8).map(
    lambda rows: [pair(2 * i, s) for i, s in enumerate(rows)]
)
VOTES = st.builds(Vote, choose=st.sampled_from(["frequent", "medoid"]), of=st.sampled_from(["samples", "survivors"]))


@given(PAIRS, VOTES, st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_a_pairs_verdict_does_not_depend_on_other_pairs(rows: list[dict[str, Any]], how: Vote, cut: int) -> None:
    judge = PairJudge(Filters(samples=(Empty(), Finished(), Noise()), vote=how, pairs=(Length(),)), CONTEXT)
    whole = judge.judge(pairs_table(rows)).to_dicts()
    assert [row["row"] for row in whole] == [row["row"] for row in rows]
    parts = [judge.judge(pairs_table(part)).to_dicts() for part in (rows[:cut], rows[cut:])]
    assert parts[0] + parts[1] == whole


SETS = st.lists(st.sampled_from([Duplicate(), NearDuplicate(permutations=16), Balance(), Balance(ratio=2)]), max_size=3)
OUTPUTS = st.lists(st.tuples(st.sampled_from(["yes", "no", "maybe"]), st.sampled_from([None, "noise"])), max_size=12)


@given(OUTPUTS, SETS)
@settings(max_examples=60, deadline=None)
def test_set_filters_give_every_row_one_end(outputs: list[tuple[str, str | None]], sets: list[Any]) -> None:
    columns = {"row": pl.Int32, "input": pl.String, "text": pl.String, "filter": pl.String, "reason": pl.String}
    rows = [(i, f"input {i % 5}", text, name, name and "why") for i, (text, name) in enumerate(outputs)]
    judged = judge_set(pl.DataFrame(rows, schema=columns, orient="row"), sets, CONTEXT)
    Ledger.of(judged.iter_rows(named=True)).reconcile(len(rows))
    assert judged["row"].to_list() == list(range(len(rows)))
    for before, after in zip(rows, judged.iter_rows(named=True), strict=True):
        assert (after["state"] == "accepted") == (after["filter"] is None) == (after["reason"] is None)
        if before[3]:  # what was turned away before keeps its reason
            assert (after["filter"], after["reason"]) == before[3:]


def test_each_set_filter_sees_what_the_one_before_left() -> None:
    columns = {"row": [0, 1, 2, 3], "input": ["a", "b", "c", "c"], "text": ["yes", "no", "no", "no"]}
    table = pl.DataFrame(columns).with_columns(filter=pl.lit(None, pl.String), reason=pl.lit(None, pl.String))
    judged = judge_set(table, [NearDuplicate(), Balance()], CONTEXT)
    assert judged["filter"].to_list()[3] == "near_duplicate"
    assert Counter(judged["filter"].to_list()[:3]) == {None: 2, "balance": 1}
