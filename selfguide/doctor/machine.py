"""What this machine has, read without loading a library that could take hold of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_SMI = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
_SMI_LINE = re.compile(r"(.+), (\d+), (\d+\.\d+)")
_SMI_WAIT_S = 10.0
_CGROUPS = (  # limit and use, version 2 then version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_TORCH_GPUS = """
import json, torch
found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
print(json.dumps([[one.name, one.total_memory, one.major + one.minor / 10] for one in found]))
"""


@dataclass(frozen=True)
class GPU:
    name: str
    memory_bytes: int
    capability: float
    """CUDA's compute capability; bfloat16 needs 8."""


class Question:
    """A Python program in a process of its own, which starts at once and is waited for when its answer is read.

    It answers with one line of JSON, the last that it prints.
    """

    def __init__(self, program: str, *args: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *args], text=True, errors="replace", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def answer(self, wait_s: float) -> Any:
        """Raises `RuntimeError` with the last line that was said where there is none, or none in time."""
        try:
            said, complaint = self._process.communicate(timeout=wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise RuntimeError(f"no answer within {wait_s:g} s") from None
        if self._process.returncode:
            raise RuntimeError((complaint.strip() or f"exit code {self._process.returncode}").splitlines()[-1])
        return json.loads(said.splitlines()[-1])


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory() -> tuple[int, int]:
    """Bytes in all and bytes available; a container's limit counts."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    for limit_file, use_file in _CGROUPS:
        limit, use = _read_number(limit_file), _read_number(use_file)
        if limit is not None and use is not None and limit < total:
            total, available = limit, min(available, limit - use)
    return total, available


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def visible_gpus() -> list[GPU]:
    """GPUs that CUDA would show to a process started here."""
    if shutil.which(_SMI[0]):
        return _chosen(_ask_smi())
    if (version("torch") or "+cpu").endswith("+cpu"):
        return []  # a torch without CUDA sees none, and asking it takes seconds
    try:
        return [GPU(*found) for found in Question(_TORCH_GPUS).answer(60)]
    except RuntimeError:
        return []


def _ask_smi() -> list[GPU]:
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, check=False, timeout=_SMI_WAIT_S)
    except subprocess.TimeoutExpired:
        return []
    found = (_SMI_LINE.fullmatch(line.strip()) for line in done.stdout.splitlines())
    return [GPU(one[1], int(one[2]) << 20, float(one[3])) for one in found if one]


def _chosen(gpus: list[GPU]) -> list[GPU]:
    """Those that CUDA_VISIBLE_DEVICES names."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    names = [one.strip() for one in wanted.split(",") if one.strip()]
    if not all(one.isdigit() for one in names):
        return gpus[: len([one for one in names if one != "-1"])]  # names of devices: how many is all that counts
    return [gpus[int(one)] for one in names if int(one) < len(gpus)]
