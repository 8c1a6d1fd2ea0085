"""The exact splitter against every split there is, against a MILP solver, and against published optima."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from daskllm.graph import (
    Cluster,
    CostModel,
    LayerGraph,
    Node,
    Objective,
    PlanError,
    Workload,
    lower_bound,
    read_graph,
    split,
)
from daskllm.graph.exact import SearchLimitError, best_cut, device_classes
from tests.graph.instances import SHARED, all_splits, judge, random_cluster, random_graph


@pytest.mark.parametrize("kind", ["latency", "batch", "period"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_exact_is_the_best_of_all_splits_and_device_orders(kind: Any, seed: int) -> None:
    random = Random(seed)
    graph = random_graph(random, random.randint(2, 6), chain=random.random() < 0.3)
    cluster = random_cluster(random, random.choice((1, 2, 3, 3, 3)))
    workload = Workload(rows=4, context=2, return_bytes=random.choice((0, 4)))
    m = random.choice((1, 2, 3))
    objective = Objective(kind, m if kind == "batch" or random.random() < 0.7 else math.inf)
    most = min(len(graph.nodes), len(cluster.devices))
    wanted = random.choice((None, most, random.randint(1, most)))
    values = []
    for stages in range(1, most + 1) if wanted is None else (wanted,):
        for chosen in all_splits(graph, cluster, stages):
            judged = judge(graph, cluster, workload, chosen, m)
            if judged is not None:
                values.append(judged.value(kind, objective.micro_batches))
    costs = CostModel(graph, cluster, workload, m)
    if not values:
        with pytest.raises(PlanError):
            split(costs, objective, "exact", wanted)
        return
    found = split(costs, objective, "exact", wanted)
    assert found.value == pytest.approx(min(values), rel=1e-9, abs=1e-9)
    assert lower_bound(costs, objective) <= found.value + 1e-9
    for method in ("greedy", "recursive"):
        try:
            other = split(costs, objective, method, wanted).value
        except PlanError:
            continue
        if wanted is not None or other >= min(values):
            assert other >= found.value - 1e-9


def milp_optimum(graph: LayerGraph, stages: int, memory: float) -> float:
    """The least largest load over like devices around a host, as a mixed-integer program (HiGHS).

    Binary x[n, s]: node n is in stage s; o[n, s] and i[n, s]: its result leaves or enters s; T is the load.
    """
    nodes, place = graph.nodes, {n.name: k for k, n in enumerate(graph.nodes)}
    size = len(nodes) * stages
    x, out, into = (np.arange(size).reshape(len(nodes), stages) + k * size for k in range(3))
    top, rows, low, high = 3 * size, [], [], []

    def require(terms: dict[int, float], least: float, most: float) -> None:
        row = np.zeros(top + 1)
        for column, factor in terms.items():
            row[column] += factor
        rows.append(row)
        low.append(least)
        high.append(most)

    for k in range(len(nodes)):
        require({int(v): 1.0 for v in x[k]}, 1, 1)
    for edge in graph.edges:
        a, b = place[edge.source], place[edge.target]
        terms = {int(x[b, s]): float(s) for s in range(stages)}
        require({**terms, **{int(x[a, s]): -float(s) for s in range(stages)}}, 0, math.inf)
        for s in range(stages):
            require({int(out[a, s]): 1, int(x[a, s]): -1, int(x[b, s]): 1}, 0, math.inf)
            require({int(into[a, s]): 1, int(x[b, s]): -1, int(x[a, s]): 1}, 0, math.inf)
    for s in range(stages):
        load = {top: 1.0}
        for k, n in enumerate(nodes):
            load[int(x[k, s])] = -(n.seconds or 0.0)
            load[int(out[k, s])] = load[int(into[k, s])] = -(n.send_seconds or 0.0)
        require(load, 0, math.inf)
        require({int(x[k, s]): n.weight_bytes for k, n in enumerate(nodes)}, 0, memory)
    integral = np.zeros(top + 1)
    integral[:size] = 1
    upper = np.ones(top + 1)
    upper[top] = np.inf
    cost = np.zeros(top + 1)
    cost[top] = 1
    solved = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=integral,
        bounds=Bounds(0, upper),
    )
    return float(solved.fun) if solved.success else math.inf


def test_exact_is_the_optimum_of_the_integer_program() -> None:
    random, infeasible = Random(7), 0
    for _ in range(25):
        count, stages = random.randint(4, 7), random.randint(2, 3)
        nodes = [
            Node(
                f"n{i}",
                weight_bytes=random.randint(0, 9),
                seconds=float(random.randint(0, 9)),
                send_seconds=random.choice((0.0, 0.5, 2.0)),
            )
            for i in range(count)
        ]
        pairs = [
            (f"n{a}", f"n{b}") for a, b in itertools.combinations(range(count), 2) if random.random() < 0.4
        ]
        graph = LayerGraph(nodes, pairs)
        memory = random.choice((12.0, 20.0, 1000.0))
        cluster = Cluster(Cluster.of(stages, memory).devices, transfers="host")
        best = milp_optimum(graph, stages, memory)
        costs = CostModel(graph, cluster, Workload())
        if math.isinf(best):
            infeasible += 1
            with pytest.raises(PlanError):
                split(costs, Objective("period"), "exact")
        else:
            assert split(costs, Objective("period"), "exact").value == pytest.approx(best, abs=1e-5)
    assert infeasible < 15


PUBLISHED = {2: 47.479, 3: 32.2429, 4: 24.9169, 6: 17.7899}


@pytest.mark.parametrize("devices", PUBLISHED)
def test_published_optima_of_bert24(devices: int) -> None:
    path = SHARED / "data" / "planning" / "bert24_inference.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    file = read_graph(path)
    costs = CostModel(file.graph, file.cluster(devices), Workload())
    found = split(costs, Objective("period"), "exact")
    assert found.value == pytest.approx(PUBLISHED[devices], rel=1e-5)
    assert lower_bound(costs, Objective("period")) <= found.value


def test_a_generated_instance_of_the_published_format(tmp_path: Path) -> None:
    # Six nodes of 4 in a row, moving a result costs 1: three pairs, the middle one moves twice.
    plain = {
        "maxSizePerFPGA": 100.0,
        "maxFPGAs": 3,
        "nodes": [{"name": f"n{i}", "id": i, "fpgaLatency": 4.0, "size": 10.0} for i in range(6)],
        "edges": [{"sourceId": i, "destId": i + 1, "cost": 1.0} for i in range(5)],
    }
    path = tmp_path / "row.json"
    path.write_text(json.dumps(plain))
    file = read_graph(path)
    found = split(CostModel(file.graph, file.cluster(), Workload()), Objective("period"), "exact")
    assert found.value == 10.0
    assert [names for _, names in found.stages] == [("n0", "n1"), ("n2", "n3"), ("n4", "n5")]


def test_like_devices_are_one_class() -> None:
    cluster = random_cluster(Random(1), 3)
    assert device_classes(Cluster.of(4, 1.0)) == [[0, 1, 2, 3]]
    assert sorted(itertools.chain(*device_classes(cluster))) == [0, 1, 2]


def test_a_search_that_grows_too_large_says_so() -> None:
    graph = LayerGraph([Node(f"n{i}", seconds=1.0) for i in range(16)])
    costs = CostModel(graph, Cluster.of(3, 1.0), Workload())
    with pytest.raises(SearchLimitError):
        best_cut(costs, Objective("batch", 2), limit=1000)
