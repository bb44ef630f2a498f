"""The deployment examples: against their schemas, their commands through our own parser, the Slurm script for real.

The launcher's file is held against the schema and the checks that come with Ray. No package carries KubeRay's resource
definitions, so the part of them that the example uses is written down here, from KubeRay's API reference: names, types
and what is required; an unknown key is an error, as it is to the server with strict field validation. Slurm is played
by three small programs that run each step on this machine.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import typer.main
import yaml

from selfguide import cli
from selfguide.recipefile import load_recipe, parse_change
from selfguide.store import leases

REPO = Path(__file__).parent.parent
DEPLOY = REPO / "cluster" / "deploy"
CLUSTER, RAYJOB, SLURM = (DEPLOY / name for name in ("ray-cluster.yaml", "kuberay-rayjob.yaml", "slurm.sh"))


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def parse(command: str) -> dict[str, Any]:
    """What our own command line reads of it; the recipe that it makes is valid."""
    program, verb, *args = shlex.split(command, comments=True)
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert program == "selfguide"
    with verbs[verb].make_context(verb, args) as context:
        given = dict(context.params)
    if verb == "submit":
        return parse(shlex.join(["selfguide", *given["command"]]))
    recipe = load_recipe(given["recipe"], dict(map(parse_change, given["changes"])))
    assert given["model"]
    return {"verb": verb, **given, "recipe": recipe}


def commands(path: Path) -> list[str]:
    """Every line of a comment or a block that runs selfguide."""
    return re.findall(r"^#? *(selfguide submit .+)$", path.read_text(), re.MULTILINE)


def check_sweep(command: str, gpus: int) -> None:
    """It uses all of the cluster's GPUs, and writes where a node's death leaves it."""
    given = parse(command)
    cluster = given["recipe"].cluster
    assert (given["verb"], given["split"], str(given["out"])[0]) == ("sweep", "test", "/")
    assert cluster.num_engines + cluster.num_trainers * cluster.gpus_per_trainer == gpus


def test_the_launchers_file_is_what_ray_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(CLUSTER)
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    workers = {name: one["max_workers"] for name, one in types.items() if name != config["head_node_type"]}
    assert sum(workers.values()) == config["max_workers"]
    [command] = commands(CLUSTER)
    check_sweep(command, gpus=sum(workers.values()))
    assert types["spot"]["labels"] == {"ray.io/market-type": "spot"}
    assert types["spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**config, "worker_types": {}}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_start_takes_the_options_of_the_examples() -> None:
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    lines = [line for path in (CLUSTER, SLURM) for line in path.read_text().splitlines() if "ray start -" in line]
    used = {option for line in lines for option in re.findall(r"--[a-z-]+", line.partition("ray start")[2])}
    assert len(lines) == 4
    assert used
    assert used <= known


STRING, COUNT, BOOL = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}


def mapping(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def listing(**items: Any) -> dict[str, Any]:
    return {"type": "array", "items": mapping("name", **items), "minItems": 1}


CONTAINERS = listing(
    name=STRING, image=STRING, env=listing(name=STRING, value=STRING), ports=listing(name=STRING, containerPort=COUNT),
    resources=mapping(requests=STRINGS, limits=STRINGS), volumeMounts=listing(name=STRING, mountPath=STRING),
)  # fmt: skip
POD = mapping(
    "containers", containers=CONTAINERS, nodeSelector=STRINGS,
    volumes=listing(name=STRING, persistentVolumeClaim=mapping("claimName", claimName=STRING)),
)  # fmt: skip
GROUP = {"rayStartParams": STRINGS, "labels": STRINGS, "template": mapping("spec", spec=POD)}
RAY_CLUSTER = mapping(
    "headGroupSpec rayVersion",
    rayVersion=STRING,
    authOptions=mapping(mode={"enum": ["disabled", "token"]}),
    headGroupSpec=mapping("template", **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": mapping(
            "groupName minReplicas maxReplicas template",
            groupName=STRING, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP,
        ),
    },
)  # fmt: skip
SCHEMA = mapping(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=mapping("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}),
    spec=mapping(
        "entrypoint rayClusterSpec",
        entrypoint=STRING, backoffLimit=COUNT, submitterConfig=mapping(backoffLimit=COUNT),
        shutdownAfterJobFinishes=BOOL, ttlSecondsAfterFinished=COUNT, rayClusterSpec=RAY_CLUSTER,
    ),
)  # fmt: skip


def test_the_rayjob_is_what_kuberay_takes() -> None:
    import ray

    job = load(RAYJOB)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job, SCHEMA)
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {one["name"] for one in pod["volumes"]}
        assert {one["name"] for container in pod["containers"] for one in container["volumeMounts"]} == volumes
    gpus = [int(gpu_limit(group)) * group["replicas"] for group in spec["workerGroupSpecs"]]
    check_sweep(job["spec"]["entrypoint"], gpus=sum(gpus))
    with pytest.raises(jsonschema.ValidationError, match="entrypiont"):
        jsonschema.validate({**job, "spec": {**job["spec"], "entrypiont": "x"}}, SCHEMA)


def gpu_limit(group: dict[str, Any]) -> str:
    [container] = group["template"]["spec"]["containers"]
    return str(container["resources"]["limits"]["nvidia.com/gpu"])


def test_the_slurm_scripts_own_command_fits_its_allocation() -> None:
    script = SLURM.read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
    [command] = re.findall(r"^  set -- (.+?)\n\w", script, re.MULTILINE | re.DOTALL)
    command = command.replace("\\\n", "").replace("$SHARED", "/shared")
    check_sweep(f"selfguide {command}", gpus=int(asked["nodes"]) * int(asked["gpus-per-node"]))


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_what_the_pages_submit_is_read_by_our_own_parser(page: str) -> None:
    found = [parse(command) for command in commands(REPO / page)]
    assert found
    assert all(str(given["out"]).startswith("/") for given in found)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", str(SLURM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then hostname; echo other; else echo "$@" >> "$HOME/scontrol"; fi
"""
SRUN = """#!/bin/bash
echo "$@" >> "$HOME/srun"
while [[ $1 == --* ]]; do shift; done
exec "$@" $RAY_OPTIONS
"""
RAY = """#!/bin/bash
if [ "$1" = start ]; then exec sleep 600; fi
"""
PYTHON = """#!/bin/bash
if [[ $2 == *secrets* ]]; then echo token; fi
"""
SELFGUIDE = """#!/bin/bash
until [ "$(grep -c . "$HOME/srun")" = 2 ]; do sleep 0.1; done
echo "$@" > "$HOME/ran"
stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$HOME/mode"
exec bash -c "$DRIVER"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script in an allocation of two nodes; `programs` stand before all others on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(programs: dict[str, str], *argv: object, **changes: str) -> subprocess.Popen[str]:
        for name, text in ({"scontrol": SCONTROL, "srun": SRUN} | programs).items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path),
            "SHARED": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "2", "RAY_OPTIONS": "", **changes,
        }  # fmt: skip
        command = ["bash", str(SLURM), *map(str, argv)]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=tmp_path, text=True, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:  # with all that it left
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(ready: Callable[[], object], process: subprocess.Popen[str], log: Path) -> None:
    while not ready():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("driver", "sent", "code", "requeued"),
    [
        ("exit 0", None, 0, False),
        ("exit 2", None, 2, False),
        ("sleep 600", signal.SIGUSR1, 0, True),
        ("sleep 600", signal.SIGTERM, 143, False),
    ],
)
def test_the_slurm_script_ends_as_its_sweep_and_requeues_itself_in_time(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path,
    driver: str, sent: signal.Signals | None, code: int, requeued: bool,
) -> None:  # fmt: skip
    process = slurm({"ray": RAY, "python": PYTHON, "selfguide": SELFGUIDE}, DRIVER=driver)
    if sent:
        wait_until((tmp_path / "mode").exists, process, tmp_path / "log")
        process.send_signal(sent)
    assert process.wait(60) == code, (tmp_path / "log").read_text()
    assert (tmp_path / "ran").read_text().startswith(f"sweep {tmp_path}/natural-instructions --split test ")
    assert (tmp_path / "mode").read_text() == "600\n"
    assert not list(tmp_path.glob(".selfguide-token*"))
    requeue = tmp_path / "scontrol"
    assert (requeue.read_text() if requeue.exists() else "") == ("requeue 7\n" if requeued else "")
    workers, head = sorted((tmp_path / "srun").read_text().splitlines())  # both start in the background
    assert "--nodes=1 --ntasks=1 --nodelist=" in head
    assert "ray start --head" in head
    assert re.match(r"--nodes=1 --ntasks=1 --exclude=\S+ --no-kill --wait=0 ray start --address=\S+:20007 ", workers)


RECIPE = "extends: smoke\nengine: {kind: simulated, faults: {hang_after: 50}}\ncluster: {limits: {stall_s: 3600}}"


@pytest.mark.timeout(300)
def test_the_slurm_script_runs_a_command_on_two_nodes_of_ray(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Both nodes on this machine, each with two CPUs: the run needs three. It is stopped in the middle."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    shutil.copy(REPO / "selfguide" / "examples" / "sentiment.json", tmp_path)
    out, log = tmp_path / "out", tmp_path / "log"
    temporary = tempfile.mkdtemp(prefix="sg-", dir="/tmp")  # Ray's sockets want a short path
    ports = "--dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0"
    srun = SRUN.replace("$RAY_OPTIONS", '$RAY_OPTIONS $([[ $* == *--head* ]] && echo "$HEAD_OPTIONS")')
    process = slurm(
        {"srun": srun}, "run", "sentiment.json", "--recipe", "recipe.yaml", "--out", out,
        PYTHONPATH=str(REPO), XDG_CACHE_HOME=str(Path.home() / ".cache"), RAY_OPTIONS=ports,
        HEAD_OPTIONS=f"--include-dashboard=false --ray-client-server-port={free_port()} --temp-dir={temporary}",
        SLURM_JOB_ID=str(free_port(20_000)),
    )  # fmt: skip
    wait_until(lambda: any(held for _, held in leases(out)), process, log)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 0, log.read_text()
    assert "Ray has 2 nodes at " in log.read_text()
    assert "engines ready" in log.read_text()
    assert (tmp_path / "scontrol").read_text().startswith("requeue ")
    assert not leases(out), "it was killed, not stopped"
    shutil.rmtree(temporary, ignore_errors=True)


def free_port(first: int = 30_000) -> int:
    """One of the 10,000 ports from the first on."""
    while True:
        port = first + secrets.randbelow(10_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
