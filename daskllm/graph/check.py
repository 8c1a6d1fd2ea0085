"""Whether a plan can be: every layer once, in order, on devices that are there and large enough.

Owns the checks that every plan passes, whoever made it, and their messages. Refuses to mend a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

from daskllm.graph import draw
from daskllm.graph.cluster import Cluster
from daskllm.graph.cost import CostModel
from daskllm.graph.errors import PlanError
from daskllm.graph.layers import LayerGraph

__all__ = ["Assignment", "check_devices", "check_fit", "check_layers", "opened_for"]

Assignment: TypeAlias = "Sequence[Sequence[tuple[str, Sequence[str]]]]"
"""By hand: for each replica its stages in order, each a device and the names of its layers."""


def opened_for(graph: LayerGraph, stages: Sequence[tuple[str, Sequence[str]]]) -> LayerGraph:
    """The graph opened as far as the stages name what is inside its nodes."""
    return graph.reach([name for _, layers in stages for name in layers])


def check_devices(assignment: Assignment, cluster: Cluster) -> None:
    devices = {d.name for d in cluster.devices}
    taken = Counter(device for stages in assignment for device, _ in stages)
    if not taken or not all(assignment):
        raise PlanError("a plan needs at least one replica, and each replica at least one stage")
    for device, count in taken.items():
        if device not in devices:
            raise PlanError(f"device {device!r} is not there; the devices are {', '.join(sorted(devices))}")
        if count > 1:
            raise PlanError(f"device {device!r} has {count} stages; a device runs one")


def check_layers(stages: Sequence[tuple[str, Sequence[str]]], graph: LayerGraph) -> None:
    known = {n.name for n in graph.nodes}
    where: dict[str, int] = {}
    for number, (device, layers) in enumerate(stages):
        if not layers:
            raise PlanError(f"stage {number} on {device!r} has no layers")
        for name in layers:
            if name not in known:
                raise PlanError(
                    f"stage {number} on {device!r} names layer {name!r}, which graph {graph.name!r} lacks"
                )
            if name in where:
                raise PlanError(f"layer {name!r} is in stage {where[name]} and again in stage {number}")
            where[name] = number
    missing = [n.name for n in graph.order if n.name not in where]
    if missing:
        raise PlanError(f"no stage has layer {missing[0]!r} ({len(missing)} missing): every layer needs one")
    for edge in graph.edges:
        if where[edge.source] > where[edge.target]:
            raise PlanError(
                f"layer {edge.target!r} in stage {where[edge.target]} needs {edge.source!r} "
                f"from the later stage {where[edge.source]}; stages must follow the order of the layers"
            )


def check_fit(costs: CostModel, number: int, nodes: int, device: int) -> None:
    target = costs.cluster.devices[device]
    for i in costs.members(nodes):
        if not costs.allowed(i, device):
            wanted = ", ".join(f"{k}={v:g}" for k, v in costs.nodes[i].resources.items())
            raise PlanError(
                f"layer {costs.nodes[i].name!r} needs {wanted}, which {target.name!r} does not offer"
            )
    if not costs.fits(nodes, device):
        use, held = costs.memory(nodes), 0
        for first in costs.members(nodes):
            held |= 1 << first
            if not costs.fits(held, device):
                break
        raise PlanError(
            f"stage {number} needs {draw.size(use.total)}, {target.name!r} has {draw.size(target.memory)}: "
            f"no room from {costs.nodes[first].name!r} on. Move layers to another device, or "
            "use fewer rows, a shorter context, a smaller dtype"
        )
