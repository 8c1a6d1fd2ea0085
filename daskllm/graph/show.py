"""Layer graphs and plans as notebooks show them.

It owns which of their numbers a reader sees first. What the pieces look like is `markup`'s and `draw`'s
business; what the numbers mean is the graph's and the plan's.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from daskllm import markup
from daskllm.graph import draw

if TYPE_CHECKING:
    from daskllm.graph.layers import LayerGraph
    from daskllm.graph.nodes import Node
    from daskllm.graph.plan import Measured, Plan, Stage

__all__ = ["graph_html", "plan_html", "weight_bytes", "weights_strip"]

_PICTURE_BOXES = 12
"""A picture of more boxes than that waits for a click."""


def graph_html(graph: LayerGraph) -> markup.HTML:
    """A graph: its sums, where its weights are, its layers with like ones in one line, its picture."""
    runs = _runs(graph)
    largest = max(node.weight_bytes for node in graph.nodes) or 1.0
    rows = [
        (
            draw.layer_range([node.name for node in run]),
            run[0].kind,
            markup.bar(run[0].weight_bytes / largest, draw.size(run[0].weight_bytes), _colour(graph, run[0])),
            draw.count(run[0].flops_per_token),
            draw.size(run[0].kv_bytes),
            draw.size(run[0].output_bytes),
            f"{len(run[0].inside.nodes)} nodes" if run[0].inside else "",
        )
        for run in runs
    ]
    sums = (
        f"{len(graph.nodes)} nodes, {draw.size(weight_bytes(graph))} of weights; for each token "
        f"{draw.count(graph.total('flops_per_token'))}FLOP and {draw.size(graph.total('kv_bytes'))} of KV"
    )
    head = ("layer", "kind", "weights of one", "FLOP/token", "KV/token", "out/token", "opens into")
    picture = markup.HTML(draw.svg(graph.picture()))
    few = len(graph.nodes) <= _PICTURE_BOXES
    parts = [weights_strip(graph), markup.table(head, rows), markup.details("picture", picture, opened=few)]
    return markup.card(f"layer graph of {graph.name}", *parts, note=sums)


def weight_bytes(graph: LayerGraph) -> float:
    """Of all its nodes, those that two of them share counted once."""
    names = {node.name for node in graph.nodes}
    shared = sum(node.tied[1] for node in graph.nodes if node.tied and node.tied[0] in names)
    return graph.total("weight_bytes") - shared


def weights_strip(graph: LayerGraph) -> markup.HTML:
    """A graph's weights in a row, each node as wide as its bytes, kinds in colours."""
    named = [
        (f"{n.name}: {draw.size(n.weight_bytes)}", n.weight_bytes, _colour(graph, n)) for n in graph.order
    ]
    return markup.strip([part for part in named if part[1]])


def _colour(graph: LayerGraph, node: Node) -> int:
    return list(dict.fromkeys(n.kind for n in graph.order)).index(node.kind)


def _runs(graph: LayerGraph) -> list[list[Node]]:
    """The nodes in order, those that follow one another and cost the same together."""

    def cost(node: Node) -> tuple[object, ...]:
        inner = len(node.inside.nodes) if node.inside else 0
        amounts = (node.weight_bytes, node.flops_per_token, node.kv_bytes, node.output_bytes)
        return (node.kind, *amounts, inner, node.window)

    return [list(run) for _, run in itertools.groupby(graph.order, cost)]


def plan_html(plan: Plan) -> markup.HTML:
    """A plan: its stages with memory and time, what was measured beside what was predicted, its picture."""
    seen = {(m.replica, m.stage): m for m in plan.measured}
    predicted = [max(s.seconds, s.link_seconds) for r in plan.replicas for s in r.stages]
    measured = [m.busy / m.passes for m in plan.measured if m.passes]
    slowest = max([*predicted, *measured]) or 1.0
    several = len(plan.replicas) > 1
    head = [*(["replica"] if several else []), "stage", "device", "layers", "memory", "predicted"]
    head += ["measured", "passes"] if seen else []
    rows = [
        [
            *([i] if several else []),
            *(j, *_cells(stage, slowest)),
            *(_measured(seen.get((i, j)), slowest) if seen else []),
        ]
        for i, replica in enumerate(plan.replicas)
        for j, stage in enumerate(replica.stages)
    ]
    of = sorted({len(replica.stages) for replica in plan.replicas})
    counts = f"{len(plan.replicas)} replica(s) of {' or '.join(map(str, of))} stage(s)"
    goal = f"; {plan.objective.kind} {_ms(plan.value)}, slowest {_ms(plan.bottleneck)} a micro-batch"
    lines = [("planned by", f"splitter {plan.splitter}, scheduler {plan.scheduler}")]
    if seen:
        lines.append(("imbalance", f"{plan.imbalance():.1%} measured"))
    lines += [("note", note) for note in plan.notes]
    parts = [markup.table(head, rows), markup.facts(lines)]
    parts.append(markup.details("picture", markup.HTML(draw.svg(plan.picture()))))
    return markup.card(f"plan of {plan.graph}", *parts, note=counts + (goal if plan.value else ""))


def _cells(stage: Stage, slowest: float) -> list[object]:
    use = stage.memory
    room = 0.0 if stage.capacity == float("inf") else use.total / stage.capacity
    held = f"{draw.size(use.weights)} + {draw.size(use.kv)} KV of {draw.size(stage.capacity)}"
    link = f" + link {_ms(stage.link_seconds)}" if stage.link_seconds else ""
    time = markup.bar(stage.seconds / slowest, _ms(stage.seconds) + link) if stage.seconds else "unknown"
    return [stage.device, draw.layer_range(stage.layers), markup.bar(room, held, 1), time]


def _measured(found: Measured | None, slowest: float) -> list[object]:
    if found is None or not found.passes:
        return ["", 0]
    mean = found.busy / found.passes
    return [markup.bar(mean / slowest, _ms(mean), 2), found.passes]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
