"""What a graph is made of: nodes that know their own work, edges, and what is inside a node.

Owns the quantities: how many FLOPs and bytes a node needs for a step of given size. Refuses to know how
fast anything runs: rates belong to ``cost``, events to ``simulate``. Plain Python, no array library.

Units: bytes, floating-point operations (a multiply-add is two), seconds. "Per token" means per token of a
step; "per position" means per token and per position that it may look at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Edge", "Node", "Opening", "Step", "check_amount", "elementwise", "linear"]


def check_amount(
    owner: str, name: str, value: object, *, positive: bool = False, finite: bool = True
) -> None:
    """Refuse a number that is missing, not a number, negative or (with ``positive``) zero.

    >>> check_amount("node 'a'", "weight_bytes", -1)
    Traceback (most recent call last):
    ...
    ValueError: node 'a': weight_bytes must be a number of at least 0, not -1
    """
    bad_type = isinstance(value, bool) or not isinstance(value, (int, float))
    least = "above 0" if positive else "of at least 0"
    wanted = f"a {'finite ' if finite and not bad_type and math.isinf(value) else ''}number {least}"  # type: ignore[arg-type]
    if bad_type:
        raise ValueError(f"{owner}: {name} must be {wanted}, not {value!r}")
    assert isinstance(value, (int, float))
    if math.isnan(value) or value < 0 or (positive and value == 0) or (finite and math.isinf(value)):
        raise ValueError(f"{owner}: {name} must be {wanted}, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass of one micro-batch through the graph.

    Attributes:
        rows: sequences in the micro-batch (may be a fraction: an average).
        tokens: new tokens of each row (1 while decoding, the prompt's length in a prefill).
        context: positions of each row after the step, its new tokens included.
        all_logits: whether every token needs its logits (scoring) or each row's last alone.

    Example:
        >>> Step(rows=8, context=100).tokens
        1
    """

    rows: float = 1.0
    tokens: int = 1
    context: int = 1
    all_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "context"):
            check_amount("step", name, getattr(self, name), positive=True)
        if self.context < self.tokens:
            raise ValueError(f"step: context ({self.context}) must hold the step's {self.tokens} new tokens")

    def visible(self, window: int | None) -> float:
        """Positions that a new token looks at, on average, under a sliding window.

        >>> Step(tokens=3, context=3).visible(None)  # causal: 1, 2 and 3
        2.0
        """
        seen = range(self.context - self.tokens + 1, self.context + 1)
        if window is None or window >= self.context:
            return (seen[0] + seen[-1]) / 2
        if window <= seen[0]:
            return float(window)
        below = window - seen[0]
        return (below * (seen[0] + window - 1) / 2 + (self.tokens - below) * window) / self.tokens


