"""All benchmarks, one after another, each in a process of its own; then what their ratios are held against.

    python -m benchmarks.suite run   [--size quick|full|gpu] [--only NAME ...] [--out DIR] [--ni DIR] [--model DIR]
    python -m benchmarks.suite check [--out DIR]     names each ratio that is out of bounds or fell, and exits with 1
    python -m benchmarks.suite keep  [--out DIR]     makes these results the baseline of this hardware
    python -m benchmarks.suite list

`make bench`, `make bench-gpu` and `make bench-check` are the first two. Each benchmark leaves DIR/NAME.json, a failed
one too, and the suite goes on. A ratio fails the check below its floor or above its ceiling; one that has a bound also
fails where it is worse than the baseline that was made with the same arguments on the same hardware by more than the
spread (largest less smallest pair) of either. What has no bound is told and not judged.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfguide.environment import environment
from selfguide.nano import TASKS
from selfguide.progress import stderr_line

Json = dict[str, Any]
REPO = Path(__file__).parents[1]
BASELINES = Path(__file__).parent / "baselines"
LIMIT_S = 3600
SIZES = ("full", "quick", "gpu")


@dataclass(frozen=True)
class Entry:
    """`{ni}` in the arguments is the clone of NI-V2, `{model}` the student's folder; both may be given or not."""

    module: str
    what: str
    full: str = ""
    quick: str = "--quick"
    gpu: str = ""


SUITE = {
    "pool": Entry("bench_pool", "prompts to stored rows, against the bare engine", "--repeats 9", gpu=(
        "--model {model} --max-model-len 4096 --prefix-tokens 3500 --max-num-seqs 256 --max-num-batched-tokens 8192"
    )),
    "ray_data": Entry("bench_ray_data", "the same rows through Ray Data LLM", gpu=(
        "--model {model} --max-model-len 4096 --prefix-tokens 3500 --rows 2000"
    )),
    "flow": Entry("bench_flow", "eight tasks, against the authors' way of scheduling", gpu="--model {model}"),
    "filters": Entry("bench_filters", "columnar filters, against polars by hand", gpu=""),
    "curation": Entry("bench_curation", "what curation costs a task, many at once"),
    "annotation": Entry("bench_annotation", "ways to label, against a vote of free samples"),
    "metrics": Entry("bench_metrics", "ROUGE-L, against rouge-score", "{ni}", "--quick {ni}", "{ni}"),
    "trainers": Entry("bench_trainers", "a warm trainer, against a fresh one", gpu="--model {model}"),
    "sft": Entry("bench_sft", "training tokens a second, against a bare TRL script", gpu=(
        "--model {model} --prompt-tokens 3900 --rows 64 --epochs 1 --packing"
    )),
    "lag": Entry("bench_lag", "one task alone, by lag", gpu="--model {model}"),
    "scale": Entry(
        "bench_scale", "a sweep over simulated engines", "--engines 64 --repeats 3 {tasks}", "--quick {tasks}",
        "--engines 64 256 {tasks}",
    ),
    "store": Entry("bench_store", "what a stage costs beside its rows"),
    "recovery": Entry("engine_recovery", "from an engine's death to its next row", gpu="--model {model}"),
}  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.verb == "list":
        for name, entry in SUITE.items():
            print(f"{name:10} python -m benchmarks.{entry.module:15} {entry.what}")
    elif args.verb == "run":
        sys.exit(run(args))
    elif args.verb == "keep":
        keep(read_results(args.out), args.baselines)
    else:
        sys.exit(check(read_results(args.out), args.baselines))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "check", "keep", "list"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="a JSON for each benchmark (runs/bench)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SUITE, default=list(SUITE))
    parser.add_argument("--size", choices=SIZES, default="quick")
    parser.add_argument("--ni", type=Path, help="a clone of NI-V2; without it, the embedded student's tasks")
    parser.add_argument("--model", help="the student of --size gpu: a folder")
    parser.add_argument("--baselines", type=Path, default=BASELINES)
    args = parser.parse_args()
    if args.verb == "run" and args.size == "gpu" and not args.model:
        parser.error("--size gpu needs --model: python -m benchmarks.dummy_model FOLDER makes one")
    return args


