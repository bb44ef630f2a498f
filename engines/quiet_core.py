"""vLLM's scheduler, telling the front end of a row when there is something to do about it, not at every token.

After each step vLLM 0.32 sends the new token of each row from its core to the front end, which decodes it, looks for
stop strings and counts, also where only the whole answer is asked for (`RequestOutputKind.FINAL_ONLY`). Here the core
keeps such a row's tokens back until its end, until a token that may complete a stop string, or until there are
`MOST_HELD`. The front end then takes them all at once, as it takes those of speculative decoding, and makes the same
texts, tokens and reasons of them. Of a prompt's log-probabilities it sends those that are asked for: `KEPT` in a
request's `extra_args` says how many, from the end.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsTensors

KEPT = "prompt_logprobs_kept"
MOST_HELD = 64
"""Tokens of a row. Long rows are heard of now and then: an engine that says nothing is taken for dead."""
YOUNG_OBJECTS = 20_000
"""Before Python looks for garbage among them. After 700, its own number, it is at work 2 to 3% of the time: each step
has a few objects for every row."""


def make_scheduler(vllm_config: Any, **parts: Any) -> Any:
    """For `scheduler_cls`: vLLM calls what it names as it would call a class."""
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    scheduler = kind(vllm_config=vllm_config, **parts)
    _quieten(scheduler, StopTokens(vllm_config.model_config))
    collect_seldom()
    return scheduler


def collect_seldom() -> None:
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def _quieten(scheduler: Any, stops: StopTokens) -> None:
    update, finish = scheduler.update_from_output, scheduler.finish_requests

    def params(row: str) -> Any:
        request = scheduler.requests.get(row)
        return request.sampling_params if request is not None else None

    held = Held(stops, params)

    def update_quietly(scheduled: Any, computed: Any) -> dict[int, Any]:
        for row, scores in computed.prompt_logprobs_dict.items():
            computed.prompt_logprobs_dict[row] = cut(scores, params(row))
        messages: dict[int, Any] = update(scheduled, computed)
        for message in messages.values():
            message.outputs = held.pass_on(message.outputs)
        return {client: one for client, one in messages.items() if one.outputs or one.finished_requests}

    def finish_and_forget(*what: Any) -> Any:  # rows that are aborted
        ended = finish(*what)
        held.forget(request.request_id for request in ended)
        return ended

    scheduler.update_from_output, scheduler.finish_requests = update_quietly, finish_and_forget


class Held:
    """The tokens that are kept back. `params` has the parameters of a row that is under way, by its id in the core."""

    def __init__(self, stops: StopTokens, params: Callable[[str], SamplingParams | None]) -> None:
        self._stops, self._params = stops, params
        self._rows: dict[str, EngineCoreOutput] = {}

    def pass_on(self, outputs: Iterable[EngineCoreOutput]) -> list[EngineCoreOutput]:
        """Those of one step that the front end has to hear of, with what was kept back of their rows."""
        due = []
        for output in outputs:
            if (before := self._rows.get(output.request_id)) is not None:
                before.new_token_ids += output.new_token_ids
                output.new_token_ids = before.new_token_ids
                output.prefill_stats = before.prefill_stats
            if self._is_due(output):
                self._rows.pop(output.request_id, None)
                due.append(output)
            elif before is None:
                self._rows[output.request_id] = output
        return due

    def _is_due(self, output: EngineCoreOutput) -> bool:
        if output.finish_reason is not None or len(output.new_token_ids) >= MOST_HELD:
            return True
        params = self._params(output.request_id)
        if params is None or params.output_kind is not RequestOutputKind.FINAL_ONLY:
            return True
        if output.new_logprobs is not None or output.new_prompt_logprobs_tensors is not None:
            return True
        return bool(params.stop) and self._stops.may_complete(params.stop, output.new_token_ids[-1])

    def forget(self, ids: Iterable[str]) -> None:
        for one in ids:
            self._rows.pop(one, None)


def cut(scores: LogprobsTensors | None, params: SamplingParams | None) -> LogprobsTensors | None:
    """The last positions of those that a prompt has (one row for each), as many as are kept."""
    kept = params.extra_args.get(KEPT) if params is not None and params.extra_args else None
    if scores is None or not kept:
        return scores
    return LogprobsTensors(*(column[-kept:] for column in scores[:3]))


class StopTokens:
    """Tokens that may complete a stop string: those whose text has its last character in it."""

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._texts: list[str] = []
        self._ids: dict[str, frozenset[int]] = {}

    def may_complete(self, stops: str | Sequence[str], token: int) -> bool:
        """Rather once too often: vLLM looks for itself. A space may be part of any token, or made of none."""
        return any(stop[-1] == " " or token in self._with(stop[-1]) for stop in stops)

    def _with(self, character: str) -> frozenset[int]:
        if character not in self._ids:
            if not self._texts:
                tokenizer = cached_tokenizer_from_config(self._model_config)
                self._texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
            # A character beyond ASCII may be spread over tokens that are no text by themselves.
            signs = (character,) if character.isascii() else (character, "\N{REPLACEMENT CHARACTER}")
            found = (token for token, text in enumerate(self._texts) if any(sign in text for sign in signs))
            self._ids[character] = frozenset(found)
        return self._ids[character]
