"""The simulator against the formulas, with which it shares none, and against timelines worked out by hand."""

from __future__ import annotations

import ast
from pathlib import Path
from random import Random

import pytest

import daskllm.graph.simulate as module
from daskllm.graph import (
    Cluster,
    CostModel,
    LayerGraph,
    Link,
    Node,
    Objective,
    PlanError,
    Split,
    Workload,
    simulate_batch,
    simulate_loop,
    split,
)
from tests.graph.instances import random_cluster, random_graph


def plans(count: int, *, chain: bool) -> list[tuple[Split, int]]:
    """Random splits with random micro-batches."""
    found = []
    for seed in range(count):
        random = Random(seed)
        graph = random_graph(random, random.randint(2, 7), chain=chain)
        workload = Workload(rows=4, context=3, return_bytes=random.choice((0, 4)))
        m = random.choice((1, 2, 3, 5))
        costs = CostModel(graph, random_cluster(random, 4), workload, m)
        method = random.choice(("greedy", "exact", "recursive"))
        try:
            stages = random.randint(1, min(4, len(graph.nodes)))
            found.append((split(costs, Objective("batch", 2), method, stages), m))
        except PlanError:
            continue
    return found


@pytest.mark.parametrize("chain", [True, False])
def test_formulas_equal_the_events(chain: bool) -> None:
    compared = plans(150, chain=chain)
    assert len(compared) >= 100
    for found, m in compared:
        costs, loads = found.costs, found.costs.loads(found.cut)
        where = (costs.graph, costs.cluster, found.stages, costs.step)
        batch = simulate_batch(*where, m)
        assert batch.latency == pytest.approx(Objective("latency").value(loads))
        assert batch.seconds == pytest.approx(Objective("batch", m).value(loads))
        assert batch.stages == pytest.approx([m * s for s in loads.stages])
        back = costs.step.rows * costs.workload.return_bytes
        loop = simulate_loop(*where, m, return_bytes=back, rounds=16)
        assert loop.period == pytest.approx(Objective("period", m).value(loads))


def test_a_timeline_by_hand() -> None:
    graph = LayerGraph.chain([Node("a", seconds=2.0, output_bytes=4), Node("b", seconds=3.0)])
    cluster = Cluster.of(2, 1.0, link=Link(0.5, 8.0))
    stages = [("device-0", ["a"]), ("device-1", ["b"])]
    step = Workload().step(1)
    run = simulate_batch(graph, cluster, stages, step, 3)
    # a: 0-2-4-6; messages take 1; b: 3-6-9-12.
    assert (run.latency, run.seconds) == (6.0, 12.0)
    assert run.stages == (6.0, 9.0)
    assert run.links == (3.0,)
    assert run.waiting == (6.0, 3.0)
    alone = simulate_loop(graph, cluster, stages, step, 1, return_bytes=4)
    assert alone.period == 2 + 1 + 3 + 1
    assert simulate_loop(graph, cluster, stages, step, 2, return_bytes=4).period == 3.5
    assert simulate_loop(graph, cluster, stages, step, 3, return_bytes=4).period == 3.0


def test_the_simulator_shares_no_formula_with_the_cost_model() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "daskllm.graph.cost" not in imported
    assert {m for m in imported if m and m.startswith("daskllm")} == {
        "daskllm.graph.cluster",
        "daskllm.graph.layers",
        "daskllm.graph.nodes",
    }
    called = {
        n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    called |= {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert "sum" not in called
    assert "seconds" not in called  # Link.seconds is the cost model's
