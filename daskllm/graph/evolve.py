"""A genetic search over random keys, and the genetic scheduler made of it.

Owns the evolution: vectors of keys in [0, 1), an elite that is kept, children that take each key from an
elite parent with the larger chance, newcomers (Gonçalves and Resende 2011; used for placing models on
accelerators by Archer et al., ICML 2024). What the keys mean is up to a decoder. It has a generator of its
own, so that one seed gives one result whatever else draws numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeAlias

from daskllm.graph.optimal import bound
from daskllm.graph.schedule import Builder, Problem, Schedule, greedy, list_schedule

__all__ = ["Keys", "evolve", "genetic"]

Keys: TypeAlias = "tuple[float, ...]"

_ELITE, _NEW, _BIAS = 0.2, 0.15, 0.7


def evolve(
    length: int,
    cost: Callable[[Keys], tuple[float, ...]],
    seeds: Sequence[Keys],
    *,
    seed: int = 0,
    population: int = 40,
    generations: int = 40,
    patience: int = 15,
    enough: tuple[float, ...] | None = None,
) -> Keys:
    """The keys of least cost that were met; never worse than the best of ``seeds``.

    Args:
        cost: what is made small; ``(inf,)`` for keys that mean nothing.
        patience: generations without a better best after which to stop.
        enough: a cost at which to stop.
    """
    random = Random(seed)

    def fresh() -> Keys:
        return tuple(random.random() for _ in range(length))

    known: dict[Keys, tuple[float, ...]] = {}

    def score(keys: Keys) -> tuple[float, ...]:
        if keys not in known:
            known[keys] = cost(keys)
        return known[keys]

    people = [*seeds, *(fresh() for _ in range(population - len(seeds)))]
    people.sort(key=score)
    elite, new = max(1, int(population * _ELITE)), int(population * _NEW)
    best, since = score(people[0]), 0
    for _ in range(generations):
        if since >= patience or (enough is not None and best <= enough):
            break
        children = []
        for _ in range(population - elite - new):
            a, b = random.choice(people[:elite]), random.choice(people[elite:] or people)
            children.append(tuple(x if random.random() < _BIAS else y for x, y in zip(a, b, strict=True)))
        people = sorted([*people[:elite], *children, *(fresh() for _ in range(new))], key=score)
        since = 0 if score(people[0]) < best else since + 1
        best = score(people[0])
    return people[0]


def genetic(problem: Problem, *, seed: int = 0, population: int = 40, generations: int = 40) -> Schedule:
    """A schedule at least as good as the greedy one, which starts in the elite.

    A task has two keys: the larger the first, the sooner it is placed among the ready ones; the second
    names its machine, or, below a half, leaves it to the machine that finishes it first.

    Raises:
        PlanError: the greedy scheduler finds no start.
    """
    start = greedy(problem)
    count, machines = len(problem.tasks), len(problem.machines)

    def decode(keys: Keys) -> Builder | None:
        def choose(builder: Builder, task: int) -> int:
            gene = keys[count + task]
            return builder.best(task) if gene < 0.5 else min(int((gene - 0.5) * 2 * machines), machines - 1)

        return list_schedule(problem, keys[:count], choose)

    def cost(keys: Keys) -> tuple[float, ...]:
        built = decode(keys)
        return (math.inf,) if built is None else problem.cost(built.finish)

    least = bound(problem)
    keys = evolve(
        2 * count,
        cost,
        [_keys_of(problem, start)],
        seed=seed,
        population=population,
        generations=generations,
        enough=(least,) if len(problem.levels) == 1 else None,
    )
    built = decode(keys)
    if built is None or problem.cost(built.finish) > start.cost:
        return Schedule(start.placed, start.cost, least)
    return built.schedule(bound=least)


def _keys_of(problem: Problem, schedule: Schedule) -> Keys:
    """Keys that decode to a schedule: its order of starts, its machines."""
    machines = {m.name: i for i, m in enumerate(problem.machines)}
    place = {i: n for n, i in enumerate(problem.order)}
    count = len(problem.tasks)
    order = sorted(schedule.placed, key=lambda p: (p.start, place[problem.index[p.task]]))
    first, second = [0.0] * count, [0.0] * count
    for number, placed in enumerate(order):
        task = problem.index[placed.task]
        first[task] = (count - number) / (count + 1)
        second[task] = 0.5 + (machines[placed.machine] + 0.5) / (2 * len(machines))
    return (*first, *second)
