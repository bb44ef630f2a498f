"""One stage of one task as SELF-GUIDE's authors run it, in a process of its own.

    python -m benchmarks.authors_flow STAGE TASK.json FOLDER --recipe smoke

Each stage starts an engine (vLLM's `LLM`) or a trainer (TRL), does its work, and ends: inputs in rounds of ten, each
round waiting for all of the one before; outputs of all inputs in one call; training; one evaluation for each set of
weights. Prompts, filters, sampling and limits are this project's and the recipe's, so that the rows are as many and as
long as in a sweep. What a stage leaves for the next lies in the folder. Prints seconds of start and work, and counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.types import AdapterRef
from selfguide import load_recipe, load_task, metrics
from selfguide.api import idle_run, load_student
from selfguide.config import Sampling
from selfguide.finetuning import train_spec
from selfguide.recipefile import parse_change
from selfguide.store import RunStore
from selfguide.taskrun import TaskRun

STAGES = ("inputs", "outputs", "evaluate_base", "train", "evaluate_tuned")
"""In their order: what is evaluated is the tuned student once there is one."""
ROUND = 10
Json = dict[str, Any]


@dataclass
class Clock:
    """`spawned` is when the parent started this process, seconds since the epoch."""

    spawned: float
    ready: float = 0.0

    def start(self) -> None:
        self.ready = time.time()

    def read(self) -> Json:
        return {"start_s": self.ready - self.spawned, "work_s": time.time() - self.ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("task", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="smoke")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--spawned", type=float, default=time.time())
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, dict(map(parse_change, args.set)))
    run = idle_run(load_task(args.task), recipe, load_student(recipe), RunStore(args.folder / "unused", create=False))
    clock = Clock(args.spawned)
    stages = {"inputs": write_inputs, "outputs": write_outputs, "train": train}
    counts = stages.get(args.stage, evaluate)(run, args.folder, clock)
    print(json.dumps({"stage": args.stage, **clock.read(), **counts}), file=sys.stdout, flush=True)


def start_engine(run: TaskRun, clock: Clock, *, lora: bool = False) -> Any:
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    for name, value in {**defaults, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.platforms import current_platform

    engine = run.recipe.engine
    args: Json = {"enable_lora": True, "max_lora_rank": run.recipe.finetuning.lora_rank} if lora else {}
    if current_platform.is_cpu():
        longest = max(engine.max_num_batched_tokens, run.student.max_model_len)
        args |= {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
    else:
        longest = engine.max_num_batched_tokens
        args |= {"gpu_memory_utilization": engine.gpu_memory_utilization}
    llm = LLM(
        run.student.folder, max_model_len=run.student.max_model_len, max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=longest, **args,
    )  # fmt: skip
    clock.start()
    return llm


def ask(
    run: TaskRun, llm: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, purpose: str, first: int = 0,
    n: int = 1, choices: Sequence[str] = (), **more: Any,
) -> list[list[Any]]:  # fmt: skip
    """The samples of each prompt; rows are numbered from `first` on."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = [
        SamplingParams(
            n=n, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
            max_tokens=sampling.max_tokens, stop=[*sampling.stop, *run.prompts.stops],
            seed=run.row_seed(purpose, row) if sampling.temperature else None,
            structured_outputs=StructuredOutputsParams(choice=list(choices)) if choices else None,
        )
        for row in range(first, first + len(prompts))
    ]  # fmt: skip
    asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
    return [list(one.outputs) for one in llm.generate(asked, params, use_tqdm=False, **more)]


def write_inputs(run: TaskRun, folder: Path, clock: Clock) -> Json:
    from selfguide.filters.chain import InputJudge

    llm, judge, config = start_engine(run, clock), InputJudge(run.filters, run.context("input")), run.recipe.synthesis
    accepted: list[Json] = []
    tokens = 0
    for first in range(0, config.num_candidates, ROUND):
        rows = range(first, min(first + ROUND, config.num_candidates))
        drawn = [draw_input(run, row, accepted) for row in rows]
        answers = ask(run, llm, [ids for ids, _ in drawn], config.sampling, "input", first)
        texts = [run.prompts.parse_input(one.text) for [one] in answers]
        sizes, ends = [len(one.token_ids) for [one] in answers], [str(one.finish_reason) for [one] in answers]
        tokens += sum(sizes)
        for (_, label), text, verdict in zip(drawn, texts, judge.judge(texts, sizes, ends), strict=True):
            if verdict is None:
                accepted.append({"input": text, "label": label})
    (folder / "inputs.json").write_text(json.dumps(accepted))
    return {"candidates": config.num_candidates, "accepted": len(accepted), "output_tokens": tokens}


