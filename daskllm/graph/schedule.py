"""Tasks of any graph on unequal machines: what a schedule is, and three ways to make one.

Owns problems, schedules, their checking, a lower bound, and the greedy scheduler; the optimal search is in
``optimal`` and the genetic one in ``evolve``. Refuses to know layers: `Problem.of` takes times from a cost
model. A machine runs one task at a time; a task that needs a result from another machine waits for it to
arrive. Tasks of higher priority, and all that they wait for, are finished as early as can be before the
next lower priority is looked at: costs are compared priority by priority, the time of all tasks last.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from daskllm.graph.cost import CostModel
from daskllm.graph.errors import PlanError

__all__ = ["Builder", "Cost", "Machine", "Placed", "Problem", "Schedule", "Task", "greedy", "list_schedule"]

Cost: TypeAlias = "tuple[float, ...]"
"""When the tasks of each priority (and above) are finished, highest priority first; the makespan last."""

_Delay: TypeAlias = "float | Sequence[Sequence[float]]"


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work.

    Attributes:
        seconds: its time on each machine, in their order; ``math.inf`` where it cannot run.
        priority: larger goes first.
        resources: labels, with amounts, that its machine must offer.
        memory: bytes that stay on its machine.

    Example:
        >>> Task("a", (2.0, math.inf)).seconds[0]  # on the first of two machines, and nowhere else
        2.0
    """

    name: str
    seconds: tuple[float, ...]
    priority: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    memory: float = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """Runs one task at a time, holds ``memory`` bytes, offers labels with amounts.

    Example:
        >>> Machine("gpu-0", memory=80e9, resources={"GPU": 1}).name
        'gpu-0'
    """

    name: str
    memory: float = math.inf
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Placed:
    """Where and when a task runs."""

    task: str
    machine: str
    start: float
    finish: float


@dataclass(frozen=True)
class Problem:
    """Tasks, machines, and what must wait for what.

    Attributes:
        edges: (task, task after it) -> seconds from one machine to another: one number, or a table by
            source and target machine. On one machine nothing is waited for.

    Raises:
        ValueError: an unknown name, a cycle, a negative time, or times for another number of machines.

    Example:
        >>> tasks = [Task("a", (2.0, 4.0)), Task("b", (3.0, 1.0))]
        >>> problem = Problem(tasks, [Machine("x"), Machine("y")], {("a", "b"): 1.0})
        >>> greedy(problem).makespan  # a on x, 1 s to y, b there
        4.0
    """

    tasks: tuple[Task, ...]
    machines: tuple[Machine, ...]
    edges: Mapping[tuple[str, str], _Delay] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index = self.index
        if not self.tasks or not self.machines or len(index) < len(self.tasks):
            raise ValueError("a problem needs machines, and tasks whose names are unique")
        for task in self.tasks:
            if len(task.seconds) != len(self.machines) or not all(s >= 0 for s in task.seconds):
                raise ValueError(f"task {task.name!r} needs a time of at least 0 for each of the machines")
        for pair in self.edges:
            for end in pair:
                if end not in index:
                    raise ValueError(f"an edge names task {end!r}, which is not there")
        if len(self.order) < len(self.tasks):
            raise ValueError("the tasks wait for each other in a cycle")

    @classmethod
    def of(cls, costs: CostModel) -> Problem:
        """Every node a task: one micro-batch through the graph, its branches beside each other."""
        devices, graph = costs.cluster.devices, costs.graph
        hops = 2 if costs.cluster.transfers == "host" else 1
        tasks = tuple(
            Task(
                n.name,
                tuple(row[i] for row in costs.seconds),
                n.priority,
                n.resources,
                costs.memory(1 << i).total,
            )
            for i, n in enumerate(costs.nodes)
        )
        edges: dict[tuple[str, str], _Delay] = {}
        for edge in graph.edges:
            size, given = costs.sends(costs.index[edge.source], 1 << costs.index[edge.target])
            edges[edge.source, edge.target] = tuple(
                tuple(hops * (costs.cluster.between(a.name, b.name).seconds(size) + given) for b in devices)
                for a in devices
            )
        return cls(tasks, tuple(Machine(d.name, d.memory, d.resources) for d in devices), edges)

    @cached_property
    def index(self) -> dict[str, int]:
        """Task name -> number."""
        return {t.name: i for i, t in enumerate(self.tasks)}

    @cached_property
    def before(self) -> list[list[int]]:
        """For each task, those that it waits for."""
        found: list[list[int]] = [[] for _ in self.tasks]
        for a, b in self.edges:
            found[self.index[b]].append(self.index[a])
        return found

    @cached_property
    def after(self) -> list[list[int]]:
        """For each task, those that wait for it."""
        found: list[list[int]] = [[] for _ in self.tasks]
        for a, b in self.edges:
            found[self.index[a]].append(self.index[b])
        return found

    @cached_property
    def order(self) -> list[int]:
        """Task numbers, each after those that it waits for."""
        missing = [len(b) for b in self.before]
        ready = [i for i, count in enumerate(missing) if not count]
        order = []
        while ready:
            i = heapq.heappop(ready)
            order.append(i)
            for j in self.after[i]:
                missing[j] -= 1
                if not missing[j]:
                    heapq.heappush(ready, j)
        return order

    @cached_property
    def seconds(self) -> list[list[float]]:
        """Time of each task on each machine; inf where labels or memory rule it out."""
        return [
            [
                s
                if t.memory <= m.memory and all(m.resources.get(k, 0) >= v for k, v in t.resources.items())
                else math.inf
                for s, m in zip(t.seconds, self.machines, strict=True)
            ]
            for t in self.tasks
        ]

    @cached_property
    def delays(self) -> dict[tuple[int, int], list[list[float]]]:
        """(task, task after it) -> seconds by source and target machine."""
        count = range(len(self.machines))
        return {
            (self.index[a], self.index[b]): [
                [0.0 if p == q else float(d if isinstance(d, (int, float)) else d[p][q]) for q in count]
                for p in count
            ]
            for (a, b), d in self.edges.items()
        }

    @cached_property
    def priority(self) -> list[float]:
        """Each task's own priority or that of the most urgent task that waits for it."""
        found = [t.priority for t in self.tasks]
        for i in reversed(self.order):
            found[i] = max([found[i], *(found[j] for j in self.after[i])])
        return found

    @cached_property
    def levels(self) -> list[float]:
        """The priorities there are, highest first."""
        return sorted(set(self.priority), reverse=True)

    def cost(self, finish: Sequence[float]) -> Cost:
        """What is compared, from the tasks' finishing times."""
        return tuple(
            max(f for f, p in zip(finish, self.priority, strict=True) if p >= level) for level in self.levels
        )


