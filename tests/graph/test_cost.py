"""The formulas, by numbers worked out by hand, and bad devices, links and workloads."""

from __future__ import annotations

import math

import pytest

from daskllm.graph import Cluster, CostModel, Device, LayerGraph, Link, Loads, Node, Objective, Workload
from daskllm.graph.cost import settle


def test_roofline_takes_the_slower_side() -> None:
    graph = LayerGraph([Node("c", weight_bytes=10, flops_per_token=100), Node("m", weight_bytes=1000)])
    device = Device("d", memory=1e9, flops=50.0, bandwidth=100.0, launch=0.5)
    costs = CostModel(graph, Cluster((device,)), Workload())
    assert costs.seconds == [[100 / 50 + 0.5, 1000 / 100 + 0.5]]


def test_given_times_scale_with_speed() -> None:
    graph = LayerGraph([Node("a", seconds=6.0)])
    costs = CostModel(graph, Cluster((Device("d", memory=1, speed=2.0),)), Workload())
    assert costs.seconds == [[3.0]]


def test_memory_counts_kv_of_all_rows_and_ties_once() -> None:
    nodes = [
        Node("embed", weight_bytes=100, activation_bytes=3),
        Node("mid", weight_bytes=10, kv_bytes=2, activation_bytes=5),
        Node("head", weight_bytes=110, tied=("embed", 100)),
    ]
    costs = CostModel(LayerGraph.chain(nodes), Cluster.of(2, 1e9), Workload(rows=4, context=10), 2)
    whole = costs.memory(costs.all)
    assert (whole.weights, whole.kv, whole.activations) == (120, 80, 10)
    assert costs.memory(costs.mask(["mid", "head"])).weights == 120


def test_direct_transfers_are_relayed_in_one_message() -> None:
    graph = LayerGraph(
        [Node(n, seconds=1.0, output_bytes=b) for n, b in (("a", 4), ("b", 6), ("c", 1))],
        [("a", "b"), ("a", "c"), ("b", "c")],
    )
    costs = CostModel(graph, Cluster.of(3, 1.0, link=Link(0.5, 2.0)), Workload(return_bytes=8))
    loads = costs.loads([(1, 0), (2, 1), (4, 2)])
    # a's result goes to b's device and on to c's.
    assert loads == Loads((1.0, 1.0, 1.0), (0.5 + 4 / 2, 0.5 + 10 / 2), 0.5 + 8 / 2)


def test_host_transfers_are_the_devices_own_time_and_count_once() -> None:
    graph = LayerGraph(
        [Node(n, seconds=1.0, send_seconds=s) for n, s in (("a", 4.0), ("b", 6.0), ("c", 9.0))],
        [("a", "b"), ("a", "c"), ("b", "c")],
    )
    costs = CostModel(graph, Cluster.of(2, 1.0), Workload())
    host = CostModel(graph, Cluster(costs.cluster.devices, transfers="host"), Workload())
    assert host.loads([(1, 0), (6, 1)]) == Loads((1 + 4, 2 + 4), (0.0,), 0.0)


def test_objectives_are_kept_apart() -> None:
    loads = Loads((2.0, 3.0), (1.0,), 4.0)
    assert Objective("latency", 7).value(loads) == 6
    assert Objective("batch", 4).value(loads) == 6 + 3 * 3
    assert Objective("period", 2).value(loads) == 5
    assert Objective("period", 100).value(loads) == 4
    assert Objective("period").value(Loads((2.0, 3.0), (1.0,))) == 3
    assert settle("latency", Workload(rows=8), 4) == (Objective("latency", 1), 1)
    assert settle("batch", Workload(rows=8, micro_batches=8), 4) == (Objective("batch", 8), 8)


def test_bad_devices_links_and_workloads() -> None:
    for memory in (None, 0):
        with pytest.raises(ValueError, match="'d' reports no memory"):
            Device("d", memory=memory)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory must be"):
        Device("d", memory=-1)
    with pytest.raises(ValueError, match="flops must be"):
        Device("d", memory=1, flops=0)
    with pytest.raises(ValueError, match="bandwidth must be"):
        Link(0.0, math.nan)
    with pytest.raises(ValueError, match="two devices are named 'd'"):
        Cluster((Device("d", 1), Device("d", 1)))
    with pytest.raises(ValueError, match="names device 'x'"):
        Cluster((Device("d", 1),), links={("d", "x"): Link()})
    with pytest.raises(ValueError, match="transfers must be"):
        Cluster((Device("d", 1),), transfers="pigeon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one device"):
        Cluster(())
    with pytest.raises(ValueError, match="number of devices"):
        Cluster.of(0, 1.0)
    with pytest.raises(ValueError, match="rows must be"):
        Workload(rows=0)
    with pytest.raises(ValueError, match="micro_batches"):
        Workload(micro_batches=0)
    with pytest.raises(ValueError, match="objective must be"):
        Objective("speed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite"):
        Objective("batch")
