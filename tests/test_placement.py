"""Placement as arithmetic: what fits which nodes, how it shares them, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.placement import (
    MARKET,
    NODE_ID,
    ClusterSpec,
    NodeResources,
    Placement,
    PlacementError,
    engine_options,
    local_cpus,
    needed_cpus,
    place,
    trainer_options,
)


def node(name: str, cpus: float = 64, gpus: float = 0, **labels: str) -> NodeResources:
    return NodeResources(name, cpus, gpus, {NODE_ID: name, **labels})


LAPTOP = [node("laptop", 4)]
ONE_GPU = [node("one", 8, 1)]
EIGHT = [node("eight", 64, 8)]
TWO = [node("a", 64, 8), node("b", 64, 8)]
MIXED = [node("head", 8), node("kept", 32, 4, **{MARKET: "on-demand"}), node("cheap", 64, 8, **{MARKET: "spot"})]
NAMED = [node("a", 32, 4, pool="train"), node("b", 32, 8, pool="serve")]


def tally(nodes: tuple[str, ...]) -> dict[str, int]:
    return {name: nodes.count(name) for name in sorted(set(nodes))}


@pytest.mark.parametrize(
    ("nodes", "parallel", "spec", "gpus", "time_shared"),
    [
        (LAPTOP, 1, {}, (0, 0), False),
        (LAPTOP, 1, {"share": "turns"}, (0, 0), True),
        (ONE_GPU, 1, {}, (0.6, 0.4), True),
        (ONE_GPU, 1, {"gpus_per_trainer": 0.5}, (0.6, 0.4), True),
        (ONE_GPU, 1, {"gpus_per_trainer": 0}, (1, 0), False),
        (ONE_GPU, 1, {"device": "cpu"}, (0, 0), False),
        (EIGHT, 1, {}, (1, 1), False),
        (EIGHT, 1, {"num_engines": 7}, (1, 1), False),
        (EIGHT, 1, {"num_engines": 7, "num_trainers": 2, "gpus_per_trainer": 0.5}, (1, 0.5), False),
        (EIGHT, 4, {"num_engines": 1, "gpus_per_trainer": 4}, (4, 4), False),
        (EIGHT, 1, {"num_engines": 8, "num_trainers": 8, "share": "turns"}, (0.6, 0.4), True),
        (TWO, 8, {"num_engines": 1, "gpus_per_trainer": 8}, (8, 8), False),
        (TWO, 4, {"num_engines": 3, "num_trainers": 4}, (4, 1), False),
        (TWO, 1, {"num_engines": 8, "gpus_per_trainer": 8}, (1, 8), False),
    ],
)
def test_what_fits(
    nodes: list[NodeResources], parallel: int, spec: dict[str, Any], gpus: tuple[float, float], time_shared: bool
) -> None:
    found = place(ClusterSpec(**spec), parallel, nodes)
    assert (found.gpus_per_engine, found.gpus_per_trainer, found.time_shared) == (*gpus, time_shared)


@pytest.mark.parametrize(
    ("nodes", "parallel", "spec", "says"),
    [
        (LAPTOP, 1, {"device": "gpu"}, "the cluster has 0 GPUs; set cluster.device: cpu"),
        (LAPTOP, 1, {"num_engines": 9}, "needs 11.5 CPUs .* the cluster has 4; lower cluster.num_engines"),
        (LAPTOP, 1, {"engine_cpus": 8}, "one engine needs 8 CPUs on one node, the largest has 4 CPUs"),
        (LAPTOP, 1, {"num_runners": 9}, "needs 7.5 CPUs"),
        (ONE_GPU, 1, {"share": "split"}, r"needs 2 GPUs \(1 engines x 1, 1 trainers x 1\), the cluster has 1"),
        (ONE_GPU, 1, {"num_engines": 2, "share": "turns"}, "needs 2 GPUs"),
        (EIGHT, 2, {"share": "turns"}, "cluster.share: turns takes engine.tensor_parallel 1"),
        (EIGHT, 1, {"share": "turns", "num_trainers": 2}, "no more trainers than engines"),
        (EIGHT, 1, {"gpus_per_trainer": 1.5}, "a part of one GPU, or whole ones"),
        (
            TWO,
            16,
            {},
            "one engine needs 16 GPUs and 1 CPU on one node, the largest has 8 GPUs and 64 CPUs; lower engine",
        ),
        (TWO, 1, {"gpus_per_trainer": 16}, "one trainer needs 16 GPUs .* lower cluster.gpus_per_trainer"),
        (TWO, 4, {"num_engines": 4}, "needs 17 GPUs"),
        (MIXED, 1, {"num_engines": 6, "spot": "allow", "gpus_per_trainer": 8}, "needs 14 GPUs"),
        ([node(name, 64, 6) for name in "ab"], 4, {"num_engines": 2, "gpus_per_trainer": 4}, "do not fit together"),
        ([node("a", 64), node("b", 2, 8)], 1, {"num_engines": 4}, "4 engines of 1 GPU and 1 CPU, 1 trainer"),
        (TWO, 1, {"engine_labels": {"pool": "x"}}, "no node for engines where pool is x; label nodes"),
        (TWO, 1, {"trainer_labels": {"pool": "in(x, y)"}}, r"no node for trainers where pool is in\(x, y\)"),
        (NAMED, 8, {"engine_labels": {"pool": "train"}}, "largest where pool is train has 4 GPUs and 32 CPUs"),
        (MIXED[2:], 1, {"spot": "never"}, "no node for engines where .* is not spot; .* and cluster.spot"),
    ],
)
def test_what_is_refused_says_need_found_and_remedy(
    nodes: list[NodeResources], parallel: int, spec: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlacementError, match=says) as refused:
        place(ClusterSpec(**spec), parallel, nodes)
    assert "\n" not in str(refused.value)
    assert ";" in str(refused.value) or "whole ones" in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "parallel", "spec", "engines", "trainers"),
    [
        (ONE_GPU, 1, {}, {}, {}),  # one node: Ray has no choice
        (TWO, 8, {"gpus_per_trainer": 8}, {"a": 1}, {"b": 1}),
        (TWO, 4, {"num_engines": 3, "num_trainers": 4}, {"a": 2, "b": 1}, {"b": 4}),
        (TWO, 1, {"num_engines": 8, "gpus_per_trainer": 8}, {"b": 8}, {"a": 1}),
        (TWO, 1, {"num_engines": 4}, {"a": 2, "b": 2}, {"a": 1}),
        (MIXED, 1, {"num_engines": 4}, {"cheap": 4}, {"kept": 1}),
        (MIXED, 1, {"num_engines": 3, "spot": "never"}, {"kept": 3}, {"kept": 1}),
        (MIXED, 1, {"num_engines": 10, "spot": "prefer"}, {"cheap": 8, "kept": 2}, {"kept": 1}),
        (MIXED, 1, {"num_engines": 11, "spot": "prefer"}, {"cheap": 8, "kept": 3}, {"kept": 1}),
        (NAMED, 1, {"num_engines": 7, "trainer_labels": {"pool": "train"}}, {"a": 1, "b": 6}, {"a": 1}),
        (NAMED, 1, {"num_engines": 2, "engine_labels": {"pool": "!serve"}}, {"a": 2}, {"b": 1}),
        (NAMED, 4, {"num_engines": 3, "gpus_per_trainer": 0, "engine_labels": {"pool": "in(train, serve)"}},
         {"a": 1, "b": 2}, {"a": 1}),
    ],
)  # fmt: skip
def test_where_it_goes(
    nodes: list[NodeResources],
    parallel: int,
    spec: dict[str, Any],
    engines: dict[str, int],
    trainers: dict[str, int],
) -> None:
    found = place(ClusterSpec(**spec), parallel, nodes)
    assert tally(found.engine_nodes) == engines
    assert tally(found.trainer_nodes) == trainers


def test_no_gpu_is_given_twice() -> None:
    """Every mix of sizes that is accepted on two nodes fits their GPUs, each engine and trainer on one node."""
    accepted = 0
    for parallel in (1, 2, 4, 8):
        for engines in range(1, 9):
            for per_trainer in (0.5, 1, 2, 4, 8):
                spec = ClusterSpec(num_engines=engines, num_trainers=3, gpus_per_trainer=per_trainer)
                try:
                    found = place(spec, parallel, TWO)
                except PlacementError:
                    continue
                accepted += 1
                for name in "ab":
                    used = found.engine_nodes.count(name) * parallel + found.trainer_nodes.count(name) * per_trainer
                    assert used <= 8, spec
    assert accepted > 50


def test_what_ray_is_told() -> None:
    spec = ClusterSpec(num_engines=2, engine_cpus=2, engine_labels={"pool": "serve"}, spot="never", trainer_cpus=3)
    alone = Placement(1, 0.5, time_shared=False)
    labels = {MARKET: "!spot", "pool": "serve"}
    assert engine_options(spec, alone, 0) == {"num_cpus": 2, "num_gpus": 1, "label_selector": labels}
    assert trainer_options(spec, alone, 0) == {"num_cpus": 3, "num_gpus": 0.5}
    spread = Placement(1, 4, time_shared=False, engine_nodes=("a", "b"), trainer_nodes=("b",))
    told = engine_options(spec, spread, 1)
    assert told["label_selector"] == {NODE_ID: "b"}
    assert told["fallback_strategy"] == [{"label_selector": labels}], "its node is lost, and it starts nowhere else"
    assert "label_selector" not in trainer_options(spec, spread, 0), "a group of processes has no second choice"


def test_words() -> None:
    turns = ClusterSpec(turn_tasks=4)
    assert place(turns, 1, ONE_GPU).describe(turns) == (
        "1 engine and 1 trainer take turns on 1 GPU: engines sleep while trainers work, from 4 waiting tasks on, "
        "or once engines are idle"
    )
    split = ClusterSpec(num_engines=7, num_trainers=2, spot="prefer", trainer_labels={"pool": "!serve"})
    assert place(split, 1, TWO).describe(split) == (
        "7 engines on 1 GPU each, 2 trainers on 1 GPU each, on 2 nodes; trainers where pool is not serve; "
        "engines on spot nodes first"
    )


def test_a_small_laptop_still_runs_everything_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    spec = ClusterSpec()
    assert needed_cpus(spec) == 3.5
    assert local_cpus(spec) == 4
    place(spec, 1, [NodeResources("this machine", local_cpus(spec))])


def test_simulated_engines_reserve_what_their_actors_do() -> None:
    spec, node = ClusterSpec(num_engines=800), NodeResources("simulator", 28)
    assert needed_cpus(spec, per_actor=32) == 27.5
    place(spec, 1, [node], per_actor=32)
    with pytest.raises(PlacementError, match=r"needs 802\.5 CPUs"):
        place(spec, 1, [node])
    spread = place(spec, 1, [node, NodeResources("another", 4)], per_actor=32)
    assert len(spread.engine_nodes) == 25


@pytest.mark.parametrize("wanted", ["", "a b", "in()", "!!a", "in(a"])
def test_labels_that_select_nothing_are_refused(wanted: str) -> None:
    with pytest.raises(ValidationError, match="selects no label"):
        ClusterSpec(engine_labels={"pool": wanted})
