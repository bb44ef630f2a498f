"""From the death of vLLM's core to the first row again, over the time that the engine takes to start.

    python -m benchmarks.engine_recovery [--quick] [--rows 64] [--model FOLDER] > engine_recovery.json

Rows are put in flight on one engine, its core is killed with SIGKILL, and the clock runs until the first row that the
restarted engine answers. `times_start` is over the first start, with Ray's process around the engine;
`times_own_start` over what the restarted engine itself took, which shares the moment's load. Near 1, finding the death
out, suspecting the rows and sending them again cost nothing beside the start. The same rows were answered undisturbed
before: lost, doubled, failed and different ones are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Sequence
from typing import Any

from benchmarks.ratio import emit, ratio, spread
from cluster.fleet import start_engines, stop_engines
from cluster.placement import place
from cluster.pool import Pool
from cluster.session import ray_session
from engines.types import Completion, Outcome, Request, Sampling
from selfguide import load_recipe
from selfguide.api import engine_spec, load_student
from selfguide.progress import stderr_line

PROMPT_TOKENS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--model", default="random")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    args = parser.parse_args()
    args.repeats = 1 if args.quick else args.repeats
    start_s, repeats = asyncio.run(measure(args))
    ratios = {name: ratio([one[name] for one in repeats]) for name in ("times_start", "times_own_start")}
    first_row_s = spread([one["first_row_s"] for one in repeats])
    emit("engine_recovery", vars(args), ratios, start_s=start_s, first_row_s=first_row_s, repeats=repeats)
    if any(one["lost"] or one["doubled"] for one in repeats):
        raise SystemExit("rows were lost or doubled")


async def measure(args: argparse.Namespace) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the engine's first start, and what each kill did."""
    recipe = load_recipe("smoke", {"model.path": args.model})
    student, clock = load_student(recipe), asyncio.get_running_loop().time
    ids = student.tokenizer.encode("the river moved slowly past old stone houses while children counted boats " * 9)
    sampling = [Sampling(max_tokens=args.max_tokens, seed=1000 * row) for row in range(args.rows)]
    rows = [Request(f"row-{i}", ids[i : i + PROMPT_TOKENS], one) for i, one in enumerate(sampling)]
    with ray_session(recipe.cluster) as nodes:
        began = clock()
        placement = place(recipe.cluster, 1, nodes)
        fleet = await start_engines(engine_spec(recipe, student), recipe.cluster, placement)
        start_s = round(clock() - began, 2)
        stderr_line(f"engine started in {start_s} s")
        pool = Pool(fleet)
        undisturbed = [answer async for answer in pool.generate(rows)]
        try:
            repeats = [
                await kill_and_time(pool, fleet.actors[0], rows, undisturbed, start_s) for _ in range(args.repeats)
            ]
        finally:
            await pool.close()
            stop_engines(fleet)
    return start_s, repeats


async def kill_and_time(
    pool: Pool, actor: Any, rows: Sequence[Request], undisturbed: Sequence[Outcome], start_s: float
) -> dict[str, Any]:
    """Kills once all rows are in flight; an answer counts as "again" once the pool knows of the death."""
    clock, deaths = asyncio.get_running_loop().time, pool.counts.deaths
    answers: list[Outcome] = []
    first: list[float] = []

    async def collect() -> None:
        async for answer in pool.generate(rows):
            answers.append(answer)
            if pool.counts.deaths > deaths and not first:
                first.append(clock())

    job = asyncio.create_task(collect())
    while (await actor.stats.remote())[0].in_flight < len(rows):
        await asyncio.sleep(0.005)
    before = len(answers)
    core = await core_of(actor)
    killed = clock()
    os.kill(core, signal.SIGKILL)
    await job
    first_row_s, engine_start_s = first[0] - killed, (await pool.stats())[0].start_s
    result = compare(answers, undisturbed, rows) | {
        "answered_before": before, "first_row_s": round(first_row_s, 2), "all_rows_s": round(clock() - killed, 2),
        "times_start": round(first_row_s / start_s, 2), "engine_start_s": round(engine_start_s, 2),
        "times_own_start": round(first_row_s / engine_start_s, 2),
    }  # fmt: skip
    stderr_line(json.dumps(result))
    return result


async def core_of(actor: Any) -> int:
    """The child of the actor's process that holds the model."""
    for pid in (await actor.pids.remote())[1:]:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
            if file.read().startswith("VLLM::EngineCore"):
                return int(pid)
    raise SystemExit("the engine has no core in a process of its own; this vLLM is not the one that is measured here")


def compare(answers: Sequence[Outcome], undisturbed: Sequence[Outcome], rows: Sequence[Request]) -> dict[str, Any]:
    unique = {answer.id: answer for answer in answers}
    expected = {answer.id: answer for answer in undisturbed}
    return {
        "lost": len({row.id for row in rows} - unique.keys()),
        "doubled": len(answers) - len(unique),
        "failed": sum(not isinstance(answer, Completion) for answer in answers),
        "different": sum(texts(unique[name]) != texts(expected[name]) for name in unique.keys() & expected.keys()),
    }


def texts(answer: Outcome) -> list[str]:
    return [sample.text for sample in answer.samples] if isinstance(answer, Completion) else []


if __name__ == "__main__":
    main()