@dataclass(frozen=True, slots=True)
class Node:
    """One piece of a model, as small or as large as the graph draws it.

    Attributes:
        name: unique in its graph; it becomes the task's name.
        kind: what it does ("embed", "layer", "attention", "linear", "relu", …); free text to the planner.
        weight_bytes: weights that stay where the node runs.
        weight_bytes_per_token: when a token touches only part of the weights (an embedding row, an
            expert), that part; None reads all of them in each step.
        flops_per_token, flops_per_position: see the units above.
        kv_bytes: what the node keeps per token of every row for later steps.
        activation_bytes: working memory per token at its peak, moved once per step.
        output_bytes: result per token, which each outgoing edge carries unless it says otherwise.
        window: sliding attention window in positions.
        last_only: works on each row's last token alone (a language head) unless all logits are asked for.
        seconds: time given or measured, on a device of speed 1, in place of the roofline.
        send_seconds: time given to move the result off its device, in place of bytes over a link.
        resources: labels, with amounts, that the device must offer.
        priority: larger goes first.
        tied: (other node, bytes): these weight bytes are that node's too, and count once on one device.
        attributes: the operation in plain data (blocks, shard, sizes), for whoever runs the graph.
        inside: what the node is made of, None for a leaf.

    Example:
        >>> Node("w1", "linear", weight_bytes=64, flops_per_token=32).flops(Step(rows=4))
        128.0
    """

    name: str
    kind: str = "op"
    weight_bytes: float = 0
    weight_bytes_per_token: float | None = None
    flops_per_token: float = 0
    flops_per_position: float = 0
    kv_bytes: float = 0
    activation_bytes: float = 0
    output_bytes: float = 0
    window: int | None = None
    last_only: bool = False
    seconds: float | None = None
    send_seconds: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    priority: float = 0
    tied: tuple[str, float] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    inside: Opening | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a node's name must be a non-empty string, not {self.name!r}")
        owner = f"node {self.name!r}"
        for name in ("weight_bytes", "flops_per_token", "flops_per_position", "kv_bytes", "activation_bytes"):
            check_amount(owner, name, getattr(self, name))
        check_amount(owner, "output_bytes", self.output_bytes)
        for name in ("weight_bytes_per_token", "seconds", "send_seconds", "window"):
            if getattr(self, name) is not None:
                check_amount(owner, name, getattr(self, name), positive=name == "window")
        if self.tied is not None and not 0 <= self.tied[1] <= self.weight_bytes:
            raise ValueError(
                f"{owner}: tied bytes ({self.tied[1]!r}) must be part of its {self.weight_bytes} weights"
            )
        for label, amount in self.resources.items():
            check_amount(owner, f"resources[{label!r}]", amount)

    def tokens(self, step: Step) -> float:
        """Tokens that this node works on in a step."""
        return step.rows if self.last_only and not step.all_logits else step.rows * step.tokens

    def flops(self, step: Step) -> float:
        """Floating-point operations of one step."""
        per_token = self.flops_per_token + self.flops_per_position * step.visible(self.window)
        return self.tokens(step) * per_token

    def traffic(self, step: Step) -> float:
        """Bytes that one step moves through the device's memory: weights, KV read, activations."""
        tokens = self.tokens(step)
        weights = self.weight_bytes
        if self.weight_bytes_per_token is not None:
            weights = min(weights, tokens * self.weight_bytes_per_token)
        seen = step.context if self.window is None else min(step.context, self.window + step.tokens - 1)
        return weights + step.rows * seen * self.kv_bytes + tokens * self.activation_bytes

    def working_bytes(self, step: Step) -> float:
        """Working memory of one step."""
        return self.tokens(step) * self.activation_bytes


@dataclass(frozen=True, slots=True)
class Edge:
    """The result of ``source`` goes into ``target``.

    Attributes:
        bytes: per token, when the edge carries other than the whole result of its source.

    Example:
        >>> Edge("attention", "mlp", bytes=512).target
        'mlp'
    """

    source: str
    target: str
    bytes: float | None = None

    def __post_init__(self) -> None:
        if self.bytes is not None:
            check_amount(f"edge {self.source!r} -> {self.target!r}", "bytes", self.bytes)


@dataclass(frozen=True, slots=True)
class Opening:
    """What is inside a node: a graph of its own, and which of its nodes meet the outer edges.

    Attributes:
        entries: nodes that receive what the outer node received.
        exits: nodes whose results are the outer node's.

    Example:
        >>> inside = Opening((Node("a.1"), Node("a.2")), (Edge("a.1", "a.2"),), ("a.1",), ("a.2",))
        >>> len(Node("a", inside=inside).inside.nodes)
        2
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    entries: tuple[str, ...]
    exits: tuple[str, ...]


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True, itemsize: int = 4) -> Node:
    """A dense layer ``x @ weight.T + bias`` with weight ``[outputs, inputs]``, written by hand.

    >>> linear("layer1", 4, 8).weight_bytes
    160
    """
    return Node(
        name,
        "linear",
        weight_bytes=(inputs * outputs + (outputs if bias else 0)) * itemsize,
        flops_per_token=2 * inputs * outputs + (outputs if bias else 0),
        activation_bytes=(inputs + outputs) * itemsize,
        output_bytes=outputs * itemsize,
        attributes={"inputs": inputs, "outputs": outputs, "bias": bias},
    )


def elementwise(name: str, kind: str, size: int, *, itemsize: int = 4) -> Node:
    """A function of each element ("relu", "tanh", "sigmoid", …) over vectors of ``size``.

    >>> elementwise("act1", "relu", 8).output_bytes
    32
    """
    return Node(
        name,
        kind,
        flops_per_token=size,
        activation_bytes=2 * size * itemsize,
        output_bytes=size * itemsize,
        attributes={"size": size},
    )
