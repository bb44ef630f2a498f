"""What a simulated engine answers, apart from when: texts and log-probabilities out of hashes.

An answer depends on the prompt, the sampling parameters and the adapter alone: never on order, time, batch or engine.
The lower the temperature, the more samples are the greedy answer, so that votes find a majority.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b, shake_128
from math import exp
from statistics import NormalDist

from engines.types import (
    AdapterRef,
    ChoiceRequest,
    ChoiceScores,
    Completion,
    Outcome,
    Request,
    RequestFailed,
    Sample,
    Sampling,
    Score,
    Work,
)

_WORDS = (
    8
    * (
        "the river moved slowly past old stone houses while children counted boats and nobody asked why morning light "
        "felt warmer than yesterday because a letter from far away had come home again"
    ).split()
)
"""A word for each byte."""
_CUT = 5
"""Of 256 answers, those that do not end by themselves."""
_ID_BYTES = array("i").itemsize
_BLOCK_BYTES = 64 * _ID_BYTES


class Prompt:
    """The token ids that a request has read, as bytes: once for all that is asked of them."""

    __slots__ = ("content", "digest", "num_tokens")

    def __init__(self, work: Work) -> None:
        if isinstance(work, Request):
            self.content = pack(work.prompt_ids)
        elif isinstance(work, ChoiceRequest):
            self.content = pack(work.prefix_ids)
        else:
            self.content = pack(work.prefix_ids) + pack(work.completion_ids)
        self.digest = blake2b(self.content, digest_size=16).digest()
        self.num_tokens = len(self.content) // _ID_BYTES


def pack(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def answer(
    work: Work, prompt: Prompt, lengths: Sequence[int], *, refuse_share: float, salt: bytes, cached_tokens: int
) -> tuple[Outcome, Sequence[int]]:
    """The outcome, and how many tokens each of its sequences takes to write. `salt` makes it another answer."""
    if refuse_share and int.from_bytes(prompt.digest[:8], "big") < refuse_share * 2**64:
        return RequestFailed(work.id, "refused", "refused as ordered"), (0,)
    key = salt + prompt.digest + _name(work.adapter)
    if isinstance(work, Request):
        samples = _sample_all(work.sampling, key, lengths)
        return Completion(work.id, samples, cached_tokens), [len(sample.token_ids) for sample in samples]
    if isinstance(work, ChoiceRequest):
        # Of each choice by itself: the order of the choices changes nothing.
        logprobs = tuple(-10 * _share(blake2b(key + pack(ids), digest_size=8).digest()) for ids in work.choices)
        return ChoiceScores(work.id, logprobs, cached_tokens), (1,)
    return Score(work.id, _token_logprobs(key, len(work.completion_ids))), (1,)


def score_tokens(prefix: Sequence[int], completion: Sequence[int], adapter: AdapterRef | None) -> tuple[float, ...]:
    """What every simulated engine in its right mind answers to this `ScoreRequest`."""
    digest = blake2b(pack(prefix) + pack(completion), digest_size=16).digest()
    return _token_logprobs(digest + _name(adapter), len(completion))


@cache
def length_table(mean: float, spread: float) -> tuple[int, ...]:
    """Lengths of 1,024 equally likely answers, lognormal, in order."""
    quantile = NormalDist().inv_cdf
    factors = (exp(spread * quantile((i + 0.5) / 1024) - spread**2 / 2) for i in range(1024))
    return tuple(max(1, round(mean * factor)) for factor in factors)


class PrefixCache:
    """Which prompts an engine still remembers, in blocks of 64 tokens; what was used last stays longest."""

    def __init__(self, num_tokens: int) -> None:
        self._most = num_tokens * _ID_BYTES // _BLOCK_BYTES
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def read(self, prompt: Prompt, adapter: AdapterRef | None) -> int:
        """How many of the first tokens are known, never all of them; from now on the prompt is."""
        if not self._most:
            return 0
        content, blocks = prompt.content, self._blocks
        chain, known = hash(_name(adapter)), 0
        chains: list[int] = []
        for start in range(0, len(content) - _BLOCK_BYTES, _BLOCK_BYTES):
            chain = hash((chain, content[start : start + _BLOCK_BYTES]))
            known += chain in blocks and known == len(chains)
            chains.append(chain)
        for chain in reversed(chains):  # a block is of use only while those before it are there
            blocks[chain] = None
            blocks.move_to_end(chain)
        while len(blocks) > self._most:
            blocks.popitem(last=False)
        return known * _BLOCK_BYTES // _ID_BYTES


def _name(adapter: AdapterRef | None) -> bytes:
    return adapter.digest.encode() if adapter is not None else b""


def _sample_all(sampling: Sampling, key: bytes, lengths: Sequence[int]) -> tuple[Sample, ...]:
    sure = 256 * (1 - sampling.temperature)
    greedy = _sample(sampling, blake2b(key).digest(), lengths) if sure > 0 else None
    if greedy is not None and sure >= 256:
        return (greedy,) * sampling.n
    samples, seed = [], sampling.seed or 0
    for number in range(seed, seed + sampling.n):
        draw = blake2b(b"%b/%d" % (key, number)).digest()
        samples.append(greedy if greedy is not None and draw[0] < sure else _sample(sampling, draw, lengths))
    return tuple(samples)


def _sample(sampling: Sampling, draw: bytes, lengths: Sequence[int]) -> Sample:
    """From 64 random bytes: one decides between this answer and the greedy one, the next seven on its shape."""
    logprob = -10 * _share(draw[56:]) if sampling.logprobs else None
    if sampling.choices:
        text = sampling.choices[int.from_bytes(draw[1:5], "big") % len(sampling.choices)]
        return Sample(text, range(len(text.split())), "stop", logprob)
    wanted = lengths[(draw[1] << 2) | (draw[2] >> 6)]
    length = min(wanted, sampling.max_tokens)
    letters = draw[8 : 8 + length] if length <= 48 else shake_128(draw).digest(length)
    reason = "length" if length < wanted or draw[3] < _CUT else "stop"
    return Sample(" ".join([_WORDS[letter] for letter in letters]), range(length), reason, logprob)


def _share(draw: bytes) -> float:
    return int.from_bytes(draw, "big") / 2**64


def _token_logprobs(key: bytes, count: int) -> tuple[float, ...]:
    return tuple([-(value + 1) / 65536 for value in array("H", shake_128(key).digest(2 * count))])
