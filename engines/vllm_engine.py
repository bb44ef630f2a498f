"""The only file that knows vLLM: an `AsyncLLM` behind the `Engine` protocol.

Written against vLLM 0.32, CPU and GPU builds. Limits are always passed: `AsyncLLM` and `LLM` resolve different
defaults. `EngineDead` means that this process must exit; the pool starts another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

from engines.adapter_cache import bring_near, touch
from engines.adapters import BadAdapter, check_adapter, check_weights
from engines.models import context_length, linear_modules, resolve_model
from engines.streams import as_finished
from engines.types import (
    AdapterRef,
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineDead,
    EngineSpec,
    EngineStats,
    Outcome,
    Request,
    RequestFailed,
    Sample,
    Sampling,
    Score,
    ScoreRequest,
    Work,
)

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core runs the model itself: 40% less CPU, 5 s less start-up
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins every engine of a node to the same core
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
}


class VllmEngine:
    """One vLLM engine in this process (and its core in a child). Call from one event loop only."""

    def __init__(self, spec: EngineSpec) -> None:
        began = time.monotonic()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._spec = spec
        self._folder = resolve_model(spec.model, spec.revision)
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                **engine_args(spec, self._folder), scheduler_cls="engines.quiet_core.make_scheduler",
                disable_log_stats=True,
            )
        )  # fmt: skip
        self._progress = _listen(self._llm)
        self._loras: dict[str, Any] = {}
        self._lora_ids = itertools.count(1)
        self._full: AdapterRef | None = None
        self._counts = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0, "output_tokens": 0, "in_flight": 0}
        _settle()
        self._start_s = time.monotonic() - began

    def serves(self, ref: AdapterRef | None) -> bool:
        """Whether requests with this adapter can be sent now; if not, `load_adapter` (weights: nothing in flight)."""
        if ref is None or ref.kind == "full":
            return self._full == ref
        lora = self._loras.get(ref.digest)
        # vLLM reads an adapter again that it has dropped from its own memory.
        return self._full is None and lora is not None and touch(Path(lora.lora_path))

    async def load_adapter(self, ref: AdapterRef | None) -> None:
        """Makes `ref` (None: the untuned student) servable. Raises `BadAdapter`; the engine survives that."""
        if self.serves(ref):
            return
        if ref is None or ref.kind == "full":
            await self._load_weights(ref)
            return
        if self._full is not None:
            await self._load_weights(None)
        ref = await asyncio.to_thread(bring_near, ref, self._spec.adapter_cache_gib)
        await asyncio.to_thread(check_adapter, ref, self._folder, self._spec.max_lora_rank)
        from vllm.lora.request import LoRARequest

        # Ids rise from 1 and are never used again: vLLM serves the old weights for a known id, silently.
        lora = LoRARequest(lora_name=ref.digest, lora_int_id=next(self._lora_ids), lora_path=ref.url)
        try:
            await self._llm.add_lora(lora)
        except Exception as error:  # what the core raises comes without its type
            if self._llm.errored:
                raise EngineDead(str(error)) from error
            raise BadAdapter(f"{ref.url}: vLLM cannot load it ({error})") from error
        self._loras[ref.digest] = lora

    async def _load_weights(self, ref: AdapterRef | None) -> None:
        path = str(self._folder)
        if ref is not None:
            near = await asyncio.to_thread(bring_near, ref, self._spec.adapter_cache_gib)
            await asyncio.to_thread(check_weights, near, self._folder)
            path = near.url
        try:
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            await self._llm.reset_prefix_cache()
        except Exception as error:  # half of the old weights and half of the new answer rubbish
            raise EngineDead(f"{path}: not loaded: {error}") from error
        self._full = ref

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[list[Outcome]]:
        async for outcomes in as_finished([self._guard(r, self._sample(r)) for r in requests]):
            yield outcomes

    async def score(self, requests: Sequence[ScoreRequest | ChoiceRequest]) -> AsyncIterator[list[Outcome]]:
        work = [self._score(r) if isinstance(r, ScoreRequest) else self._weigh(r) for r in requests]
        async for outcomes in as_finished([self._guard(r, one) for r, one in zip(requests, work, strict=True)]):
            yield outcomes

    async def _guard(self, request: Work, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """One row's own failure is its outcome; the engine's death is raised."""
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._counts["in_flight"] += 1
        try:
            return await work
        except EngineDeadError as error:
            raise EngineDead(str(error)) from error
        except EngineGenerateError as error:
            if self._llm.errored:
                raise EngineDead(str(error.__cause__)) from error
            return RequestFailed(request.id, "refused", f"{type(error.__cause__).__name__}: {error.__cause__}")
        except (ValueError, VLLMValidationError) as error:
            return RequestFailed(request.id, "refused", str(error))
        finally:
            self._counts["in_flight"] -= 1

    async def _sample(self, request: Request) -> Outcome:
        output = await self._run(request.id, request.prompt_ids, sampling_params(request.sampling), request.adapter)
        samples = tuple(
            Sample(o.text, list(o.token_ids), str(o.finish_reason), _finite(o.cumulative_logprob))
            for o in output.outputs
        )
        self._counts["output_tokens"] += sum(len(sample.token_ids) for sample in samples)
        return Completion(request.id, samples, output.num_cached_tokens or 0)

    async def _score(self, request: ScoreRequest) -> Outcome:
        """Reads the prefix cache, many times faster, and checks that no cached position was taken for a score."""
        if not request.completion_ids or not request.prefix_ids:
            return RequestFailed(request.id, "refused", "nothing to score: prefix and completion need a token each")
        params = scoring_params(len(request.completion_ids))
        ids = [*request.prefix_ids, *request.completion_ids]
        output = await self._run(request.id, ids, params, request.adapter)
        logprobs = completion_logprobs(output, request)
        if logprobs is None:
            params.skip_reading_prefix_cache = True
            output = await self._run(f"{request.id}/again", ids, params, request.adapter)
            logprobs = completion_logprobs(output, request)
        if logprobs is None:
            return RequestFailed(request.id, "refused", "vLLM returned no log-probabilities for the completion")
        return Score(request.id, tuple(_finite(value) or 0.0 for value in logprobs))

    async def _weigh(self, request: ChoiceRequest) -> Outcome:
        if not request.prefix_ids or not request.choices or not all(request.choices):
            return RequestFailed(request.id, "refused", "nothing to weigh: prefix and choices need a token each")
        if not request.one_pass:
            return await self._weigh_whole(request)
        first = [ids[0] for ids in request.choices]
        output = await self._run(request.id, request.prefix_ids, _first_token_params(first), request.adapter)
        found = (output.outputs[0].logprobs or [{}])[0]
        if missing := [token for token in first if token not in found]:
            return RequestFailed(request.id, "refused", f"vLLM returned no log-probabilities for tokens {missing}")
        logprobs = tuple(_finite(float(found[token].logprob)) or 0.0 for token in first)
        return ChoiceScores(request.id, logprobs, output.num_cached_tokens or 0)

    async def _weigh_whole(self, request: ChoiceRequest) -> Outcome:
        """Choices that begin alike, one after another, so that all but the first find their prefix cached."""
        logprobs = []
        for number, ids in enumerate(request.choices):
            part = ScoreRequest(f"{request.id}/{number}", request.prefix_ids, ids, request.adapter)
            outcome = await self._score(part)
            if not isinstance(outcome, Score):
                return dataclasses.replace(outcome, id=request.id)
            logprobs.append(math.fsum(outcome.token_logprobs))
        return ChoiceScores(request.id, tuple(logprobs))

    async def _run(self, request_id: str, ids: Sequence[int], params: Any, adapter: AdapterRef | None) -> Any:
        lora = self._loras[adapter.digest] if adapter is not None and adapter.kind == "lora" else None
        final = None
        prompt = {"type": "token", "prompt_token_ids": list(ids)}  # as vLLM's renderer would hand it on
        async for output in self._llm.generate(prompt, params, request_id, lora_request=lora):
            final = output
        assert final is not None
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(ids)
        self._counts["cached_tokens"] += final.num_cached_tokens or 0
        return final

    async def abort(self, ids: Sequence[str]) -> None:
        """Stops these requests; their answers come at once, with finish_reason "abort"."""
        await self._llm.abort(list(ids))

    async def sleep(self) -> None:
        """Gives the accelerator's memory back once nothing is in flight (vLLM sleep mode, level 1)."""
        await self._llm.sleep(1, mode="wait")

    async def wake(self) -> None:
        await self._llm.wake_up()

    def stats(self) -> EngineStats:
        return EngineStats(**self._counts, progress=self._progress.steps, start_s=self._start_s)

    def close(self) -> None:
        self._llm.shutdown()


