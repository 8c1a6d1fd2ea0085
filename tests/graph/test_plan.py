"""Plans as data: written by hand, refused, explained, measured, drawn, read back."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from daskllm.graph import (
    Cluster,
    Device,
    LayerGraph,
    Link,
    Measured,
    Node,
    Objective,
    Plan,
    PlanError,
    Workload,
    make_plan,
)
from daskllm.graph.draw import layer_range
from tests.graph.instances import decoder

GRAPH = LayerGraph.of(decoder())
CLUSTER = Cluster.of(4, memory=2e6, flops=1e9, bandwidth=1e9, launch=1e-5, link=Link(1e-4, 1e8))
WORK = Workload(rows=8, context=32)
LAYERS = [n.name for n in GRAPH.order]


def test_a_plan_by_hand_is_predicted_and_changed() -> None:
    by_hand = [[("device-1", LAYERS[:2]), ("device-0", LAYERS[2:])]]
    plan = Plan.of(by_hand, GRAPH, CLUSTER, WORK)
    assert plan.assignment == by_hand
    assert plan.placement == {"device-1": tuple(LAYERS[:2]), "device-0": tuple(LAYERS[2:])}
    assert plan.replicas[0].slowest == "stage 1 on device-0"
    assert plan.replicas[0].layers == tuple(LAYERS)
    device, layers = plan.assignment[0][1]
    moved = Plan.of([[("device-1", LAYERS[:3]), (device, layers[1:])]], GRAPH, CLUSTER, WORK)
    assert moved.bottleneck < plan.bottleneck
    assert moved.replicas[0].stages[0].memory.weights - plan.replicas[0].stages[0].memory.weights == (
        GRAPH.node(LAYERS[2]).weight_bytes
    )


def test_a_plan_by_hand_may_name_what_is_inside() -> None:
    opened = [n.name for n in GRAPH.open("layers.1").order]
    half = opened.index("layers.1.mlp")
    plan = Plan.of([[("device-0", opened[:half]), ("device-1", opened[half:])]], GRAPH, CLUSTER, WORK)
    assert plan.replicas[0].stages[1].layers[0] == "layers.1.mlp"
    assert plan.simulate(GRAPH, CLUSTER)[0].period == pytest.approx(plan.value)


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([("device-0", LAYERS[:-1])], r"no stage has layer 'head' \(1 missing\)"),
        ([("device-0", [*LAYERS, "head"])], "layer 'head' is in stage 0 and again in stage 0"),
        ([("device-0", [*LAYERS, "tail"])], "names layer 'tail', which graph 'llama' lacks"),
        ([("device-9", LAYERS)], "device 'device-9' is not there; the devices are device-0, "),
        ([("device-0", LAYERS[:2]), ("device-0", LAYERS[2:])], "device 'device-0' has 2 stages"),
        (
            [("device-0", LAYERS[2:]), ("device-1", LAYERS[:2])],
            "'layers.1' in stage 0 needs 'layers.0'.*stage 1",
        ),
        ([("device-0", LAYERS), ("device-1", [])], "stage 1 on 'device-1' has no layers"),
        ([], "at least one stage"),
    ],
)
def test_a_wrong_plan_is_refused(stages: list[tuple[str, list[str]]], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Plan.of([stages], GRAPH, CLUSTER, WORK)


def test_a_plan_that_does_not_fit_says_from_which_layer_on() -> None:
    small = Cluster.of(2, memory=GRAPH.node("embed").weight_bytes + 1.5 * GRAPH.node("layers.0").weight_bytes)
    with pytest.raises(PlanError, match=r"stage 0 needs .*'device-0' has .*no room from 'layers.1' on"):
        Plan.of([[("device-0", LAYERS)]], GRAPH, small)
    picky = LayerGraph.chain([Node("a"), Node("b", resources={"gpu": 1})])
    with pytest.raises(PlanError, match="'b' needs gpu=1, which 'device-0' does not offer"):
        Plan.of([[("device-0", ["a", "b"])]], picky, small)


def test_json_round_trip() -> None:
    measured = [Measured(0, 0, 1.0, 2.0, 5)]
    infinite = Cluster((Device("only", memory=math.inf, flops=1e9),))
    for plan in (
        make_plan(GRAPH, CLUSTER, WORK, stages=2),
        make_plan(GRAPH, CLUSTER, WORK, objective="batch", stages=4).with_measured(measured),
        make_plan(GRAPH, infinite, WORK, objective=Objective("period")),
    ):
        assert Plan.from_json(plan.to_json()) == plan
    for text in ("{}", "[]", "{", '{"format": "daskllm.plan/1"}'):
        with pytest.raises(ValueError, match=r"format|JSON"):
            Plan.from_json(text)


def test_explain_lists_every_stage_and_what_was_measured() -> None:
    plan = make_plan(GRAPH, CLUSTER, WORK, stages=2, replicas=2)
    text = plan.explain()
    assert all(f"device-{i}" in text for i in range(4))
    assert "bottleneck" in text
    assert "measured" not in text
    slow = plan.with_measured([Measured(0, 0, 3.0, 1.0, 10), Measured(0, 1, 1.0, 3.0, 10)])
    assert "measured ms" in slow.explain()
    assert slow.imbalance(0) == 0.5
    assert "50.0% in replica 0" in slow.explain()
    with pytest.raises(ValueError, match="no stage 2 in replica 0"):
        plan.with_measured([Measured(0, 2, 0.0, 0.0, 1)])


def test_predicted_memory_is_within_its_device() -> None:
    plan = make_plan(GRAPH, CLUSTER, WORK, stages=4)
    stages = plan.replicas[0].stages
    assert all(s.memory.total <= s.capacity for s in stages)
    assert sum(s.memory.weights for s in stages) == GRAPH.total("weight_bytes")
    assert sum(s.memory.kv for s in stages) == 8 * 32 * GRAPH.total("kv_bytes")


def test_tokens_per_second_count_all_replicas() -> None:
    one = make_plan(GRAPH, CLUSTER, WORK, stages=1, replicas=1)
    four = make_plan(GRAPH, CLUSTER, WORK, stages=1, replicas=4)
    assert one.tokens_per_second == pytest.approx(8 / one.value)
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)


def test_drawing(tmp_path: Path) -> None:
    plan = make_plan(GRAPH, CLUSTER, WORK, stages=2, replicas=2)
    plan.visualize(tmp_path / "plan.svg")
    texts = {
        t.text for t in ET.parse(tmp_path / "plan.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"replica 0", "replica 1", "stage 0: device-0"} <= texts
    assert str(plan.visualize()) == plan.explain()


def test_runs_of_layers_are_shortened() -> None:
    assert layer_range(LAYERS) == "embed, layers.0-3, head"
    assert layer_range(["a", "b.1", "b.3", "b.4"]) == "a, b.1, b.3-4"
    assert layer_range(list("abcdefgh")) == "a, … h (8)"
