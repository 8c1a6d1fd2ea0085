from __future__ import annotations

import random

import pytest

from daskllm.engine.lookup import Lookup


@pytest.mark.parametrize(
    ("tokens", "count", "found"),
    [
        ([1], 3, []),
        ([1, 2], 3, []),
        ([1, 2, 3, 1, 2], 1, [3]),
        ([1, 2, 3, 1, 2], 5, [3, 1, 2, 3, 1]),
        ([7, 7, 7], 4, [7, 7, 7, 7]),
        ([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1, [9]),  # three that are the same before two
        ([5, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3], 1, [8]),  # the latest of two
    ],
)
def test_what_followed_before_may_follow(tokens: list[int], count: int, found: list[int]) -> None:
    assert Lookup().find(tokens, count) == found


def test_tokens_may_come_one_by_one_or_together() -> None:
    draw = random.Random(1)
    tokens = [draw.randrange(4) for _ in range(200)]
    lookup, end = Lookup(), 3
    while end <= len(tokens):
        assert lookup.find(tokens[:end], 6) == Lookup().find(tokens[:end], 6)
        end += draw.randrange(1, 9)


def test_guesses_are_as_long_as_they_are_good() -> None:
    lookup = Lookup()
    assert lookup.rate(0.25) == 0.25
    widths = []
    for right in (3, 7, 2, 0):
        lookup.fared(lookup.width, right)
        widths.append(lookup.width)
    assert widths == [7, 15, 3, 1]
    for _ in range(50):
        lookup.fared(1, 0)
    assert lookup.rate(1.0) < 0.65  # what others have seen counts for eight tokens, its own for five at most
    assert lookup.rate(0.1) < 0.07