@dataclasses.dataclass(slots=True)
class _Progress:
    steps: int = 0


def _listen(llm: Any) -> _Progress:
    """The engine's pulse: counts what the core says, which is something at least every `MOST_HELD` steps. vLLM's own
    counters, for which there is a hook, take longer than the rest of a small step."""
    progress, hear = _Progress(), llm.engine_core.get_output_async

    async def count() -> Any:
        said = await hear()
        progress.steps += 1
        return said

    llm.engine_core.get_output_async = count
    return progress


def _settle() -> None:
    """What vLLM does in its own server and core, and not for an `AsyncLLM`: modules and configs are not looked through
    again at each collection of garbage, and the environment is read once."""
    from vllm.envs import enable_envs_cache
    from vllm.utils.gc_utils import freeze_gc_heap

    from engines.quiet_core import collect_seldom

    freeze_gc_heap()
    collect_seldom()
    enable_envs_cache()


def engine_args(spec: EngineSpec, folder: Path) -> dict[str, Any]:
    """What vLLM is started with; on CPUs it also sets the size of the key-value cache in this process's environment."""
    from vllm.platforms import current_platform

    args: dict[str, Any] = {
        "model": str(folder), "dtype": spec.dtype, "tensor_parallel_size": spec.tensor_parallel,
        "max_model_len": spec.max_model_len, "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": spec.max_num_batched_tokens, "enforce_eager": spec.enforce_eager,
        "seed": spec.seed, "trust_remote_code": False, "load_format": "safetensors", "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }  # fmt: skip
    if spec.block_size:
        args["block_size"] = spec.block_size
    if spec.max_loras:
        rank = next((r for r in _LORA_RANKS if r >= spec.max_lora_rank), None)
        if rank is None:
            raise ValueError(
                f"max_lora_rank {spec.max_lora_rank} is above {_LORA_RANKS[-1]}, the most that vLLM serves"
            )
        args |= {"enable_lora": True, "max_loras": spec.max_loras, "max_lora_rank": rank}
        # With a LoRA wrapper around the output head, prompt log-probabilities of two rows in one step kill the core.
        args |= {"max_cpu_loras": 4 * spec.max_loras, "lora_target_modules": linear_modules(folder) or None}
    if current_platform.is_cpu():
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(spec.kv_cache_gib)))
        args["enforce_eager"] = True
        if spec.max_loras:
            args["worker_extension_cls"] = "engines.cpu_lora.GroupedLora"
        # A seeded row whose prompt is cut into chunks kills the core (CPU generators have no offset): whole prompts.
        longest = spec.max_model_len or context_length(folder)
        args |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(spec.max_num_batched_tokens, longest)}
        if spec.dtype == "auto":
            args["dtype"] = "float32"  # as the trainer computes there; "auto" would choose bfloat16
    else:
        args |= {"gpu_memory_utilization": spec.gpu_memory_utilization, "enable_sleep_mode": True}
        if spec.tensor_parallel > 1:
            args["distributed_executor_backend"] = "mp"  # inside a placement group vLLM would pick "ray"
    return args


