"""The best schedule of a problem, by branch and bound.

Owns the search and its bounds. Schedules are built in the order of start times: some best schedule is made
that way, because starting every task as early as its machine and its inputs allow only helps. A state is
dropped when a lower bound on its end is not below the best known, or when another state with the same tasks
done has all its machines and results at hand no later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from daskllm.graph.errors import PlanError
from daskllm.graph.schedule import Cost, Placed, Problem, Schedule, greedy

__all__ = ["bound", "optimal"]


@dataclass(frozen=True, slots=True)
class _State:
    done: int
    finish: tuple[float, ...]
    on: tuple[int, ...]
    free: tuple[float, ...]
    room: tuple[float, ...]
    clock: float
    placed: tuple[tuple[int, int, float], ...]


def optimal(problem: Problem, *, limit: int = 200_000) -> Schedule:
    """The schedule of least cost, proven so, or the best found within ``limit`` states (not proven).

    Raises:
        PlanError: there is none.

    Example: longest first gives 7 on two machines, the best is 6 (Graham 1969).
        >>> from daskllm.graph.schedule import Machine, Task
        >>> tasks = tuple(Task(f"t{i}", (s, s)) for i, s in enumerate((3.0, 3.0, 2.0, 2.0, 2.0)))
        >>> problem = Problem(tasks, (Machine("a"), Machine("b")))
        >>> greedy(problem).makespan, optimal(problem).makespan
        (7.0, 6.0)
    """
    return _Search(problem, limit).run()


def bound(problem: Problem) -> float:
    """A makespan that no schedule goes below: the longest path, and the work shared out evenly."""
    search = _Search(problem, 0)
    return search.bounds(search.root())[-1]


class _Search:
    def __init__(self, problem: Problem, limit: int) -> None:
        self.problem, self.limit = problem, limit
        self.machines = range(len(problem.machines))
        self.tails = [self._tails(level) for level in problem.levels]
        self.least = [min(row) for row in problem.seconds]
        self.best: Cost | None = None
        self.steps: tuple[tuple[int, int, float], ...] = ()
        self.seen: dict[tuple[int, tuple[int, ...]], list[tuple[float, ...]]] = {}
        self.twins = self._twins()

    def root(self) -> _State:
        tasks, machines = len(self.problem.tasks), self.problem.machines
        return _State(
            0,
            (0.0,) * tasks,
            (-1,) * tasks,
            (0.0,) * len(machines),
            tuple(m.memory for m in machines),
            0.0,
            (),
        )

    def run(self) -> Schedule:
        problem = self.problem
        try:
            seed = greedy(problem)
            self.best = seed.cost
        except PlanError:
            seed = None
        root = self.root()
        least = self.bounds(root)
        stack = [(least, root)]
        while stack and self.limit:
            bounds, state = stack.pop()
            if self.best is not None and bounds >= self.best:
                continue
            self.limit -= 1
            children = sorted(self.children(state), key=lambda c: c[0], reverse=True)
            stack += children
        proven = not stack
        if self.best is None:
            raise PlanError(
                "no schedule fits the machines' memory and resources"
                if proven
                else "no schedule found in time"
            )
        # With several priorities the best cost need not have the least makespan.
        end = self.best[-1] if proven and len(problem.levels) == 1 else least[-1]
        if not self.steps:
            assert seed is not None
            return Schedule(seed.placed, seed.cost, end, proven)
        return self.schedule(end, proven)

    def schedule(self, least: float, proven: bool) -> Schedule:
        problem = self.problem
        placed = [
            Placed(problem.tasks[t].name, problem.machines[m].name, s, s + problem.seconds[t][m])
            for t, m, s in self.steps
        ]
        assert self.best is not None
        return Schedule(tuple(placed), self.best, least, proven)

    def children(self, state: _State) -> list[tuple[Cost, _State]]:
        problem, found = self.problem, []
        for task, before in enumerate(problem.before):
            if state.done >> task & 1 or any(not state.done >> b & 1 for b in before):
                continue
            memory = problem.tasks[task].memory
            for m in self.machines:
                seconds = problem.seconds[task][m]
                if (
                    math.isinf(seconds)
                    or memory > state.room[m] * (1 + 1e-12)
                    or self._twin_is_idle(state, m)
                ):
                    continue
                start = max(
                    [
                        state.free[m],
                        *(state.finish[b] + problem.delays[b, task][state.on[b]][m] for b in before),
                    ]
                )
                if start < state.clock:  # the same schedule is made with this task placed earlier
                    continue
                child = self.child(state, task, m, start)
                if child is not None:
                    found.append(child)
        return found

    def child(self, state: _State, task: int, machine: int, start: float) -> tuple[Cost, _State] | None:
        end = start + self.problem.seconds[task][machine]
        new = _State(
            state.done | 1 << task,
            _with(state.finish, task, end),
            _with(state.on, task, machine),
            _with(state.free, machine, end),
            _with(state.room, machine, state.room[machine] - self.problem.tasks[task].memory),
            start,
            (*state.placed, (task, machine, start)),
        )
        if new.done == (1 << len(new.on)) - 1:
            cost = self.problem.cost(new.finish)
            if self.best is None or cost < self.best:
                self.best, self.steps = cost, new.placed
            return None
        bounds = self.bounds(new)
        if (self.best is not None and bounds >= self.best) or self.dominated(new):
            return None
        return bounds, new

    def _twins(self) -> list[list[int]]:
        """For each machine, those before it in number that are like it in every way."""
        problem = self.problem

        def like(p: int, q: int) -> bool:
            a, b = problem.machines[p], problem.machines[q]
            swap = {p: q, q: p}
            return (
                a.memory == b.memory
                and all(row[p] == row[q] for row in problem.seconds)
                and all(
                    d[x][y] == d[swap.get(x, x)][swap.get(y, y)]
                    for d in problem.delays.values()
                    for x in self.machines
                    for y in self.machines
                )
            )

        return [[p for p in range(q) if like(p, q)] for q in self.machines]

    def _twin_is_idle(self, state: _State, machine: int) -> bool:
        """Whether neither a machine nor one like it before it has been used, so that it may wait its turn."""
        used = set(state.on)
        return machine not in used and any(p not in used for p in self.twins[machine])

    def dominated(self, state: _State) -> bool:
        """Whether a state seen before is nowhere worse; if not, remember this one."""
        problem = self.problem
        live = [
            i
            for i, after in enumerate(problem.after)
            if state.done >> i & 1 and any(not state.done >> j & 1 for j in after)
        ]
        key = (state.done, tuple(state.on[i] for i in live))
        # Finishing times by level matter besides, because they are part of the cost.
        ends = tuple(
            max(
                (
                    f
                    for i, f in enumerate(state.finish)
                    if state.done >> i & 1 and problem.priority[i] >= level
                ),
                default=0.0,
            )
            for level in problem.levels
        )
        vector = (*(max(f, state.clock) for f in state.free), *(state.finish[i] for i in live), *ends)
        vector += (*tuple(-r for r in state.room), state.clock)
        known = self.seen.setdefault(key, [])
        if any(all(a <= b for a, b in zip(old, vector, strict=True)) for old in known):
            return True
        known[:] = [old for old in known if not all(b <= a for a, b in zip(old, vector, strict=True))]
        known.append(vector)
        return False

    def bounds(self, state: _State) -> Cost:
        """For each priority, a time before which its tasks cannot be finished."""
        problem = self.problem
        ready: list[list[float]] = [[]] * len(problem.tasks)
        open_ = [i for i in problem.order if not state.done >> i & 1]
        free = [max(f, state.clock) for f in state.free]
        for i in open_:
            ready[i] = [
                max(free[m], *(self._arrival(state, ready, b, i, m) for b in problem.before[i]), 0.0)
                for m in self.machines
            ]
        found = []
        for level, tails in zip(problem.levels, self.tails, strict=True):
            ends = [
                f for i, f in enumerate(state.finish) if state.done >> i & 1 and problem.priority[i] >= level
            ]
            left = [i for i in open_ if problem.priority[i] >= level]
            ends += [
                min(r + s + t for r, s, t in zip(ready[i], problem.seconds[i], tails[i], strict=True))
                for i in left
            ]
            if left:
                ends.append(_filled(free, sum(self.least[i] for i in left)))
            found.append(max(ends, default=0.0))
        return tuple(found)

    def _arrival(
        self, state: _State, ready: list[list[float]], source: int, target: int, machine: int
    ) -> float:
        """When the result of one task can be on a machine at the earliest."""
        delay = self.problem.delays[source, target]
        if state.done >> source & 1:
            return state.finish[source] + delay[state.on[source]][machine]
        seconds = self.problem.seconds[source]
        return min(ready[source][p] + seconds[p] + delay[p][machine] for p in self.machines)

    def _tails(self, level: float) -> list[list[float]]:
        """For each task and machine, the least time from its end there to the end of its level."""
        problem = self.problem
        tails = [[0.0] * len(problem.machines) for _ in problem.tasks]
        for i in reversed(problem.order):
            for j in problem.after[i]:
                if problem.priority[j] < level:
                    continue
                delay = problem.delays[i, j]
                for p in self.machines:
                    after = min(delay[p][q] + problem.seconds[j][q] + tails[j][q] for q in self.machines)
                    tails[i][p] = max(tails[i][p], after)
        return tails


def _filled(free: list[float], work: float) -> float:
    """When ``work`` is done at the earliest if machines that become free then could share it at will.

    >>> _filled([0.0, 4.0, 9.0], 6.0)
    5.0
    """
    begun = 0.0
    for count, (start, following) in enumerate(pairwise([*sorted(free), math.inf]), 1):
        begun += start
        if (begun + work) / count <= following:
            return (begun + work) / count
    return math.inf


_T = TypeVar("_T")


def _with(values: tuple[_T, ...], place: int, value: _T) -> tuple[_T, ...]:
    return (*values[:place], value, *values[place + 1 :])
