"""How many stages and replicas, and the whole way from a description to a plan."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from daskllm.graph import (
    SCHEDULERS,
    SPLITTERS,
    Cluster,
    Device,
    LayerGraph,
    Link,
    Node,
    Objective,
    PlanError,
    Workload,
    make_plan,
    read_graph,
)
from tests.graph.instances import SHARED, decoder

GRAPH = LayerGraph.of(decoder(num_layers=6))
TOTAL = GRAPH.total("weight_bytes")
SPEED: dict[str, float] = {"flops": 1e9, "bandwidth": 1e9, "launch": 1e-5}
WORK = Workload(rows=8, context=16)


def counts(plan: Any) -> list[int]:
    return [len(r.stages) for r in plan.replicas]


def test_a_model_that_fits_stays_whole() -> None:
    plan = make_plan(GRAPH, Cluster.of(3, 4 * TOTAL, **SPEED), WORK)
    assert counts(plan) == [1, 1, 1]


def test_a_model_that_does_not_fit_gets_as_few_stages_as_fit() -> None:
    kv = 8 * 16 * GRAPH.total("kv_bytes")
    cluster = Cluster.of(5, (TOTAL + kv) * 0.6, **SPEED)
    plan = make_plan(GRAPH, cluster, WORK)
    assert counts(plan) == [2, 2]
    assert plan.notes == ("without a stage: device-4",)
    assert counts(make_plan(GRAPH, cluster, WORK, replicas=1)) == [2]


def test_large_devices_hold_it_whole_and_small_ones_share_it() -> None:
    devices = (Device("small-0", 0.9 * TOTAL), Device("large", 2 * TOTAL), Device("small-1", 0.9 * TOTAL))
    plan = make_plan(GRAPH, Cluster(devices))
    assert next([s.device for s in r.stages] for r in plan.replicas) == ["large"]
    assert {s.device for s in plan.replicas[1].stages} == {"small-0", "small-1"}


def test_loading_must_be_worth_it() -> None:
    cluster = Cluster.of(4, 4 * TOTAL, load_bandwidth=TOTAL / 10, **SPEED)  # ten seconds to load
    rate = make_plan(GRAPH, cluster, WORK, replicas=1).tokens_per_second
    for seconds, replicas in ((1, 1), (25, 2), (1000, 4)):
        work = Workload(rows=8, context=16, total_tokens=rate * seconds)
        plan = make_plan(GRAPH, cluster, work)
        assert len(plan.replicas) == replicas
        assert ("longer to load" in " ".join(plan.notes)) == (replicas < 4)


@pytest.mark.parametrize(("splitter", "scheduler"), list(itertools.product(SPLITTERS, SCHEDULERS)))
@pytest.mark.parametrize("objective", ["latency", "batch", "period"])
def test_every_way_holds_every_layer_once_and_agrees_with_the_simulator(
    splitter: str, scheduler: str, objective: Any
) -> None:
    cluster = Cluster.of(3, TOTAL, link=Link(1e-4, 1e8), **SPEED)
    plan = make_plan(
        GRAPH, cluster, WORK, splitter=splitter, scheduler=scheduler, objective=objective, stages=3
    )
    assert plan.replicas[0].layers == tuple(n.name for n in GRAPH.order)
    run = plan.simulate(GRAPH, cluster)[0]
    seen = run.period if objective == "period" else run.seconds
    assert seen == pytest.approx(plan.value)
    assert 0 < plan.bound <= plan.value


def test_the_bound_is_that_of_the_cost_model() -> None:
    graph = LayerGraph.chain([Node("a", seconds=4.0), Node("b", seconds=2.0)])
    plan = make_plan(graph, Cluster.of(2, 1.0), stages="best", objective=Objective("period"))
    assert (plan.bound, plan.value, plan.bottleneck) == (4.0, 4.0, 4.0)


def test_best_takes_as_many_stages_as_help() -> None:
    graph = LayerGraph.chain([Node(f"n{i}", seconds=1.0, output_bytes=8) for i in range(4)])
    quick, slow = Cluster.of(4, 1.0), Cluster.of(4, 1.0, link=Link(0.0, 1.0))
    goal = Objective("period")
    assert counts(make_plan(graph, quick, stages="best", objective=goal)) == [4]
    assert counts(make_plan(graph, slow, stages="best", objective=goal)) == [1]
    assert counts(make_plan(graph, quick, stages="best", objective="latency")) == [1]


@pytest.mark.parametrize(("devices", "best"), [(2, 47.479), (3, 32.2429), (4, 24.9169), (6, 17.7899)])
def test_published_optima_as_plans(devices: int, best: float) -> None:
    path = SHARED / "data" / "planning" / "bert24_inference.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    file = read_graph(path)
    plan = make_plan(file.graph, file.cluster(devices), stages="best", objective=Objective("period"))
    assert plan.bottleneck == pytest.approx(best, rel=1e-5)
    assert plan.simulate(file.graph, file.cluster(devices))[0].period == pytest.approx(plan.bottleneck)


def test_recursive_plans_reach_inside_layers() -> None:
    graph = LayerGraph.of(decoder(num_layers=1, num_kv_heads=8))
    cluster = Cluster.of(8, max(n.weight_bytes for n in graph.nodes) / 2)
    plan = make_plan(graph, cluster, splitter="recursive", replicas=1)
    assert any("embed.shards" in name for name in plan.replicas[0].layers)
    assert plan.simulate(graph, cluster)[0].period == pytest.approx(plan.value)


def test_a_fixed_number_of_replicas_is_dealt_evenly() -> None:
    devices = tuple(
        Device(f"d{i}", 10 * TOTAL, flops=1e9 * (1 + i), bandwidth=1e9 * (1 + i)) for i in range(4)
    )
    plan = make_plan(GRAPH, Cluster(devices), WORK, stages=2, replicas=2)
    assert [sorted(s.device for s in r.stages) for r in plan.replicas] == [["d0", "d3"], ["d1", "d2"]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"splitter": "magic"}, "splitter must be one of recursive, greedy, exact"),
        ({"scheduler": "magic"}, "scheduler must be one of greedy, optimal, genetic"),
        ({"objective": "speed"}, "objective must be"),
        ({"stages": 9}, "stages=9 is more than the graph's 8 layers"),
        ({"stages": 4}, "stages=4 is more than the 3 devices"),
        ({"stages": 0}, "stages must be"),
        ({"replicas": 2.5}, "replicas must be"),
        ({"stages": 2, "replicas": 2}, "need 4 devices; there are 3"),
        ({"stages": "best", "replicas": 2}, "makes one replica"),
    ],
)
def test_bad_calls_are_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_plan(GRAPH, Cluster.of(3, 4 * TOTAL), **changes)


def test_no_plan_is_an_error_that_helps() -> None:
    with pytest.raises(PlanError, match=r"layer 'embed' needs .*recursive"):
        make_plan(GRAPH, Cluster.of(3, TOTAL / 50))
    with pytest.raises(PlanError, match=r"short\..*What would help: 1 more like 'device-0'"):
        make_plan(GRAPH, Cluster.of(2, TOTAL * 0.45))
    with pytest.raises(PlanError, match="only 1 of 2 replicas fit"):
        make_plan(GRAPH, Cluster.of(2, TOTAL * 0.8), replicas=2)
