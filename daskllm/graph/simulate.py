"""A plan played out event by event, without the cost model's formulas.

Owns a small discrete-event engine (a clock, a heap, resources that serve one thing at a time in order of
arrival) and the model of a pipeline on it. A node on a device is arithmetic and memory traffic that start
together after the launch; it is over when both are. A message occupies its link for its latency and then
for its bytes. Neither a maximum over stages nor a sum along them is computed: what the formulas predict has
to come out of the events.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from daskllm.graph.cluster import Cluster, Device, Link
from daskllm.graph.layers import LayerGraph
from daskllm.graph.nodes import Step

__all__ = ["Simulated", "simulate_batch", "simulate_loop"]

_Then: TypeAlias = "Callable[[], None]"


class _Clock:
    """Events in the order of their times; those of one time in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, _Then]] = []
        self._made = 0

    def after(self, seconds: float, then: _Then) -> None:
        heapq.heappush(self._heap, (self.now + seconds, self._made, then))
        self._made += 1

    def run(self) -> None:
        while self._heap:
            self.now, _, then = heapq.heappop(self._heap)
            then()


class _Server:
    """Serves one job at a time, first come first served; a job is a chain of waits."""

    def __init__(self, clock: _Clock) -> None:
        self.clock, self.busy = clock, 0.0
        self._queue: deque[tuple[Sequence[tuple[float, float]], _Then]] = deque()
        self._working = False

    def serve(self, work: Sequence[tuple[float, float]], then: _Then) -> None:
        """Queue a job of pieces, one after the other; each is two things at once and ends with the later."""
        self._queue.append((work, then))
        if not self._working:
            self._next()

    def _next(self) -> None:
        self._working = bool(self._queue)
        if self._working:
            work, then = self._queue.popleft()
            self._piece(iter(work), then, self.clock.now)

    def _piece(self, work: Iterator[tuple[float, float]], then: _Then, began: float) -> None:
        piece = next(work, None)
        if piece is None:
            self.busy += self.clock.now - began
            then()
            self._next()
            return
        running = len(piece)

        def part_done() -> None:
            nonlocal running
            running -= 1
            if not running:
                self._piece(work, then, began)

        for seconds in piece:
            self.clock.after(seconds, part_done)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came out.

    Attributes:
        seconds: from the start to the last event.
        period: between micro-batches in the steady state of a loop (batch: ``seconds / micro-batches``).
        latency: of the first micro-batch through all stages.
        stages: busy seconds of each stage's device.
        links: busy seconds of each link after a stage but the last.

    Example:
        >>> Simulated(seconds=10.0, period=2.0, latency=3.0, stages=(9.0, 4.0), links=(0.5,)).waiting
        (1.0, 6.0)
    """

    seconds: float
    period: float
    latency: float
    stages: tuple[float, ...]
    links: tuple[float, ...]

    @property
    def waiting(self) -> tuple[float, ...]:
        """Idle seconds of each stage's device."""
        return tuple(self.seconds - busy for busy in self.stages)


class _Pipeline:
    """Stages with the pieces that a micro-batch is made of on each, and the messages between them."""

    def __init__(
        self, graph: LayerGraph, cluster: Cluster, stages: Sequence[tuple[str, Sequence[str]]], step: Step
    ) -> None:
        self.clock = _Clock()
        self.graph, self.cluster, self.step = graph, cluster, step
        self.devices = {d.name: d for d in cluster.devices}
        self.stage_of = {name: i for i, (_, names) in enumerate(stages) for name in names}
        self.servers = [_Server(self.clock) for _ in stages]
        self.work = [self._stage_work(names, self.devices[device]) for device, names in stages]
        pairs = list(itertools.pairwise(stages)) if cluster.transfers == "direct" else []
        self.links = [_Server(self.clock) for _ in pairs]
        self.messages = [
            self._message(cluster.between(a[0], b[0]), self._relayed(i)) for i, (a, b) in enumerate(pairs)
        ]

    def _stage_work(self, names: Sequence[str], device: Device) -> list[tuple[float, float]]:
        placed = set(names)
        work: list[tuple[float, float]] = []
        for node in (n for n in self.graph.order if n.name in placed):
            if node.seconds is not None:
                work.append((node.seconds / device.speed, 0.0))
            else:
                work.append((device.launch, 0.0))
                work.append(
                    (node.flops(self.step) / device.flops, node.traffic(self.step) / device.bandwidth)
                )
        if self.cluster.transfers == "host":
            inward = {e.source for e in self.graph.edges if e.target in placed and e.source not in placed}
            outward = {e.source for e in self.graph.edges if e.source in placed and e.target not in placed}
            before = [
                p for s in inward for p in self._message(self.cluster.link, [(s, lambda t: t in placed)])
            ]
            after = [
                p for s in outward for p in self._message(self.cluster.link, [(s, lambda t: t not in placed)])
            ]
            work = before + work + after
        return work

    def _relayed(self, stage: int) -> list[tuple[str, Callable[[str], bool]]]:
        """What a stage hands on: all results made up to there that a later stage needs."""

        def later(target: str) -> bool:
            return self.stage_of[target] > stage

        made = [n.name for n in self.graph.order if self.stage_of[n.name] <= stage]
        return [(name, later) for name in made if any(map(later, self.graph.successors(name)))]

    def _message(
        self, link: Link, results: Sequence[tuple[str, Callable[[str], bool]]]
    ) -> list[tuple[float, float]]:
        size, pieces = 0.0, []
        for name, wanted in results:
            node = self.graph.node(name)
            if node.send_seconds is not None:
                pieces.append((node.send_seconds, 0.0))
                continue
            per_token = [
                self.graph.edge_bytes(e) for e in self.graph.edges if e.source == name and wanted(e.target)
            ]
            size += node.tokens(self.step) * max(per_token)
        if size:
            pieces += [(link.latency, 0.0), (size / link.bandwidth, 0.0)]
        return pieces

    def through(self, stage: int, done: _Then) -> None:
        """Send one micro-batch from a stage to the end."""

        def computed() -> None:
            if stage + 1 == len(self.servers):
                done()
            elif self.links:
                self.links[stage].serve(self.messages[stage], lambda: self.through(stage + 1, done))
            else:
                self.through(stage + 1, done)

        self.servers[stage].serve(self.work[stage], computed)

    def result(self, period: float, latency: float) -> Simulated:
        busy = tuple(s.busy for s in self.servers)
        return Simulated(self.clock.now, period, latency, busy, tuple(s.busy for s in self.links))


