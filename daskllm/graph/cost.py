"""What a plan costs, by formula: a roofline, memory, and three objectives kept apart.

Owns the arithmetic of time and memory for sets of nodes on devices. Refuses to search: ``split``, ``place``
and ``schedule`` do. The simulator checks these formulas and uses none of them.

A node takes ``max(FLOPs / rate, bytes / bandwidth) + launch`` on a device (the roofline of Williams et al.
2009, https://doi.org/10.1145/1498765.1498785), a message over a link ``latency + bytes / bandwidth``.

How results travel between the stages of a plan (`Cluster.transfers`):

- ``"direct"``: each stage hands all that later stages need to the next one in one message; links work
  beside the devices.
- ``"host"``: through host memory, by the device itself: once out for each result that is needed elsewhere,
  once in for each that comes from elsewhere, all of it on top of the device's own time (Tarnawski et al.,
  NeurIPS 2020).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from daskllm.graph.cluster import Cluster, Device, Link, Workload
from daskllm.graph.layers import LayerGraph
from daskllm.graph.nodes import Node

__all__ = ["CostModel", "Kind", "Loads", "MemoryUse", "Objective", "settle"]

Kind: TypeAlias = Literal["latency", "batch", "period"]


@dataclass(frozen=True, slots=True)
class Objective:
    """What is made small, of stage and link times; the three are never mixed.

    Attributes:
        kind: ``"latency"``: one micro-batch from end to end, Σ stages + Σ links. ``"batch"``: m
            micro-batches from start to end, Σ + (m-1)·max. ``"period"``: time between micro-batches of
            a loop that keeps m in flight, max(slowest stage or link, round trip / m).
        micro_batches: m; ``math.inf`` leaves the slowest stage or link alone.

    Example:
        >>> loads = Loads((2.0, 3.0), (1.0,))
        >>> [Objective(kind, 2).value(loads) for kind in ("latency", "batch", "period")]
        [6.0, 9.0, 3.0]
    """

    kind: Kind = "period"
    micro_batches: float = math.inf

    def __post_init__(self) -> None:
        if self.kind not in ("latency", "batch", "period"):
            raise ValueError(f'objective must be "latency", "batch" or "period", not {self.kind!r}')
        if not self.micro_batches >= 1:
            raise ValueError(f"micro_batches must be at least 1, not {self.micro_batches!r}")
        if self.kind == "batch" and math.isinf(self.micro_batches):
            raise ValueError('objective "batch" needs a finite number of micro_batches')

    def of(self, total: float, largest: float, back: float = 0.0) -> float:
        """The objective from the sum and the largest of all stage and link times, and the way back's."""
        if self.kind == "latency":
            return total
        if self.kind == "batch":
            return total + (self.micro_batches - 1) * largest if self.micro_batches > 1 else total
        return max(largest, back, (total + back) / self.micro_batches)

    def value(self, loads: Loads) -> float:
        """The objective of a plan's loads."""
        return self.of(loads.total, loads.largest, loads.back)


def settle(goal: Objective | Kind, workload: Workload, stages: int) -> tuple[Objective, int]:
    """The objective of a replica of that many stages, and into how many micro-batches its rows are cut.

    >>> settle("period", Workload(rows=8), 2)
    (Objective(kind='period', micro_batches=2), 2)
    """
    if isinstance(goal, Objective):
        # Endlessly many micro-batches have a size of their own, which the number of stages must not change.
        return goal, workload.in_flight(1) if math.isinf(goal.micro_batches) else int(goal.micro_batches)
    # One micro-batch alone has the least latency when it holds all rows.
    in_flight = workload.in_flight(1 if goal == "latency" else stages)
    return Objective(goal, in_flight), in_flight


