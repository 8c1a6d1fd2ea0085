"""The evolution itself."""

from __future__ import annotations

import random as shared_random

from daskllm.graph.evolve import Keys, evolve


def distance(keys: Keys) -> tuple[float, ...]:
    return (sum((k - 0.3) ** 2 for k in keys),)


def test_it_gets_better_and_never_worse_than_its_seed() -> None:
    start = (0.9,) * 4
    found = evolve(4, distance, [start], seed=1)
    assert distance(found) < distance(start)
    best = (0.3,) * 4
    assert evolve(4, distance, [best], seed=1) == best


def test_it_uses_no_generator_but_its_own() -> None:
    shared_random.seed(5)
    first = shared_random.random()
    shared_random.seed(5)
    once = evolve(3, distance, [(0.5,) * 3], seed=2)
    assert shared_random.random() == first
    assert evolve(3, distance, [(0.5,) * 3], seed=2) == once
    assert evolve(3, distance, [(0.5,) * 3], seed=3) != once


def test_it_stops_when_it_is_good_enough() -> None:
    asked: list[Keys] = []

    def cost(keys: Keys) -> tuple[float, ...]:
        asked.append(keys)
        return (0.0,)

    evolve(2, cost, [(0.5, 0.5)], population=10, enough=(0.0,))
    assert len(asked) == 10
