"""When no plan is possible: the error, and which layer does not fit where and what would help.

Owns the message alone; that there is no plan, the searches have found out.
"""

from __future__ import annotations

import math

from daskllm.graph.cost import CostModel
from daskllm.graph.draw import size
from daskllm.types import DaskLLMError

__all__ = ["PlanError", "explain_impossible"]


class PlanError(DaskLLMError):
    """No plan fits, or a plan written by hand does not; the message says what does not fit where.

    Example:
        >>> from daskllm.graph import Cluster, LayerGraph, Node, make_plan
        >>> try:
        ...     make_plan(LayerGraph([Node("a", weight_bytes=2048)]), Cluster.of(1, memory=1024))
        ... except PlanError as error:
        ...     print("layer 'a'" in str(error), "2 KiB" in str(error))
        True True
    """


def explain_impossible(costs: CostModel, method: str, stages: int | None = None) -> PlanError:
    """The error for a search that found nothing, most telling reason first."""
    cluster, nodes = costs.cluster, costs.nodes
    largest = max(cluster.devices, key=lambda d: d.memory)
    lonely = [
        i for i in range(len(nodes)) if not any(costs.allowed(i, d) for d in range(len(cluster.devices)))
    ]
    if lonely:
        wanted = ", ".join(f"{k}={v:g}" for k, v in nodes[lonely[0]].resources.items())
        return PlanError(
            f"layer {nodes[lonely[0]].name!r} needs a device that offers {wanted}; none of "
            f"{', '.join(d.name for d in cluster.devices)} does. Give one of them that resource."
        )
    for i, node in enumerate(nodes):
        if not any(costs.fits(1 << i, d) for d in range(len(cluster.devices))):
            return PlanError(_too_large(costs, i, largest.name) + f" {_help(costs, node.inside is not None)}")
    use = costs.memory(costs.all)
    room = sum(d.memory for d in cluster.devices)
    if use.total > room:
        short = use.total - room
        return PlanError(
            f"the {len(nodes)} layers need {_describe(costs, costs.all)} and the {len(cluster.devices)} "
            f"device(s) have {size(room)}: {size(short)} short.{_first_left_out(costs)} "
            f"What would help: {math.ceil(short / largest.memory)} more like {largest.name!r}, "
            + _help(costs, False, prefix=False)
        )
    many = f" in exactly {stages} stages" if stages is not None else ""
    rooms = ", ".join(f"{d.name} ({size(d.memory)})" for d in cluster.devices)
    return PlanError(
        f"the {method} splitter found no way to put {len(nodes)} layers{many} on {rooms}, although "
        f"{size(use.total)} would fit {size(room)} in sum.{_first_left_out(costs)} What would help: "
        + ('splitter="exact", ' if method != "exact" else "")
        + _help(costs, False, prefix=False)
    )


def _describe(costs: CostModel, nodes: int) -> str:
    use = costs.memory(nodes)
    rows = f" for {costs.workload.rows:g} rows of {costs.workload.context} tokens" if use.kv else ""
    parts = f"weights {size(use.weights)}, KV {size(use.kv)}{rows}, activations {size(use.activations)}"
    return f"{size(use.total)} ({parts})"


def _too_large(costs: CostModel, node: int, device: str) -> str:
    memory = next(d.memory for d in costs.cluster.devices if d.name == device)
    return (
        f"layer {costs.nodes[node].name!r} needs {_describe(costs, 1 << node)} and fits no device that may "
        f"run it; the largest, {device!r}, has {size(memory)}."
    )


def _first_left_out(costs: CostModel) -> str:
    """Where packing in order, device after device, runs out of room."""
    device, start, devices = 0, 0, costs.cluster.devices
    for i in range(len(costs.nodes)):
        while device < len(devices) and not costs.fits(((1 << i + 1) - 1) & ~((1 << start) - 1), device):
            device, start = device + 1, i
        if device == len(devices):
            last = devices[-1].name
            return f" Packed in order, layer {costs.nodes[i].name!r} is the first without room, on {last!r}."
    return ""


def _help(costs: CostModel, opens: bool, *, prefix: bool = True) -> str:
    use = costs.memory(costs.all)
    ways = ['splitter="recursive", which opens it into smaller parts'] if opens else []
    ways += ["a device with more memory", "a smaller dtype or quantised weights"]
    if use.kv:
        ways.append(
            f"fewer rows than {costs.workload.rows:g} or a shorter context than {costs.workload.context}"
        )
    return ("What would help: " if prefix else "") + ", ".join(ways[:-1]) + f" or {ways[-1]}."
