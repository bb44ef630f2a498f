"""Tokens that the engine's core keeps back: what the front end hears, and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, FinishReason

from engines.quiet_core import MOST_HELD, Held, StopTokens
from engines.types import Request, Sampling
from selfguide.api import Session
from tests.test_vllm_engine import sample, text_ids

COLON, NEWLINE = 7, 8


class Stops(StopTokens):
    """With a vocabulary of its own: token 7 has a colon in it, token 8 a line's end."""

    def __init__(self) -> None:
        super().__init__(None)
        self._texts = ["a", "b", "c", "d", "é", "\N{REPLACEMENT CHARACTER}", "f", "x:", "\n", " "]


def held(**params: Any) -> Held:
    asked = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **params)
    return Held(Stops(), lambda _: asked)


def said(of: Held, *tokens: int, row: str = "row", **more: Any) -> list[list[int]]:
    return [one.new_token_ids for one in of.pass_on([EngineCoreOutput(row, list(tokens), **more)])]


def test_a_row_is_heard_of_at_its_end() -> None:
    rows = held()
    assert said(rows, 1) == said(rows, 2) == []
    assert said(rows, 6, row="other") == []
    assert said(rows, 3, finish_reason=FinishReason.LENGTH) == [[1, 2, 3]]
    assert said(rows, 4, finish_reason=FinishReason.STOP) == [[4]], "what was passed on is not kept"


def test_what_the_prefix_cache_held_is_not_lost() -> None:
    rows = held()
    assert not rows.pass_on([EngineCoreOutput("row", [1], prefill_stats="of the prompt")])
    [output] = rows.pass_on([EngineCoreOutput("row", [2], finish_reason=FinishReason.STOP)])
    assert output.prefill_stats == "of the prompt"


def test_a_token_that_may_complete_a_stop_string_is_passed_on_at_once() -> None:
    rows = held(stop=["\n\n", "Input:"])
    assert said(rows, 1) == said(rows, 6) == []
    assert said(rows, COLON) == [[1, 6, COLON]]
    assert said(rows, NEWLINE) == [[NEWLINE]]


@pytest.mark.parametrize(("stop", "tokens"), [("é", [4, 5]), (" ", list(range(10)))])
def test_where_a_token_is_no_sure_sign_more_are_passed_on(stop: str, tokens: list[int]) -> None:
    assert [token for token in range(10) if Stops().may_complete([stop], token)] == tokens


def test_a_long_row_says_something_now_and_then() -> None:
    rows = held()
    heard = [said(rows, 1) for _ in range(2 * MOST_HELD)]
    assert [step for step, outputs in enumerate(heard, 1) if outputs] == [MOST_HELD, 2 * MOST_HELD]


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
def test_who_asked_for_each_token_gets_each_token(kind: RequestOutputKind) -> None:
    asked = SamplingParams(output_kind=kind)
    assert said(Held(Stops(), lambda _: asked), 1) == [[1]]


def test_an_aborted_row_leaves_nothing() -> None:
    rows = held()
    assert not said(rows, 1)
    rows.forget(["row", "unknown"])
    assert said(rows, 2, finish_reason=FinishReason.STOP) == [[2]]


async def test_answers_are_those_of_tokens_that_come_one_by_one(vllm_session: Session) -> None:
    """Rows with log-probabilities are not kept back; else they are the same rows."""

    def requests(name: str, *, one_by_one: bool) -> list[Request]:
        kinds = [Sampling(max_tokens=100), Sampling(max_tokens=100, stop=("e t", "\n")), Sampling(max_tokens=30, n=3)]
        return [
            Request(f"{name}-{i}", text_ids(i, 30), replace(kinds[i % 3], seed=1000 * i, logprobs=one_by_one))
            for i in range(30)
        ]

    together = await sample(vllm_session, *requests("together", one_by_one=False))
    singly = await sample(vllm_session, *requests("singly", one_by_one=True))
    bare = [[replace(each, logprob=None) for each in one.samples] for one in singly]
    assert bare == [list(one.samples) for one in together]
    reasons = {s.finish_reason for one in together for s in one.samples}
    assert reasons == {"stop", "length"}