@dataclass(frozen=True)
class Schedule:
    """Where and when every task runs.

    Attributes:
        placed: by start time.
        cost: finishing times by priority; see `Cost`.
        bound: no schedule ends before this.
        proven: whether no schedule has a lower cost.

    Example:
        >>> problem = Problem([Task("a", (2.0,)), Task("b", (3.0,))], [Machine("x")], {("a", "b"): 0.0})
        >>> found = greedy(problem)
        >>> found.check(problem)  # raises what is wrong with one
        >>> [(p.task, p.start, p.finish) for p in found.placed], found.makespan
        ([('a', 0.0, 2.0), ('b', 2.0, 5.0)], 5.0)
    """

    placed: tuple[Placed, ...]
    cost: Cost
    bound: float = 0.0
    proven: bool = False

    @property
    def makespan(self) -> float:
        """When everything is done."""
        return self.cost[-1]

    def check(self, problem: Problem) -> None:
        """ValueError unless every task runs once, where it may, after what it waits for, alone, in room."""
        at = {p.task: p for p in self.placed}
        machines = {m.name: i for i, m in enumerate(problem.machines)}
        if sorted(at) != sorted(problem.index) or len(at) < len(self.placed):
            raise ValueError("not every task is placed exactly once")
        for name, i in problem.index.items():
            p = at[name]
            if not math.isclose(p.finish - p.start, problem.seconds[i][machines[p.machine]], abs_tol=1e-9):
                raise ValueError(f"task {name!r} does not take {p.finish - p.start} on {p.machine!r}")
        for (a, b), delay in problem.delays.items():
            x, y = at[problem.tasks[a].name], at[problem.tasks[b].name]
            if y.start < x.finish + delay[machines[x.machine]][machines[y.machine]] - 1e-9:
                raise ValueError(f"task {y.task!r} starts before the result of {x.task!r} is there")
        for machine in problem.machines:
            run = sorted((p.start, p.finish) for p in self.placed if p.machine == machine.name)
            if any(b[0] < a[1] - 1e-9 for a, b in itertools.pairwise(run)):
                raise ValueError(f"two tasks run at once on {machine.name!r}")
            if sum(
                problem.tasks[problem.index[p.task]].memory for p in self.placed if p.machine == machine.name
            ) > (machine.memory * (1 + 1e-12)):
                raise ValueError(f"the tasks on {machine.name!r} do not fit its memory")


