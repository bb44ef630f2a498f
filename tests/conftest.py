"""What tests share: one Ray, one vLLM engine and one random student for the whole session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import pytest
import pytest_asyncio

from cluster.placement import ClusterSpec
from selfguide import cli
from selfguide.api import Session, engine_spec, load_student, open_session
from selfguide.config import Recipe
from selfguide.recipefile import load_recipe

pytest_plugins = ["ni_data", "lora", "tests.training"]

REPO = Path(__file__).parent.parent
EXAMPLES = REPO / "selfguide" / "examples"
REAL_TRAINING = {"finetuning.simulated_tokens_per_s": 0}
"""For `open_simulated`, where what is learnt matters."""


class OpenSimulated(Protocol):
    """Opens a session of simulated engines: a recipe of its own from `smoke` and dotted changes."""

    def __call__(self, **changes: Any) -> AbstractAsyncContextManager[Session]: ...


@pytest.fixture(scope="session", autouse=True)
def pytorch_beside_commands() -> Iterator[None]:
    """A command that runs in this process must not keep PyTorch from the tests after it."""
    with patch.object(cli, "spare_pytorch"):
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, float]]:
    """One local Ray, with logical CPUs enough for every test's actors."""
    from cluster.session import ray_session

    os.environ["RAY_AUTH_MODE"] = "disabled"  # its token file lives in the home folder, which is not the tests'
    with ray_session(ClusterSpec(num_engines=10)) as nodes:
        yield {"CPU": sum(node.cpus for node in nodes)}


@pytest.fixture(scope="session")
def random_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random Llama, made by a process of its own."""
    folder = tmp_path_factory.mktemp("student") / "random-llama"
    subprocess.run([sys.executable, "-m", "engines.random_model", str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def smoke_recipe(random_student: Path) -> Recipe:
    return load_recipe("smoke", {"model.path": str(random_student)})


@pytest_asyncio.fixture(scope="session")
async def vllm_session(ray_cluster: dict[str, float], smoke_recipe: Recipe) -> AsyncIterator[Session]:
    """Real vLLM, started once."""
    async with open_session(smoke_recipe) as session:
        yield session


@pytest_asyncio.fixture(scope="session")
async def open_simulated(ray_cluster: dict[str, float], random_student: Path) -> AsyncIterator[OpenSimulated]:
    """Sessions whose engines and trainers work without a model: `open_simulated(**{"synthesis.lag": 8})`.

    All that ask for the engines of `smoke` share them; changes of `engine`, `cluster` or the like get their own.
    """
    settings = {"model.path": str(random_student), "engine.kind": "simulated", "finetuning.simulated_tokens_per_s": 1e6}
    common: list[Session] = []

    async with AsyncExitStack() as stack:

        @asynccontextmanager
        async def open_one(**changes: Any) -> AsyncIterator[Session]:
            recipe, smoke = load_recipe("smoke", settings | changes), load_recipe("smoke", settings)
            student = load_student(recipe)
            if recipe.cluster != smoke.cluster or engine_spec(recipe, student) != engine_spec(smoke, student):
                async with open_session(recipe) as own:
                    yield own
                return
            if not common:
                common.append(await stack.enter_async_context(open_session(smoke)))
            yield replace(common[0], recipe=recipe, student=student)

        yield open_one
