"""The pool against vLLM alone: the same rows, limits, seeds and engine arguments, in turn, on a quiet machine.

    python -m benchmarks.bench_pool [--quick] [--workloads short shared] [--model FOLDER] > bench_pool.json

Contestants, each in processes of its own with a warm engine, idle while another is timed:

- pool: engine actor, client and store as a run uses them, from rows of token ids to parsed rows in a finished stage
- llm_generate: `vllm.LLM.generate` as a user writes it, its core in a process of its own; nothing is stored
- fastest: the same with the core in the caller's process

A ratio is the seconds of one of the two over the pool's, on the same rows; above 1 the pool was faster. Rows are drawn
anew for each repeat, so that all begin with a cache that knows nothing of them. `hits` is the pool's share of prompt
tokens from the prefix cache over the share that an endless cache would have. `seeds`: what per-request seeds cost,
seconds with over seconds without.

On a GPU all three engines share its memory; the suite's size "gpu" has the arguments for contexts of 4,000 tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.pool_contestants import CONTESTANTS, Answer, Contestant, Setup, Timing
from benchmarks.pool_workloads import (
    CACHED,
    TEXT,
    UNSEEDED,
    WORKLOADS,
    Drawer,
    Sizes,
    attainable_hits,
    write_adapters,
)
from benchmarks.ratio import emit, ratio, spread
from engines.types import EngineSpec
from selfguide import load_recipe
from selfguide.api import load_student
from selfguide.environment import environment
from selfguide.progress import stderr_line

NUM_ADAPTERS, RANK = 4, 16
FLOORS: dict[str, dict[bool, float | None]] = {
    "llm_generate": {False: 1.0, True: 0.98},
    "fastest": {False: 0.9, True: None},
}
"""By contestant, and whether there is a GPU."""
HITS_FLOOR = 0.95
QUIET_CORES, QUIET_S = 0.1, 0.3
"""The machine is quiet when less than this is busy for so long. vLLM's core spins for a second after its last row."""
CLOSE_NATS = 1e-3

Timings = dict[tuple[str, str, int], Timing]
"""By workload, contestant and repeat."""


def main() -> None:
    args = parse_args()
    names = [*args.workloads, *([UNSEEDED] if "short" in args.workloads else [])]
    with tempfile.TemporaryDirectory(prefix="selfguide-pool-") as folder, ExitStack() as ends:
        setup = make_setup(args, Path(folder))
        contestants = [ends.enter_context(closing(Contestant(name, setup))) for name in CONTESTANTS]
        timings, waits = measure(contestants, names, args.repeats, args.wait_s)
        block_size = contestants[-1].facts["block_size"]
        hits = {
            name: attainable_hits(setup.drawer.rows(name, 0), block_size) for name in args.workloads
        }  # fmt: skip
    ratios = compare(timings, args.workloads, args.repeats, hits, setup.on_gpu)
    emit(
        "pool", {**vars(args), "spec": asdict(setup.spec), "sizes": asdict(setup.drawer.sizes)}, ratios,
        contestants={one.name: one.facts for one in contestants}, attainable_hits=hits,
        speeds={name: speeds(timings, name, args.repeats) for name in names},
        agreement={name: agreement(timings, name, args.repeats) for name in names},
        seeds=price_of_seeds(timings, args.repeats) if UNSEEDED in names else None,
        driver_peak_bytes=max(t.peak_bytes for (_, who, _), t in timings.items() if who == "pool"),
        waited_s=spread(waits), num_noisy=sum(wait >= args.wait_s for wait in waits),
        seconds=seconds(timings, names, args.repeats),
    )  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, two repeats")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the rows of each workload")
    parser.add_argument("--prefix-tokens", type=int, default=Sizes.prefix_tokens)
    parser.add_argument("--model", default="random", help="a folder; random: a Llama of 2 layers")
    parser.add_argument("--threads", type=int, default=1, help="of the process that runs the model, on CPUs")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--wait-s", type=float, default=20.0, help="wait at most so long for a quiet machine")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.28)
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 5)
    args.scale *= 0.25 if args.quick else 1.0
    return args


def make_setup(args: argparse.Namespace, folder: Path) -> Setup:
    student = load_student(load_recipe("smoke", {"model.path": args.model}))
    spec = EngineSpec(
        model=student.folder, max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens, max_loras=NUM_ADAPTERS, max_lora_rank=RANK,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )  # fmt: skip
    adapters = write_adapters(folder, Path(student.folder), student.digest, NUM_ADAPTERS, RANK)
    alphabet = sorted(set(student.tokenizer.encode(TEXT)))
    sizes = replace(Sizes().times(args.scale), prefix_tokens=args.prefix_tokens)
    return Setup(spec, Drawer(sizes, alphabet, adapters), args.threads, on_gpu=bool(environment()["gpus"]))