def draw_input(run: TaskRun, row: int, accepted: Sequence[Json]) -> tuple[Sequence[int], str | None]:
    """Prompt and label; demonstrations are drawn from all earlier rounds."""
    config, draw = run.recipe.synthesis, random.Random(run.row_seed("demonstrations", row))
    label = draw.choice(run.task.labels) if run.is_classification else None
    most = min(len(accepted), config.max_demonstrations)
    shown = draw.sample(accepted, draw.randint(1, most)) if most else []
    pairs = [(one["input"], one["label"]) for one in shown]
    return run.prompts.new_input(row % config.gold_orders, pairs, label, config.sampling.max_tokens).ids, label


def write_outputs(run: TaskRun, folder: Path, clock: Clock) -> Json:
    import polars as pl

    from selfguide.filters.chain import PairJudge, judge_set, pairs_table

    llm, config, context = start_engine(run, clock), run.recipe.annotation, run.context("output")
    inputs = json.loads((folder / "inputs.json").read_text())
    prompts = [run.prompts.answer(one["input"], config.sampling.max_tokens).ids for one in inputs]
    choices = run.prompts.choices if run.is_classification and config.constrain_labels else ()
    answers = ask(run, llm, prompts, config.sampling, "output", n=config.num_samples, choices=choices)
    rows = [{**one, "row": row, "samples": list(map(_stored(run), answers[row]))} for row, one in enumerate(inputs)]
    judged = judge_set(PairJudge(run.filters, context).judge(pairs_table(rows)), run.filters.sets, context)
    kept = judged.filter(pl.col("filter").is_null()).select("input", "text").rows()
    length, shown = run.recipe.finetuning.max_length, run.num_demonstrations
    pairs = [run.prompts.training(text, output, length, shown) for text, output in kept]
    pl.DataFrame(
        {"input_ids": [list(ids) for ids, _ in pairs], "prompt_tokens": [cut for _, cut in pairs]}
    ).write_parquet(folder / "train.parquet")
    samples = [one for found in answers for one in found]
    tokens = sum(len(one.token_ids) for one in samples)
    return {"samples": len(samples), "kept": len(kept), "output_tokens": tokens}


def _stored(run: TaskRun) -> Any:
    def store(one: Any) -> Json:
        text = run.prompts.parse_output(one.text)
        return {"text": text, "finish_reason": str(one.finish_reason), "tokens": len(one.token_ids), "logprob": None}

    return store


def train(run: TaskRun, folder: Path, clock: Clock) -> Json:
    import peft  # noqa: F401
    import trl  # noqa: F401

    from engines import sft

    clock.start()
    work = folder / "trainer"
    work.mkdir()
    result = sft.train(train_spec(run), folder / "train.parquet", work)
    last: AdapterRef = result.checkpoints[-1]
    (folder / "adapter.json").write_text(json.dumps(last.url))
    return {"steps": result.steps, "rows": result.rows, "train_tokens": result.tokens}


def evaluate(run: TaskRun, folder: Path, clock: Clock) -> Json:
    """The untuned student, or the tuned one where the trainer has been."""
    from vllm.lora.request import LoRARequest

    tuned = (folder / "adapter.json").is_file()
    llm, config = start_engine(run, clock, lora=tuned), run.recipe.evaluation
    more = {"lora_request": LoRARequest("tuned", 1, json.loads((folder / "adapter.json").read_text()))} if tuned else {}
    rows = run.evaluation_instances
    prompts = [run.prompts.answer(one.input, config.sampling.max_tokens, run.num_demonstrations).ids for one in rows]
    choices = run.prompts.choices if run.is_classification and config.constrain_labels else ()
    answers = ask(run, llm, prompts, config.sampling, "evaluation", choices=choices, **more)
    predictions = [run.prompts.parse_output(one.text) for [one] in answers]
    metrics.score_rows(predictions, [one.references for one in rows])
    return {"rows": len(rows), "output_tokens": sum(len(one.token_ids) for [one] in answers)}


if __name__ == "__main__":
    main()