def sampling_params(sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    return SamplingParams(
        n=sampling.n, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
        max_tokens=sampling.max_tokens, stop=list(sampling.stop) or None,
        seed=sampling.seed if sampling.temperature else None,
        logprobs=0 if sampling.logprobs else None, output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(choice=list(sampling.choices)) if sampling.choices else None,
    )  # fmt: skip


def scoring_params(num_scored: int) -> Any:
    """Log-probabilities of the prompt's last `num_scored` tokens. Positions that the prefix cache holds are not
    computed and mean nothing. Flat: a dict for each position costs more than the forward pass."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from engines.quiet_core import KEPT

    return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
                          skip_reading_prefix_cache=False, output_kind=RequestOutputKind.FINAL_ONLY,
                          extra_args={KEPT: num_scored})  # fmt: skip


def _first_token_params(tokens: Sequence[int]) -> Any:
    """One token is decoded and thrown away: what counts are the log-probabilities of `tokens` in its place."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=list(tokens), detokenize=False,
                          output_kind=RequestOutputKind.FINAL_ONLY)  # fmt: skip


def completion_logprobs(output: Any, request: ScoreRequest) -> list[float] | None:
    """The last of the prompt's log-probabilities; None where they are leftovers of the cache, not the completion's."""
    found, count = output.prompt_logprobs, len(request.completion_ids)
    if (output.num_cached_tokens or 0) > len(request.prefix_ids) - 1:
        return None
    # One entry for each position but the first: of the token that stands there.
    if not found or list(found.token_ids[-count:]) != list(request.completion_ids):
        return None
    return list(found.logprobs[-count:])


def _finite(logprob: float | None) -> float | None:
    """A NaN means that the engine's memory holds NaN, and neighbours' answers are wrong too: scrap the engine."""
    if logprob is not None and math.isnan(logprob):
        raise EngineDead("a log-probability is NaN; the engine's key-value cache cannot be trusted any more")
    return logprob
