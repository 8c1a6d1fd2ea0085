"""Stages on devices: never worse than the splitter left them, in the order bound, exact, genetic, greedy."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest

from daskllm.graph import (
    SCHEDULERS,
    Cluster,
    CostModel,
    Device,
    LayerGraph,
    Node,
    Objective,
    PlanError,
    Split,
    Workload,
    lower_bound,
    place,
    split,
)
from tests.graph.instances import random_cluster, random_graph


def instances(count: int) -> list[tuple[CostModel, Objective, int]]:
    found = []
    for seed in range(count):
        random = Random(seed)
        graph = random_graph(random, random.randint(3, 6))
        cluster = random_cluster(random, 3)
        m = random.choice((1, 2, 3))
        kind = random.choice(("latency", "batch", "period"))
        found.append(
            (CostModel(graph, cluster, Workload(rows=2), m), Objective(kind, m), random.randint(2, 3))
        )
    return found


def test_bound_exact_genetic_greedy_in_this_order() -> None:
    compared, beaten = 0, 0
    for costs, objective, stages in instances(30):
        try:
            greedy = place(split(costs, objective, "greedy", stages), "greedy")
        except PlanError:
            continue
        genetic = place(greedy, "genetic", seed=1)
        exact = split(costs, objective, "exact", stages)
        assert lower_bound(costs, objective) <= exact.value + 1e-9
        assert exact.value <= genetic.value + 1e-9
        assert genetic.value <= greedy.value + 1e-9
        compared += 1
        beaten += genetic.value < greedy.value - 1e-9
    assert compared > 15
    assert beaten > 0


def test_optimal_is_the_best_of_all_orders_of_devices() -> None:
    better = 0
    for costs, objective, stages in instances(40):
        try:
            found = split(costs, objective, "greedy", stages)
        except PlanError:
            continue
        parts = [nodes for nodes, _ in found.cut]
        values = [
            objective.value(costs.loads(tuple(zip(parts, order, strict=True))))
            for order in itertools.permutations(range(3), stages)
            if all(costs.fits(p, d) for p, d in zip(parts, order, strict=True))
        ]
        best = place(found, "optimal")
        assert best.value == pytest.approx(min(values))
        assert [nodes for nodes, _ in best.cut] == parts
        better += best.value < found.value - 1e-9
    assert better > 0


def test_no_scheduler_makes_an_exact_split_worse() -> None:
    for costs, objective, stages in instances(12):
        try:
            exact = split(costs, objective, "exact", stages)
        except PlanError:
            continue
        for method in SCHEDULERS:
            assert place(exact, method).value == pytest.approx(exact.value)


def test_the_urgent_stage_gets_the_fast_device() -> None:
    nodes = [Node("calm", seconds=4.0), Node("urgent", seconds=4.0, priority=1)]
    cluster = Cluster((Device("fast", 1.0, speed=2.0), Device("slow", 1.0)))
    costs = CostModel(LayerGraph.chain(nodes), cluster, Workload())
    worse = Split(costs, ((1, 1), (2, 1)), Objective("latency", 1))
    cut = place(worse, "greedy").cut
    assert cut == ((1, 1), (2, 0))


def test_genetic_reorders_independent_nodes() -> None:
    # The given order splits into 6 and 10; c and e together against the others are 9 and 7.
    nodes = [Node(n, seconds=s) for n, s in (("a", 5.0), ("b", 1.0), ("c", 5.0), ("d", 1.0), ("e", 4.0))]
    costs = CostModel(LayerGraph(nodes), Cluster.of(2, 1.0), Workload())
    objective = Objective("period", math.inf)
    greedy = place(split(costs, objective, "greedy", 2), "greedy")
    assert (greedy.value, place(greedy, "genetic").value) == (10.0, 9.0)
    assert place(greedy, "genetic", seed=4) == place(greedy, "genetic", seed=4)


def test_unknown_scheduler() -> None:
    costs = CostModel(LayerGraph([Node("a")]), Cluster.of(1, 1.0), Workload())
    with pytest.raises(ValueError, match="scheduler must be one of"):
        place(split(costs, Objective()), "lucky")