@dataclass(frozen=True, slots=True)
class Loads:
    """Seconds of one micro-batch: in each stage, over the link after each but the last, on the way back.

    Example:
        >>> loads = Loads((2.0, 3.0), (1.0,))
        >>> loads.total, loads.largest
        (6.0, 3.0)
    """

    stages: tuple[float, ...]
    links: tuple[float, ...] = ()
    back: float = 0.0

    @property
    def total(self) -> float:
        """Σ stages + Σ links."""
        return sum(self.stages) + sum(self.links)

    @property
    def largest(self) -> float:
        """The slowest stage or link."""
        return max((*self.stages, *self.links))


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that a stage needs on its device.

    Example:
        >>> MemoryUse(weights=100.0, kv=20.0, activations=3.0).total
        123.0
    """

    weights: float
    kv: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.kv + self.activations


class CostModel:
    """Times and bytes of sets of nodes on the devices of a cluster, for one workload.

    Nodes are numbered in the graph's topological order and devices in the cluster's; a set of nodes is an
    integer with their bits set, because searches make millions of them.

    Args:
        micro_batches: into how many the workload's rows are cut.

    Example:
        >>> from daskllm.graph import Cluster, LayerGraph, Node, Workload
        >>> graph = LayerGraph.chain([Node("a", weight_bytes=4, seconds=1.0), Node("b", seconds=2.0)])
        >>> costs = CostModel(graph, Cluster.of(2, memory=8), Workload())
        >>> costs.names(costs.all), costs.memory(costs.mask(["a"])).total
        (('a', 'b'), 4.0)
        >>> costs.loads([(costs.mask(["a"]), 0), (costs.mask(["b"]), 1)]).stages
        (1.0, 2.0)
    """

    def __init__(
        self, graph: LayerGraph, cluster: Cluster, workload: Workload, micro_batches: int = 1
    ) -> None:
        self.graph, self.cluster, self.workload = graph, cluster, workload
        self.micro_batches = micro_batches
        self.step = workload.step(micro_batches)
        self.nodes: tuple[Node, ...] = graph.order
        self.index = {n.name: i for i, n in enumerate(self.nodes)}
        self.all = (1 << len(self.nodes)) - 1
        self.predecessors = [self.mask(graph.predecessors(n.name)) for n in self.nodes]
        self.successors = [self.mask(graph.successors(n.name)) for n in self.nodes]
        self.seconds = [[self._node_seconds(n, d) for n in self.nodes] for d in cluster.devices]
        self.weights = [n.weight_bytes for n in self.nodes]
        # KV is there for all rows of the replica, whichever micro-batch is running.
        self.kv = [workload.rows * workload.context * n.kv_bytes for n in self.nodes]
        self.working = [n.working_bytes(self.step) for n in self.nodes]
        self.ties = [
            (self.index[n.name], self.index[n.tied[0]], n.tied[1])
            for n in self.nodes
            if n.tied is not None and n.tied[0] in self.index
        ]
        self.barred = [
            self.mask(n.name for n in self.nodes if not d.offers(n.resources)) for d in cluster.devices
        ]
        self._edges = self._edge_bytes()

    def opened(self, names: Sequence[str]) -> CostModel:
        """The same costs for the graph with these nodes opened."""
        return CostModel(self.graph.open(*names), self.cluster, self.workload, self.micro_batches)

    def mask(self, names: Iterable[str]) -> int:
        """The set of the nodes of these names."""
        bits = 0
        for name in names:
            bits |= 1 << self.index[name]
        return bits

    def members(self, nodes: int) -> list[int]:
        """The numbers in a set, ascending."""
        found = []
        while nodes:
            low = nodes & -nodes
            found.append(low.bit_length() - 1)
            nodes ^= low
        return found

    def names(self, nodes: int) -> tuple[str, ...]:
        """The names in a set, in topological order."""
        return tuple(self.nodes[i].name for i in self.members(nodes))

    def _node_seconds(self, node: Node, device: Device) -> float:
        if node.seconds is not None:
            return node.seconds / device.speed
        busy = max(node.flops(self.step) / device.flops, node.traffic(self.step) / device.bandwidth)
        return busy + device.launch

    def _edge_bytes(self) -> list[list[tuple[int, float]]]:
        """For each node its targets, with the bytes of a step that go there."""
        sent: list[list[tuple[int, float]]] = [[] for _ in self.nodes]
        for edge in self.graph.edges:
            source = self.index[edge.source]
            size = self.nodes[source].tokens(self.step) * self.graph.edge_bytes(edge)
            sent[source].append((self.index[edge.target], size))
        return sent

    def allowed(self, node: int, device: int) -> bool:
        """Whether a device offers the labels that a node wants."""
        return not self.barred[device] >> node & 1

    def compute(self, nodes: int, device: int) -> float:
        """Seconds that a device computes for a set of nodes."""
        seconds = self.seconds[device]
        return sum(seconds[i] for i in self.members(nodes))

    def memory(self, nodes: int) -> MemoryUse:
        """Bytes that a set of nodes needs on one device; its nodes run one after the other."""
        members = self.members(nodes)
        shared = sum(size for a, b, size in self.ties if nodes >> a & 1 and nodes >> b & 1)
        return MemoryUse(
            sum(self.weights[i] for i in members) - shared,
            sum(self.kv[i] for i in members),
            max((self.working[i] for i in members), default=0.0),
        )

    def fits(self, nodes: int, device: int) -> bool:
        """Whether a device has the memory and the labels for a set of nodes."""
        room = self.cluster.devices[device].memory
        if not math.isinf(room) and self.memory(nodes).total > room:
            return False
        return not nodes & self.barred[device]

    def sends(self, source: int, targets: int) -> tuple[float, float]:
        """(bytes, given seconds) of the result of ``source`` that nodes of ``targets`` need."""
        size = max((size for target, size in self._edges[source] if targets >> target & 1), default=0.0)
        given = self.nodes[source].send_seconds
        if given is None or not self.successors[source] & targets:
            return size, 0.0
        return 0.0, given

    def crossing(self, before: int) -> tuple[float, float]:
        """(bytes, given seconds) of all that the nodes of ``before`` make and the others need."""
        after = self.all & ~before
        sent = [self.sends(i, after) for i in self.members(before) if self.successors[i] & after]
        return sum(size for size, _ in sent), sum(given for _, given in sent)

    def link_seconds(self, before: int, source: int, target: int) -> float:
        """Seconds of the message between two neighbouring stages, ``before`` being all nodes up to there."""
        if self.cluster.transfers == "host":
            return 0.0
        size, given = self.crossing(before)
        return self._link(source, target).seconds(size) + given

    def _link(self, source: int, target: int) -> Link:
        devices = self.cluster.devices
        return self.cluster.between(devices[source].name, devices[target].name)

    def transfer_seconds(self, nodes: int) -> float:
        """Seconds that a device spends moving results through host memory for a set of nodes."""
        if self.cluster.transfers == "direct":
            return 0.0
        total, outside = 0.0, self.all & ~nodes
        for i, after in enumerate(self.successors):
            targets = outside if nodes >> i & 1 else nodes
            if after & targets:
                size, given = self.sends(i, targets)
                total += self.cluster.link.seconds(size) + given
        return total

    def back_seconds(self, last: int, first: int) -> float:
        """Seconds of the message from the last stage to the first that starts the next round."""
        if self.cluster.transfers == "host" or last == first:
            return 0.0
        return self._link(last, first).seconds(self.step.rows * self.workload.return_bytes)

    def loads(self, stages: Sequence[tuple[int, int]]) -> Loads:
        """The loads of a plan: (set of nodes, device) for each stage, in order."""
        seconds = tuple(
            self.compute(nodes, device) + self.transfer_seconds(nodes) for nodes, device in stages
        )
        links, before = [], 0
        for (nodes, source), (_, target) in itertools.pairwise(stages):
            before |= nodes
            links.append(self.link_seconds(before, source, target))
        return Loads(seconds, tuple(links), self.back_seconds(stages[-1][1], stages[0][1]))