def run(args: argparse.Namespace) -> int:
    """How many benchmarks failed. Each result is written as soon as it is there."""
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, name in enumerate(args.only, 1):
        stderr_line(f"== {number}/{len(args.only)} {name}: {SUITE[name].what}")
        result = run_one(name, args)
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if "failed" in result:
            failed.append(name)
            stderr_line(f"== {name} FAILED: {result['failed']}")
    stderr_line(f"== results in {args.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return len(failed)


def run_one(name: str, args: argparse.Namespace) -> Json:
    entry, began = SUITE[name], time.monotonic()
    template = getattr(entry, args.size)
    places = {"ni": str(args.ni or ""), "tasks": str(args.ni or TASKS), "model": args.model or "random"}
    said = template.format(ni="NI" if args.ni else "", tasks="NI" if args.ni else "TASKS", model="MODEL")
    facts = {"name": name, "size": args.size, "arguments": said, "hardware": hardware(), "environment": environment()}
    words = [sys.executable, "-m", f"benchmarks.{entry.module}", *template.format(**places).split()]
    try:
        done = subprocess.run(words, cwd=REPO, stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
        result = json.loads(done.stdout) if done.stdout.strip() else {}
        failed = None if done.returncode == 0 and result else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        result, failed = {}, f"no end after {LIMIT_S} s"
    except ValueError:
        result, failed = {}, "its standard output is no JSON"
    facts["seconds"] = round(time.monotonic() - began, 1)
    return {**facts, **result, **({"failed": failed} if failed else {})}


def hardware() -> str:
    """The accelerators, or else the processor, and how many: the name of a baseline."""
    here = environment()
    model, count = (here["gpus"][0], len(here["gpus"])) if here["gpus"] else (_processor(), here["num_cpus"])
    return f"{count}x-{re.sub('[^a-z0-9]+', '-', model.lower()).strip('-')}"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = re.findall(r"model name\s*: (.+)", file.read())
    return names[0] if names else "cpu"


def read_results(out: Path) -> dict[str, Json]:
    found = {name: out / f"{name}.json" for name in SUITE}
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.is_file()}
    if not results:
        raise SystemExit(f"{out}: no results; python -m benchmarks.suite run makes them")
    return results


def check(results: Mapping[str, Json], baselines: Path) -> int:
    """1 where anything is out of bounds, fell or failed; says each."""
    said = [line for name, result in results.items() for line in complaints(name, result, baselines)]
    for line in said:
        stderr_line(line)
    judged = sum(_bounded(one) for result in results.values() for one in result.get("ratios", {}).values())
    stderr_line(f"{len(results)} benchmarks, {judged} ratios with a bound, {len(said)} complaints")
    return int(bool(said))


def complaints(name: str, result: Json, baselines: Path) -> Iterator[str]:
    if "failed" in result:
        yield f"{name}: failed, {result['failed']}"
    kept = load_baseline(baselines, result["hardware"]).get(result["size"], {}).get(name, {})
    before = kept.get("ratios", {}) if kept.get("arguments") == result["arguments"] else {}
    for key, one in result.get("ratios", {}).items():
        median, floor, ceiling = one["median"], one["floor"], one["ceiling"]
        if floor is not None and median < floor:
            yield f"{name} {key}: {median:g} is below its floor {floor:g}"
        if ceiling is not None and median > ceiling:
            yield f"{name} {key}: {median:g} is above its ceiling {ceiling:g}"
        if key in before and _bounded(one) and worse_by(one, before[key]) > max(_width(one), _width(before[key])):
            yield f"{name} {key}: {median:g}, the baseline {before[key]['median']:g}: more than the spread between them"


def worse_by(now: Json, before: Json) -> float:
    fall = float(before["median"] - now["median"])
    return -fall if now["floor"] is None else fall


def _bounded(one: Json) -> bool:
    return one["floor"] is not None or one["ceiling"] is not None


def _width(one: Json) -> float:
    return float(one["max"] - one["min"])


def load_baseline(baselines: Path, name: str) -> Json:
    path = baselines / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def keep(results: Mapping[str, Json], baselines: Path) -> None:
    """Medians, spreads and bounds of ratios alone, beside the older ones of other sizes and benchmarks."""
    baselines.mkdir(exist_ok=True)
    for name, result in results.items():
        if "failed" in result:
            stderr_line(f"{name} failed and is not kept")
            continue
        kept = load_baseline(baselines, result["hardware"])
        fields = ("median", "min", "max", "floor", "ceiling")
        ratios = {
            key: {field: one[field] for field in fields} | {"pairs": len(one["values"])}
            for key, one in result["ratios"].items()
        }
        commit = result["environment"]["git_commit"]
        kept.setdefault(result["size"], {})[name] = {
            "arguments": result["arguments"], "commit": commit, "seconds": result["seconds"], "ratios": ratios,
        }  # fmt: skip
        path = baselines / f"{result['hardware']}.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
