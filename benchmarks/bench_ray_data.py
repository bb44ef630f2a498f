"""The same rows through the pool and through Ray Data LLM (`ray.data.llm`), from rows to stored answers.

    python -m benchmarks.bench_ray_data [--quick] [--rows 1500] [--model FOLDER] > ray_data.json

Both have the same engine arguments, prompts as token ids, seeds, niceness, one Ray and a thread each; Ray Data LLM is
the library's own processor with its own batch sizes, and each of its executions starts the engine anew, as does each
repeat of ours. Two workloads: "short", one sample of 64 tokens; "annotation", a shared prefix and ten samples of 8
tokens, for which Ray Data LLM, which keeps the first sample alone, is given ten rows. The ratio is its time over ours:
`whole` from the start of the engine on, `running` from the first stored or finished answer on.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.pool_workloads import TEXT
from benchmarks.ratio import emit, ratio, spread
from cluster.fleet import start_engines, stop_engines
from cluster.placement import ClusterSpec, place
from cluster.pool import Pool
from cluster.session import ray_session
from engines.types import Completion, EngineSpec, Request, Sampling
from selfguide.api import load_student
from selfguide.environment import environment
from selfguide.progress import stderr_line
from selfguide.recipefile import load_recipe
from selfguide.records import ACCEPTED, Ledger
from selfguide.store import SHARD_ROWS, RunStore

FLOOR = 1.25
SCHEMA = pa.schema([
    ("row", pa.int32()), ("state", pa.string()), ("filter", pa.string()), ("reason", pa.string()),
    ("texts", pa.list_(pa.string())),
])  # fmt: skip
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TQDM_DISABLE": "1",
}  # fmt: skip


def main() -> None:
    args = parse_args()
    student = load_student(load_recipe("smoke", {"model.path": args.model}))
    spec = EngineSpec(
        model=student.folder, max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs, max_loras=0,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )  # fmt: skip
    alphabet = sorted(set(student.tokenizer.encode(TEXT)))
    repeats: list[dict[str, Any]] = []
    cluster = ClusterSpec(num_engines=4)  # CPUs that Ray may count on; both use one engine
    with tempfile.TemporaryDirectory(prefix="selfguide-ray-data-") as folder, ray_session(cluster):
        for number in range(args.repeats):
            for workload in args.workloads:
                requests = draw(workload, args, alphabet, number)
                repeats.append(measure_pair(workload, spec, requests, Path(folder)))
    ratios = {}
    for workload in args.workloads:
        pairs = [one for one in repeats if one["workload"] == workload]
        for span in ("whole", "running"):
            times = [one["ray_data"][f"{span}_s"] / one["pool"][f"{span}_s"] for one in pairs]
            ratios[f"{workload}_{span}"] = ratio(times, floor=FLOOR)
    config = {**vars(args), "engine": engine_arguments(spec)}
    speeds = {f"{who}_{span}_s": spread([one[who][f"{span}_s"] for one in repeats])
              for who in ("pool", "ray_data") for span in ("whole", "running")}  # fmt: skip
    emit("ray_data", config, ratios, seconds=speeds, repeats=repeats)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500, help="of the workload short; a fifth for annotation")
    parser.add_argument("--workloads", nargs="+", choices=("short", "annotation"), default=["short", "annotation"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefix-tokens", type=int, default=400)
    parser.add_argument("--model", default="random")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="one repeat of the workload short")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.workloads = 1, ["short"]
    return args


def draw(workload: str, args: argparse.Namespace, alphabet: Sequence[int], repeat: int) -> list[Request]:
    rng = random.Random(f"{workload}/{repeat}")
    short = workload == "short"
    count, prefix = (args.rows, 0) if short else (args.rows // 5, args.prefix_tokens)
    shared = rng.choices(alphabet, k=prefix)
    sampling = Sampling(max_tokens=64) if short else Sampling(max_tokens=8, n=10)
    seeds = [rng.getrandbits(60) for _ in range(count)]
    return [
        Request(str(row), [*shared, *rng.choices(alphabet, k=24)], replace(sampling, seed=seed))
        for row, seed in enumerate(seeds)
    ]


def measure_pair(workload: str, spec: EngineSpec, requests: Sequence[Request], folder: Path) -> dict[str, Any]:
    """Both must bring as many output tokens, give or take what other batches make of a seed."""
    found: dict[str, Any] = {"workload": workload, "pool": asyncio.run(run_pool(spec, requests, folder / "pool"))}
    found["ray_data"] = run_ray_data(spec, requests, folder / "ray_data")
    for who in ("pool", "ray_data"):
        shutil.rmtree(folder / who)
    stderr_line(str(found))
    rows = sum(request.sampling.n for request in requests)
    if {found["pool"]["samples"], found["ray_data"]["samples"]} != {rows}:
        raise SystemExit(f"{rows} samples were asked for")
    return found


async def run_pool(spec: EngineSpec, requests: Sequence[Request], out: Path) -> dict[str, Any]:
    began = time.monotonic()
    cluster = ClusterSpec()
    with ray_session(cluster) as nodes:
        fleet = await start_engines(spec, cluster, place(cluster, 1, nodes))
        pool = Pool(fleet)
        stage = RunStore(out).task("rows").stage("answers", {})
        rows: dict[int, dict[str, Any]] = {}
        first, tokens = 0.0, 0
        try:
            with stage.writing():
                async for answer in pool.generate(requests):
                    assert isinstance(answer, Completion), answer
                    first = first or time.monotonic()
                    tokens += sum(len(sample.token_ids) for sample in answer.samples)
                    row, texts = int(answer.id), [sample.text for sample in answer.samples]
                    rows[row] = {"row": row, "state": ACCEPTED, "filter": None, "reason": None, "texts": texts}
                ordered = [rows[number] for number in range(len(requests))]
                for start in range(0, len(ordered), SHARD_ROWS):
                    stage.commit(ordered[start : start + SHARD_ROWS], SCHEMA)
                stage.finish(None, SCHEMA, Ledger.of(ordered))
        finally:
            await pool.close()
            stop_engines(fleet)
    ended = time.monotonic()
    samples = sum(len(row["texts"]) for row in ordered)
    return {"whole_s": ended - began, "running_s": ended - first, "samples": samples, "output_tokens": tokens}


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """What our engine passes to vLLM, for the library's processor."""
    args = {
        "max_model_len": spec.max_model_len, "max_num_seqs": spec.max_num_seqs, "seed": spec.seed,
        "max_num_batched_tokens": spec.max_num_batched_tokens, "enable_prefix_caching": True,
        "use_tqdm_on_load": False, "load_format": "safetensors",
    }  # fmt: skip
    if environment()["gpus"]:
        return args | {"gpu_memory_utilization": spec.gpu_memory_utilization}
    return args | {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}


