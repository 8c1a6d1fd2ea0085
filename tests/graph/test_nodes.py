"""Quantities of nodes, and the refusal of numbers that are none."""

from __future__ import annotations

import math

import pytest

from daskllm.graph import Edge, Node, Step, linear


@pytest.mark.parametrize("window", [None, 1, 3, 5, 8, 50])
def test_visible_positions_are_counted(window: int | None) -> None:
    for context in range(1, 12):
        for tokens in range(1, context + 1):
            seen = [min(p, window or p) for p in range(context - tokens + 1, context + 1)]
            step = Step(tokens=tokens, context=context)
            assert step.visible(window) == pytest.approx(sum(seen) / tokens)


def test_amounts_of_a_step() -> None:
    node = Node(
        "n", weight_bytes=100, flops_per_token=3, flops_per_position=2, kv_bytes=5, activation_bytes=7
    )
    step = Step(rows=4, tokens=1, context=10)
    assert node.flops(step) == 4 * (3 + 2 * 10)
    assert node.traffic(step) == 100 + 4 * 10 * 5 + 4 * 7
    assert node.working_bytes(step) == 28


def test_only_touched_weights_are_read() -> None:
    node = Node("embed", weight_bytes=1000, weight_bytes_per_token=10)
    assert node.traffic(Step(rows=4)) == 40
    assert node.traffic(Step(rows=400)) == 1000


def test_a_head_works_on_last_tokens_unless_all_are_wanted() -> None:
    node = Node("head", flops_per_token=1, last_only=True)
    assert node.flops(Step(rows=2, tokens=5, context=5)) == 2
    assert node.flops(Step(rows=2, tokens=5, context=5, all_logits=True)) == 10


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, None, "4", True])
@pytest.mark.parametrize("name", ["weight_bytes", "flops_per_token", "kv_bytes", "output_bytes"])
def test_bad_amounts_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"node 'n': {name} must be"):
        Node("n", **{name: value})  # type: ignore[arg-type]


def test_other_bad_nodes() -> None:
    with pytest.raises(ValueError, match="non-empty string"):
        Node("")
    with pytest.raises(ValueError, match="seconds must be"):
        Node("n", seconds=-1.0)
    with pytest.raises(ValueError, match="tied bytes"):
        Node("n", weight_bytes=1, tied=("m", 2))
    with pytest.raises(ValueError, match="edge 'a' -> 'b': bytes"):
        Edge("a", "b", -1)
    with pytest.raises(ValueError, match="must hold the step's 3 new tokens"):
        Step(tokens=3, context=2)


def test_linear_counts_its_bias() -> None:
    assert linear("l", 3, 5).weight_bytes == (15 + 5) * 4
    assert linear("l", 3, 5, bias=False, itemsize=2).weight_bytes == 30