def simulate_batch(
    graph: LayerGraph,
    cluster: Cluster,
    stages: Sequence[tuple[str, Sequence[str]]],
    step: Step,
    micro_batches: int = 1,
) -> Simulated:
    """``micro_batches`` that are all there at the start pass all stages once.

    Args:
        stages: (device, names of its nodes) for each stage, in order.
        step: one micro-batch's pass.

    Example:
        >>> from daskllm.graph import Node
        >>> graph = LayerGraph.chain([Node("a", seconds=1.0), Node("b", seconds=2.0)])
        >>> stages = [("device-0", ["a"]), ("device-1", ["b"])]
        >>> simulate_batch(graph, Cluster.of(2, memory=1), stages, Step(), 3).seconds  # 1 + 3 * 2
        7.0
    """
    pipeline = _Pipeline(graph, cluster, stages, step)
    ends: list[float] = []
    for _ in range(micro_batches):
        pipeline.through(0, lambda: ends.append(pipeline.clock.now))
    pipeline.clock.run()
    return pipeline.result(pipeline.clock.now / micro_batches, ends[0])


def simulate_loop(
    graph: LayerGraph,
    cluster: Cluster,
    stages: Sequence[tuple[str, Sequence[str]]],
    step: Step,
    micro_batches: int,
    *,
    return_bytes: float = 0.0,
    rounds: int = 40,
) -> Simulated:
    """``micro_batches`` in flight, each going round ``rounds`` times: what decoding does.

    Args:
        return_bytes: of one micro-batch, from the last stage back to the first before it goes round again.

    Example:
        >>> from daskllm.graph import Node
        >>> graph = LayerGraph.chain([Node("a", seconds=1.0), Node("b", seconds=2.0)])
        >>> stages = [("device-0", ["a"]), ("device-1", ["b"])]
        >>> simulate_loop(graph, Cluster.of(2, memory=1), stages, Step(), 2).period  # the slower stage's time
        2.0
    """
    pipeline = _Pipeline(graph, cluster, stages, step)
    clock, back = pipeline.clock, _Server(pipeline.clock)
    first, last = stages[0][0], stages[-1][0]
    message: list[tuple[float, float]] = []
    if cluster.transfers == "direct" and first != last and return_bytes:
        link = cluster.between(last, first)
        message = [(link.latency, 0.0), (return_bytes / link.bandwidth, 0.0)]
    ends: list[list[float]] = [[] for _ in range(micro_batches)]
    passes: list[float] = []

    def go(which: int) -> None:
        def arrived() -> None:
            passes.append(clock.now)
            back.serve(message, returned)

        def returned() -> None:
            ends[which].append(clock.now)
            if len(ends[which]) < rounds:
                go(which)

        pipeline.through(0, arrived)

    for which in range(micro_batches):
        go(which)
    clock.run()
    # The start and the end of the run are not steady, so the second half of the rounds is looked at.
    middle = rounds // 2
    period = (ends[0][-1] - ends[0][middle - 1]) / (rounds - middle) / micro_batches
    return pipeline.result(period, passes[0])
