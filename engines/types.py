"""The nouns that travel between the packages: plain frozen dataclasses, no heavy import.

Engines see token ids, never text templates; a request carries all that its answer may depend on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can mend. One line: what is wrong, where, and the remedy. Exit code 2."""


def travels(kind: type[T]) -> type[T]:
    """For what is sent by the thousand: pickled as its fields, in half the time of a frozen dataclass's own way."""
    values = attrgetter(*(one.name for one in fields(kind)))  # type: ignore[arg-type]

    def reduce(self: Any) -> tuple[type[T], tuple[Any, ...]]:
        return kind, values(self)

    kind.__reduce__ = reduce  # type: ignore[method-assign]
    return kind


@travels
@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one request. `temperature` 0 is greedy.

    `choices` constrains the output to one of the strings. `logprobs` asks for the cumulative log-probability of
    each sample (it doubles the sampler's cost, so it is off unless something reads it).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None
    choices: tuple[str, ...] = ()
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A finetuned student: LoRA weights, or full weights where `kind` is "full".

    `digest` is the sha256 of the weights and the adapter's name everywhere; `base_digest` is the digest of the model
    that it was trained on; `rank` is 0 for full weights.
    """

    digest: str
    url: str
    rank: int
    base_digest: str
    kind: Literal["lora", "full"] = "lora"


@travels
@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to sample from. `id` is unique within the caller's run; `prompt_ids` are token ids."""

    id: str
    prompt_ids: Sequence[int]
    sampling: Sampling
    adapter: AdapterRef | None = None


@travels
@dataclass(frozen=True, slots=True)
class Sample:
    """One completion. `logprob` is the sum over its tokens where the request asked for it, else None."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str
    logprob: float | None = None


@travels
@dataclass(frozen=True, slots=True)
class Completion:
    """The `n` samples of one request, in the order of their seeds. `cached_tokens` came from the prefix cache."""

    id: str
    samples: tuple[Sample, ...]
    cached_tokens: int = 0


@travels
@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Asks for the log-probability of each token of `completion_ids` after `prefix_ids`."""

    id: str
    prefix_ids: Sequence[int]
    completion_ids: Sequence[int]
    adapter: AdapterRef | None = None


@travels
@dataclass(frozen=True, slots=True)
class Score:
    """One natural-log probability per completion token."""

    id: str
    token_logprobs: tuple[float, ...]


@travels
@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """Asks how likely each of `choices` (token ids, none empty) is to follow `prefix_ids`."""

    id: str
    prefix_ids: Sequence[int]
    choices: Sequence[Sequence[int]]
    adapter: AdapterRef | None = None

    @property
    def one_pass(self) -> bool:
        """Whether the first tokens tell the choices apart, so that one forward pass of the prefix is enough."""
        return len({ids[0] for ids in self.choices}) == len(self.choices) <= MAX_ONE_PASS


@travels
@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """One natural-log probability per choice: of its first token where one pass was enough, else of all its tokens.

    Not normalised over the choices.
    """

    id: str
    logprobs: tuple[float, ...]
    cached_tokens: int = 0


@travels
@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The row failed, not the engine. `error` is a class of failure, `message` says what happened to this row.

    `error` is "refused" (the engine would not take it), "poison" (alone in flight when its engine died) or
    "adapter" (its adapter could not be loaded).
    """

    id: str
    error: Literal["refused", "poison", "adapter"]
    message: str


class EngineDead(Exception):
    """The engine can never answer again. Whoever holds it exits or builds it anew; its rows run elsewhere."""


Work = Request | ScoreRequest | ChoiceRequest
Outcome = Completion | Score | ChoiceScores | RequestFailed


def num_prompt_tokens(work: Work) -> int:
    """How many tokens it has to read."""
    if isinstance(work, Request):
        return len(work.prompt_ids)
    return len(work.prefix_ids) + (len(work.completion_ids) if isinstance(work, ScoreRequest) else 0)


def num_sequences(work: Work) -> int:
    """How many sequences an engine decodes for it."""
    return work.sampling.n if isinstance(work, Request) else 1


MAX_ONE_PASS = 128
"""Tokens whose log-probabilities vLLM gives for one position (its `MAX_LOGPROB_TOKEN_IDS`)."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """How simulated engines behave while nothing is wrong. Nothing of it costs time by default."""

    answer_tokens: float = 8.0
    """Mean length of an answer, tokens, of which each is a word; `max_tokens` cuts the long ones."""
    answer_spread: float = 0.4
    """Spread of the lengths: standard deviation of their natural logarithm; 0: all are alike."""
    prefill_tokens_per_s: float = 0.0
    """Prompt tokens that one engine reads in a second, one prompt after another; 0 reads at once."""
    prefix_cache_tokens: int = 0
    """Prompt tokens that one engine keeps, the last used ones; it does not read them again. 0: none."""
    start_s: float = 0.0
    """Mean time until an engine serves, seconds."""
    start_spread: float = 0.0
    """Spread of the start-up times, as `answer_spread`."""
    adapter_load_s: float = 0.0
    """Seconds to load an adapter or other weights."""

    def __post_init__(self) -> None:
        _check_not_negative(self)
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens is {self.answer_tokens}; an answer has a token at least")


@dataclass(frozen=True, slots=True)
class Faults:
    """What a simulated engine does wrong, all of it seeded by the run, the engine's number and its life. By default
    nothing. Shares are 0 to 1."""

    die_after: int = 0
    """Die after this many answers; 0 is never. Counts anew in each life, up to `deaths`."""
    deaths: int = 1
    """How many lives end by `die_after`, of all engines together where `marker` counts them, else of each engine."""
    marker: str = ""
    """A folder where a simulated engine writes down its deaths, so that its next life knows of them."""
    mean_life_s: float = 0.0
    """Die at a random moment, in the mean after this many seconds from the life's first request on; 0 is never."""
    poison: tuple[int, ...] = ()
    """A request whose prompt holds this run of token ids kills the engine."""
    hang_after: int = 0
    """Stop answering after this many answers; 0 is never."""
    nan_after: int = 0
    """After this many answers log-probabilities are NaN, which kills the engine; 0 is never. In every life."""
    wrong_after: int = 0
    """After this many answers texts and log-probabilities are others than they should be, until the engine is built
    anew; 0 is never."""
    refuse_share: float = 0.0
    """The share of requests that fail on their own, by their prompt."""
    slow_share: float = 0.0
    """The share of engines that are slow, all their lives."""
    slow_factor: float = 10.0
    """How many times as long a slow engine takes for everything."""

    def __post_init__(self) -> None:
        _check_not_negative(self)
        if self.refuse_share > 1 or self.slow_share > 1:
            raise ValueError("refuse_share and slow_share are shares: 0 to 1")
        if self.slow_factor < 1:
            raise ValueError(f"slow_factor is {self.slow_factor}; a slow engine takes at least 1 times as long")


def _check_not_negative(section: Simulation | Faults) -> None:
    for one in fields(section):
        value = getattr(section, one.name)
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{one.name} is {value}; it is 0 or more")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that an engine process needs to start. Tokens, unless the name says otherwise."""

    model: str
    kind: Literal["vllm", "simulated"] = "vllm"
    dtype: str = "auto"
    revision: str | None = None
    tensor_parallel: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    gpu_memory_utilization: float = 0.85
    kv_cache_gib: float = 1.0
    """Size of the key-value cache of the CPU build; on a GPU `gpu_memory_utilization` decides."""
    block_size: int | None = None
    max_loras: int = 4
    max_lora_rank: int = 16
    adapter_cache_gib: float = 50.0
    """What adapters fetched from an object store may take on a node's disk, those in use aside."""
    enforce_eager: bool = False
    seed: int = 0
    per_actor: int = 1
    """Simulated engines only: how many share a process."""
    tokens_per_s: float = 0.0
    """Simulated engines only: output tokens per second and sequence; 0 answers at once."""
    simulation: Simulation = field(default_factory=Simulation)
    faults: Faults = field(default_factory=Faults)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started. `progress` rises whenever the engine has done a step.

    The seconds are of the engine's place, over all its lives in one process: with a row inside, sequence-seconds in
    the engine's slots, asleep by plan, and awake. `sequences` are inside now, of all clients.
    """

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    in_flight: int
    progress: int
    start_s: float
    busy_s: float = 0.0
    sequence_s: float = 0.0
    asleep_s: float = 0.0
    awake_s: float = 0.0
    sequences: int = 0
    life: int = 1


class Engine(Protocol):
    """What the pool's actors drive. Outcomes come as they finish, in lists, one for each request.

    `generate` and `score` raise `EngineDead` where the engine is beyond help; anything wrong with one row is a
    `RequestFailed` of that row.
    """

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[list[Outcome]]: ...

    def score(self, requests: Sequence[ScoreRequest | ChoiceRequest]) -> AsyncIterator[list[Outcome]]: ...

    def serves(self, ref: AdapterRef | None) -> bool:
        """Whether requests with this adapter (None: the untuned student) can be sent now."""
        ...

    async def load_adapter(self, ref: AdapterRef | None) -> None: ...

    async def abort(self, ids: Sequence[str]) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> None: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """One finetuning job. `base_digest` and `seed` go into the adapter's identity; lengths are tokens."""

    model: str
    base_digest: str
    method: Literal["lora", "full"] = "lora"
    revision: str | None = None
    dtype: str = "auto"
    epochs: int = 3
    min_steps: int = 0
    """Tiny sets train for more epochs until this many optimizer steps are done."""
    learning_rate: float = 2e-4
    scheduler: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 2048
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    gradient_checkpointing: bool = False
    seed: int = 42
    canary_rows: int = 8
    """How many training rows are scored before and after, to prove the adapter in the engine later."""
    keep_epochs: bool = False
    """Keep the checkpoint of every epoch (a search over epochs wants them)."""
    simulated_tokens_per_s: float = 0.0
    """Train nothing, but take as long as this many training tokens a second would; 0 trains."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A training row and its completion's token log-probabilities by the trainer, before and after training."""

    prefix_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    base_logprobs: tuple[float, ...]
    tuned_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """`checkpoints` are in epoch order, the last one is final. `loss_curve` holds {step, epoch, loss}.

    `epoch_logprobs`, where every epoch was kept: for each checkpoint the trainer's log-probabilities of each canary.
    """

    checkpoints: tuple[AdapterRef, ...]
    loss_curve: tuple[Mapping[str, float], ...]
    tokens: int
    completion_tokens: int
    steps: int
    epochs: int
    rows: int
    train_s: float
    canaries: tuple[Canary, ...]
    epoch_logprobs: tuple[tuple[tuple[float, ...], ...], ...] = ()