def measure(
    contestants: Sequence[Contestant], workloads: Sequence[str], repeats: int, wait_s: float
) -> tuple[Timings, list[float]]:
    """Whoever was first in one repeat is last in the next. Repeat -1 warms up and is left out."""
    timings: Timings = {}
    waits = []
    for repeat in range(-1, repeats):
        turn = (repeat + 1) % len(contestants)
        for workload in workloads:
            for one in [*contestants[turn:], *contestants[:turn]]:
                waits.append(wait_until_quiet(wait_s))
                timing = one.time(workload, repeat)
                if repeat >= 0:
                    timings[workload, one.name, repeat] = timing
            taken = {one.name: timings[workload, one.name, repeat] for one in contestants if repeat >= 0}
            said = ", ".join(f"{name} {one.seconds:.2f} s" for name, one in taken.items())
            stderr_line(f"repeat {repeat} {workload}: {said or 'warm'}")
    return timings, waits


def wait_until_quiet(most_s: float) -> float:
    """Returns how long that took."""
    began, busy = time.monotonic(), math.inf
    while busy > QUIET_CORES and time.monotonic() - began < most_s:
        before, then = busy_s(), time.monotonic()
        time.sleep(QUIET_S)
        busy = (busy_s() - before) / (time.monotonic() - then)
    return round(time.monotonic() - began, 2)


def busy_s() -> float:
    """CPU seconds of all processes of this machine since it started."""
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split()[1:4]
    return (int(user) + int(nice) + int(system)) / 100


# ---- what came out


def compare(
    timings: Timings, workloads: Sequence[str], repeats: int, hits: Mapping[str, float], on_gpu: bool
) -> dict[str, dict[str, Any]]:
    ratios = {}
    for workload in workloads:
        pools = [timings[workload, "pool", repeat] for repeat in range(repeats)]
        for rival, floor in FLOORS.items():
            others = [timings[workload, rival, repeat] for repeat in range(repeats)]
            values = [other.seconds / pool.seconds for other, pool in zip(others, pools, strict=True)]
            ratios[f"{workload}/{rival}"] = ratio(values, floor=floor[on_gpu])
        if workload in CACHED:
            values = [pool.cached_tokens / pool.prompt_tokens / hits[workload] for pool in pools]
            ratios[f"{workload}/hits"] = ratio(values, floor=HITS_FLOOR)
    return ratios


def speeds(timings: Timings, workload: str, repeats: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name in CONTESTANTS:
        of = [timings[workload, name, repeat] for repeat in range(repeats)]
        found[name] = {
            "output_tokens_per_s": spread([one.output_tokens / one.seconds for one in of]),
            "prompt_tokens_per_s": spread([one.prompt_tokens / one.seconds for one in of]),
            "cpu_s": spread([one.cpu_s for one in of]),
            "prefix_hits": spread([one.cached_tokens / one.prompt_tokens for one in of]),
            "failed": sum(one.failed for one in of),
        }
    return found


def seconds(timings: Timings, workloads: Sequence[str], repeats: int) -> dict[str, dict[str, list[float]]]:
    return {
        name: {who: [round(timings[name, who, i].seconds, 3) for i in range(repeats)] for who in CONTESTANTS}
        for name in workloads
    }


def agreement(timings: Timings, workload: str, repeats: int) -> dict[str, float]:
    """The share of rows that two contestants answered alike, for each two. Other batches have other roundings."""
    shares = {}
    for one, other in combinations(CONTESTANTS, 2):
        pairs = [
            (answer, timings[workload, other, repeat].answers[row])
            for repeat in range(repeats)
            for row, answer in timings[workload, one, repeat].answers.items()
        ]
        shares[f"{one}/{other}"] = round(statistics.fmean(alike(*pair) for pair in pairs), 4)
    return shares


def alike(one: Answer, other: Answer) -> bool:
    if not one or len(one) != len(other):
        return False
    return all(math.isclose(a, b, rel_tol=0, abs_tol=CLOSE_NATS) for a, b in zip(one, other, strict=True))


def price_of_seeds(timings: Timings, repeats: int) -> dict[str, dict[str, Any]]:
    return {
        name: ratio([
            timings["short", name, i].seconds / timings[UNSEEDED, name, i].seconds for i in range(repeats)
        ])
        for name in CONTESTANTS
    }  # fmt: skip


if __name__ == "__main__":
    main()
