"""The three splitters: every layer once, memory kept, opening, and how good each is."""

from __future__ import annotations

import math
from random import Random

import pytest

from daskllm.graph import (
    SPLITTERS,
    Cluster,
    CostModel,
    Device,
    LayerGraph,
    Node,
    Objective,
    PlanError,
    Workload,
    split,
)
from tests.graph.instances import decoder

PERIOD = Objective("period")


def costs_of(graph: LayerGraph, cluster: Cluster) -> CostModel:
    return CostModel(graph, cluster, Workload())


def check_whole(found: object, layers: int, stages: int) -> None:
    parts = [nodes for nodes, _ in found.cut]  # type: ignore[attr-defined]
    assert len(parts) == stages
    assert all(parts)
    assert sum(p.bit_count() for p in parts) == layers
    assert sum(parts) == (1 << layers) - 1


@pytest.mark.parametrize("method", ["greedy", "recursive"])
def test_every_layer_exactly_once_for_all_counts(method: str) -> None:
    for layers in range(1, 65):
        graph = LayerGraph.chain([Node(f"layers.{i}", weight_bytes=1, seconds=1.0) for i in range(layers)])
        for stages in {*range(1, min(layers, 9) + 1), layers // 2 or 1, layers - 1 or 1, layers}:
            found = split(costs_of(graph, Cluster.of(stages, math.inf)), PERIOD, method, stages)
            check_whole(found, layers, stages)
            if method == "greedy":
                assert max(p.bit_count() for p, _ in found.cut) == -(-layers // stages)


def test_every_layer_exactly_once_for_exact_splits() -> None:
    for layers in (1, 2, 3, 5, 10, 31, 64):
        graph = LayerGraph.chain([Node(f"layers.{i}", seconds=1.0) for i in range(layers)])
        for stages in range(1, min(layers, 7) + 1):
            found = split(costs_of(graph, Cluster.of(stages, 1.0)), PERIOD, "exact", stages)
            check_whole(found, layers, stages)
            assert found.value == -(-layers // stages)


@pytest.mark.parametrize("method", ["greedy", "recursive"])
def test_a_chain_that_fits_in_a_device_order_is_fitted(method: str) -> None:
    # Whenever packing each device full would do, these splitters find a way too.
    random = Random(3)
    fitted = 0
    for _ in range(150):
        sizes = [random.randint(1, 9) for _ in range(random.randint(2, 9))]
        memory = random.randint(9, 20)
        stages, used = 1, 0
        for size in sizes:
            if used + size > memory:
                stages, used = stages + 1, 0
            used += size
        graph = LayerGraph.chain(
            [Node(f"n{i}", weight_bytes=s, seconds=float(random.randint(1, 5))) for i, s in enumerate(sizes)]
        )
        found = split(costs_of(graph, Cluster.of(stages, memory)), PERIOD, method, stages)
        check_whole(found, len(sizes), stages)
        assert all(found.costs.fits(nodes, device) for nodes, device in found.cut)
        fitted += stages > 1
    assert fitted > 50


def test_shares_follow_speed() -> None:
    graph = LayerGraph.chain([Node(f"n{i}", seconds=1.0) for i in range(12)])
    cluster = Cluster((Device("slow", 1.0), Device("fast", 1.0, speed=3.0)))
    for method in SPLITTERS:
        found = split(costs_of(graph, cluster), PERIOD, method, 2)
        share = {cluster.devices[d].name: nodes.bit_count() for nodes, d in found.cut}
        assert share == {"slow": 3, "fast": 9}


def test_recursive_opens_what_fits_nowhere() -> None:
    config = decoder(num_layers=2, num_kv_heads=8)
    graph = LayerGraph.of(config)
    largest = max(n.weight_bytes for n in graph.nodes)
    cluster = Cluster.of(10, memory=largest / 2)
    with pytest.raises(PlanError, match=r"'embed' needs .* opens it into smaller parts"):
        split(costs_of(graph, cluster), PERIOD, "exact")
    found = split(costs_of(graph, cluster), PERIOD, "recursive")
    names = [name for _, layer in found.stages for name in layer]
    assert sorted(names) == sorted(n.name for n in found.costs.graph.nodes)
    assert "embed.shards.0" in names
    assert all(found.costs.fits(nodes, device) for nodes, device in found.cut)


def test_recursive_opens_for_more_stages_than_layers() -> None:
    graph = LayerGraph.of(decoder(num_layers=1))
    found = split(costs_of(graph, Cluster.of(5, math.inf)), PERIOD, "recursive", 5)
    assert len(found.cut) == 5
    with pytest.raises(ValueError, match="stages=5 is more than the graph's 3 layers"):
        split(costs_of(graph, Cluster.of(5, math.inf)), PERIOD, "greedy", 5)


def test_bad_calls_are_named() -> None:
    costs = costs_of(LayerGraph.chain([Node("a"), Node("b")]), Cluster.of(1, 1.0))
    with pytest.raises(ValueError, match="splitter must be one of recursive, greedy, exact, not 'magic'"):
        split(costs, PERIOD, "magic")
    with pytest.raises(ValueError, match="stages=3 is more than the graph's 2 layers"):
        split(costs, PERIOD, "exact", 3)
    with pytest.raises(ValueError, match="stages=2 is more than the 1 devices"):
        split(costs, PERIOD, "exact", 2)
    with pytest.raises(ValueError, match="stages must be an integer"):
        split(costs, PERIOD, "exact", 0)


@pytest.mark.parametrize("method", SPLITTERS)
def test_an_impossible_plan_says_which_layer_and_what_would_help(method: str) -> None:
    large = LayerGraph.chain([Node("small", weight_bytes=1), Node("large", weight_bytes=50)])
    with pytest.raises(
        PlanError, match=r"layer 'large' needs 50 B .*'device-0', has 40 B.*What would help: a device"
    ):
        split(costs_of(large, Cluster.of(2, 40)), PERIOD, method)
    many = LayerGraph.chain([Node(f"n{i}", weight_bytes=30) for i in range(4)])
    with pytest.raises(
        PlanError, match=r"120 B .*80 B: 40 B short.*'n2'.*'device-1'.*1 more like 'device-0'"
    ):
        split(costs_of(many, Cluster.of(2, 40)), PERIOD, method)
    scattered = LayerGraph.chain([Node(f"n{i}", weight_bytes=w) for i, w in enumerate((30, 20, 20, 10))])
    with pytest.raises(PlanError, match=r"found no way to put 4 layers.*'n3'"):
        split(costs_of(scattered, Cluster.of(2, 40)), PERIOD, method)
    picky = LayerGraph.chain([Node("a"), Node("b", resources={"gpu": 2})])
    with pytest.raises(PlanError, match=r"layer 'b' needs a device that offers gpu=2; none of device-0"):
        split(costs_of(picky, Cluster.of(1, 40)), PERIOD, method)
    kv = LayerGraph.chain([Node("a", kv_bytes=10)])
    with pytest.raises(PlanError, match="fewer rows than 8 or a shorter context than 4"):
        split(CostModel(kv, Cluster.of(1, 40), Workload(rows=8, context=4)), PERIOD, method)