class Builder:
    """A schedule in the making: tasks go, one by one, into the first gap that is long enough."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.finish = [math.nan] * len(problem.tasks)
        self.on = [-1] * len(problem.tasks)
        self._busy: list[list[tuple[float, float]]] = [[] for _ in problem.machines]
        self._room = [m.memory for m in problem.machines]

    def start(self, task: int, machine: int) -> float:
        """The earliest start of a task whose predecessors are placed; inf where it cannot go."""
        problem = self.problem
        seconds = problem.seconds[task][machine]
        if math.isinf(seconds) or problem.tasks[task].memory > self._room[machine] * (1 + 1e-12):
            return math.inf
        ready = max(
            (self.finish[b] + problem.delays[b, task][self.on[b]][machine] for b in problem.before[task]),
            default=0.0,
        )
        for begin, end in self._busy[machine]:
            if ready + seconds <= begin:
                break
            ready = max(ready, end)
        return ready

    def best(self, task: int) -> int:
        """The machine on which a task finishes first; -1 where none has room."""
        seconds = self.problem.seconds[task]
        ends = [self.start(task, m) + seconds[m] for m in range(len(seconds))]
        first = min(range(len(ends)), key=ends.__getitem__)
        return -1 if math.isinf(ends[first]) else first

    def place(self, task: int, machine: int) -> None:
        """Put a task at its earliest start."""
        start = self.start(task, machine)
        self.on[task], self.finish[task] = machine, start + self.problem.seconds[task][machine]
        self._room[machine] -= self.problem.tasks[task].memory
        insort(self._busy[machine], (start, self.finish[task]))

    def schedule(self, *, bound: float = 0.0, proven: bool = False) -> Schedule:
        """What has been built."""
        problem = self.problem
        placed = [
            Placed(t.name, problem.machines[m].name, f - problem.seconds[i][m], f)
            for i, (t, m, f) in enumerate(zip(problem.tasks, self.on, self.finish, strict=True))
        ]
        placed.sort(key=lambda p: (p.start, p.finish))
        return Schedule(tuple(placed), problem.cost(self.finish), bound, proven)


def list_schedule(
    problem: Problem, rank: Sequence[float], choose: Callable[[Builder, int], int] | None = None
) -> Builder | None:
    """Place ready tasks, the highest (priority, rank) first, where ``choose`` says (first to finish).

    None where a task finds no room.
    """
    builder, missing = Builder(problem), [len(b) for b in problem.before]
    place = {i: n for n, i in enumerate(problem.order)}
    ready = [(-problem.priority[i], -rank[i], place[i], i) for i, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    while ready:
        *_, task = heapq.heappop(ready)
        machine = choose(builder, task) if choose else builder.best(task)
        if machine < 0 or math.isinf(builder.start(task, machine)):
            return None
        builder.place(task, machine)
        for j in problem.after[task]:
            missing[j] -= 1
            if not missing[j]:
                heapq.heappush(ready, (-problem.priority[j], -rank[j], place[j], j))
    return builder


def upward_ranks(problem: Problem) -> list[float]:
    """Mean time from a task's start to the end of all that waits for it (Topcuoglu et al. 2002, eq. 8)."""
    count = len(problem.machines)
    pairs = max(1, count * (count - 1))
    ranks = [0.0] * len(problem.tasks)
    for i in reversed(problem.order):
        possible = [s for s in problem.seconds[i] if not math.isinf(s)]
        tails = [sum(map(sum, problem.delays[i, j])) / pairs + ranks[j] for j in problem.after[i]]
        ranks[i] = sum(possible) / max(1, len(possible)) + max(tails, default=0.0)
    return ranks


def greedy(problem: Problem) -> Schedule:
    """HEFT: highest upward rank first, on the machine where it finishes first, gaps used.

    Topcuoglu, Hariri, Wu 2002, https://doi.org/10.1109/71.993206. Where that runs out of memory the
    largest tasks are placed first instead.

    Raises:
        PlanError: a task finds no machine with room.
    """
    ranks = upward_ranks(problem)
    built = list_schedule(problem, ranks)
    if built is None and not problem.edges:
        built = list_schedule(problem, [t.memory for t in problem.tasks])
    if built is None:
        homeless = [
            t.name for t, row in zip(problem.tasks, problem.seconds, strict=True) if all(map(math.isinf, row))
        ]
        raise PlanError(
            f"task {homeless[0]!r} fits no machine: check its resources and memory"
            if homeless
            else "the greedy scheduler found no room for all tasks; use more machines or memory"
        )
    return built.schedule()
