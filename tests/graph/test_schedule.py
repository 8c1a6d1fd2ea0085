"""Schedules of task graphs: greedy, optimal and genetic, on known examples and against every schedule."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskllm.graph import (
    SCHEDULERS,
    Cluster,
    CostModel,
    LayerGraph,
    Link,
    Machine,
    Node,
    PlanError,
    Problem,
    Task,
    Workload,
    schedule,
)
from daskllm.graph.optimal import bound, optimal
from daskllm.graph.schedule import Builder, Placed, Schedule, upward_ranks
from tests.graph.instances import random_problem, ten_tasks


def test_the_ten_task_example() -> None:
    problem = ten_tasks()
    ranks = upward_ranks(problem)
    assert [round(r, 3) for r in ranks][:4] == [108.0, 77.0, 80.0, 80.0]
    greedy, best, genetic = (schedule(problem, method) for method in SCHEDULERS)
    assert greedy.makespan == 80
    assert (best.makespan, best.proven) == (73, True)
    assert bound(problem) <= 73 <= genetic.makespan <= 80
    for found in (greedy, best, genetic):
        found.check(problem)


def test_longest_first_is_not_the_best() -> None:
    tasks = tuple(Task(f"t{i}", (s, s)) for i, s in enumerate((3.0, 3.0, 2.0, 2.0, 2.0)))
    problem = Problem(tasks, (Machine("a"), Machine("b")))
    assert schedule(problem, "greedy").makespan == 7
    assert schedule(problem, "optimal").makespan == 6
    assert schedule(problem, "genetic").makespan == 6  # the genetic scheduler beats its seed
    assert bound(problem) == 6


def every_cost(problem: Problem) -> list[tuple[float, ...]]:
    """Costs of all schedules that place tasks in any order and on any machine, without looking for gaps."""
    costs = []
    count, machines = len(problem.tasks), range(len(problem.machines))
    for order in itertools.permutations(range(count)):
        place = {t: i for i, t in enumerate(order)}
        if any(place[b] > place[t] for t in order for b in problem.before[t]):
            continue
        for on in itertools.product(machines, repeat=count):
            finish, free, room = [0.0] * count, [0.0] * len(machines), [m.memory for m in problem.machines]
            for t in order:
                m = on[t]
                arrived = [finish[b] + problem.delays[b, t][on[b]][m] for b in problem.before[t]]
                finish[t] = free[m] = max([free[m], *arrived]) + problem.tasks[t].seconds[m]
                room[m] -= problem.tasks[t].memory
            if min(room) >= 0 and not math.isinf(max(finish)):
                costs.append(problem.cost(finish))
    return costs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_optimal_is_the_best_of_all_schedules(seed: int) -> None:
    random = Random(seed)
    problem = random_problem(random, random.randint(1, 4), random.randint(1, 3))
    best = optimal(problem)
    best.check(problem)
    assert best.proven
    assert best.cost == pytest.approx(min(every_cost(problem)))


def test_bound_optimal_genetic_greedy_in_this_order() -> None:
    beaten = 0
    for seed in range(25):
        problem = random_problem(Random(seed), 6, 2)
        try:
            greedy = schedule(problem, "greedy")
        except PlanError:
            continue
        best, genetic = schedule(problem, "optimal"), schedule(problem, "genetic")
        for found in (greedy, best, genetic):
            found.check(problem)
        assert bound(problem) <= best.makespan + 1e-9
        assert best.cost <= genetic.cost <= greedy.cost
        beaten += genetic.cost < greedy.cost
    assert beaten > 0


def test_genetic_has_its_own_seeded_generator() -> None:
    problem = random_problem(Random(5), 8, 3)
    assert schedule(problem, "genetic", seed=3) == schedule(problem, "genetic", seed=3)


@pytest.mark.parametrize("method", SCHEDULERS)
def test_urgent_tasks_and_what_they_wait_for_go_first(method: str) -> None:
    tasks = (
        Task("long", (9.0,)),
        Task("before", (2.0,)),
        Task("urgent", (1.0,), priority=5),
    )
    found = schedule(Problem(tasks, (Machine("m"),), {("before", "urgent"): 0.0}), method)
    assert [p.task for p in found.placed] == ["before", "urgent", "long"]
    assert found.cost == (3.0, 12.0)


@pytest.mark.parametrize("method", SCHEDULERS)
def test_resources_and_memory_are_respected(method: str) -> None:
    tasks = (
        Task("on-gpu", (5.0, 50.0), resources={"gpu": 1}),
        Task("heavy", (1.0, 1.0), memory=8),
        Task("heavier", (1.0, 1.0), memory=9),
    )
    machines = (Machine("cpu", memory=10), Machine("gpu", memory=10, resources={"gpu": 1}))
    problem = Problem(tasks, machines)
    found = schedule(problem, method)
    found.check(problem)
    on = {p.task: p.machine for p in found.placed}
    assert on["on-gpu"] == "gpu"
    assert on["heavy"] != on["heavier"]
    with pytest.raises(PlanError):
        schedule(Problem((Task("on-gpu", (5.0,), resources={"gpu": 1}),), machines[:1]), method)
    with pytest.raises(PlanError):
        schedule(Problem((Task("a", (1.0,), memory=6), Task("b", (1.0,), memory=6)), machines[:1]), method)


def test_a_cut_search_says_that_it_is_not_proven() -> None:
    problem = ten_tasks()
    found = optimal(problem, limit=3)
    assert not found.proven
    assert found.bound <= 73 <= found.makespan <= 80


def test_check_finds_what_is_wrong() -> None:
    tasks = (Task("a", (2.0, 2.0), memory=1), Task("b", (2.0, 2.0), memory=1))
    problem = Problem(tasks, (Machine("x", memory=1), Machine("y")), {("a", "b"): 1.0})

    def wrong(*placed: tuple[str, str, float, float]) -> Schedule:
        return Schedule(tuple(Placed(*p) for p in placed), (9.0,))

    wrong(("a", "x", 0, 2), ("b", "y", 3, 5)).check(problem)
    for found, reason in (
        (wrong(("a", "x", 0, 2)), "exactly once"),
        (wrong(("a", "x", 0, 2), ("b", "y", 2.5, 4.5)), "starts before"),
        (wrong(("a", "x", 0, 3), ("b", "y", 5, 7)), "does not take"),
        (wrong(("a", "y", 0, 2), ("b", "y", 1, 3)), "starts before"),
        (wrong(("a", "x", 0, 2), ("b", "x", 2, 4)), "memory"),
    ):
        with pytest.raises(ValueError, match=reason):
            found.check(problem)
    free = Problem(tasks, problem.machines)
    with pytest.raises(ValueError, match="two tasks run at once"):
        wrong(("a", "y", 0, 2), ("b", "y", 1, 3)).check(free)


def test_a_gap_is_used() -> None:
    tasks = (Task("a", (1.0,)), Task("late", (1.0,)), Task("gap", (2.0,)))
    builder = Builder(Problem(tasks, (Machine("m"),)))
    builder.place(0, 0)
    builder._busy[0].append((3.0, 4.0))
    assert builder.start(2, 0) == 1.0


def test_tasks_of_a_layer_graph() -> None:
    graph = LayerGraph(
        [
            Node("a", seconds=1.0, output_bytes=4),
            Node("b", seconds=3.0),
            Node("c", seconds=3.0),
            Node("d", seconds=1.0),
        ],
        [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")],
    )
    cluster = Cluster.of(2, 1e9, link=Link(0.0, 8.0))
    problem = Problem.of(CostModel(graph, cluster, Workload()))
    assert problem.delays[0, 1] == [[0.0, 0.5], [0.5, 0.0]]
    assert schedule(problem, "optimal").makespan == 5.5  # the branches run side by side


def test_bad_problems() -> None:
    machine = (Machine("m"),)
    with pytest.raises(ValueError, match="cycle"):
        Problem((Task("a", (1.0,)), Task("b", (1.0,))), machine, {("a", "b"): 0.0, ("b", "a"): 0.0})
    with pytest.raises(ValueError, match="time of at least 0"):
        Problem((Task("a", (-1.0,)),), machine)
    with pytest.raises(ValueError, match="for each of the machines"):
        Problem((Task("a", (1.0, 2.0)),), machine)
    with pytest.raises(ValueError, match="names task 'z'"):
        Problem((Task("a", (1.0,)),), machine, {("a", "z"): 0.0})
    with pytest.raises(ValueError, match="unique"):
        Problem((Task("a", (1.0,)), Task("a", (1.0,))), machine)
    with pytest.raises(ValueError, match="scheduler must be one of greedy, optimal, genetic"):
        schedule(ten_tasks(), "fast")