def run_ray_data(spec: EngineSpec, requests: Sequence[Request], out: Path) -> dict[str, Any]:
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    began, epoch = time.monotonic(), time.time()
    config = vLLMEngineProcessorConfig(
        model_source=spec.model, engine_kwargs=engine_arguments(spec), concurrency=1, log_engine_metrics=False,
        chat_template_stage=False, tokenize_stage=False, detokenize_stage=False,
        runtime_env={"env_vars": {**_ENVIRONMENT, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
        **({} if environment()["gpus"] else {"placement_group_config": {"bundles": [{"CPU": 1}]}}),
    )  # fmt: skip
    processor = build_processor(config, preprocess=lambda row: row, postprocess=_finished)
    rows = [
        {"row": int(one.id), "tokenized_prompt": list(one.prompt_ids), "sampling_params": _params(one, sample)}
        for one in requests
        for sample in range(one.sampling.n)
    ]
    processor(ray.data.from_items(rows)).write_parquet(str(out))
    ended = time.monotonic()
    stored = pq.read_table(out, columns=["num_generated_tokens", "finished"]).to_pylist()
    first = began + min(row["finished"] for row in stored) - epoch
    tokens = sum(row["num_generated_tokens"] for row in stored)
    return {"whole_s": ended - began, "running_s": ended - first, "samples": len(stored), "output_tokens": tokens}


def _params(request: Request, sample: int) -> dict[str, Any]:
    sampling = request.sampling
    seed = None if sampling.seed is None else sampling.seed + sample  # as vLLM seeds the samples of one request
    return {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "seed": seed}


def _finished(row: dict[str, Any]) -> dict[str, Any]:
    names = ("row", "generated_text", "num_generated_tokens")
    return {**{name: row[name] for name in names}, "finished": time.time()}


if __name__ == "__main__":
    main()
