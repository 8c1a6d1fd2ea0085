"""Which device gets which stage, and when tasks run: the three schedulers behind one name each.

Owns the placing of a split's stages (`place`) and the choice among the schedulers of general task graphs
(`schedule`). A stage's device is its own. The splitter's placing is never made worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import Literal, TypeAlias, get_args

from daskllm.graph.cost import CostModel, Loads
from daskllm.graph.evolve import Keys, evolve, genetic
from daskllm.graph.exact import Cut, device_classes
from daskllm.graph.optimal import optimal
from daskllm.graph.schedule import Problem, Schedule, greedy
from daskllm.graph.split import Split, lower_bound

__all__ = ["SCHEDULERS", "Scheduler", "place", "schedule"]

Scheduler: TypeAlias = Literal["greedy", "optimal", "genetic"]
SCHEDULERS: tuple[str, ...] = get_args(Scheduler)

_Label: TypeAlias = "tuple[float, float, Cut]"  # slowest so far, sum so far, stages so far


def _check(method: str) -> None:
    if method not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {method!r}")


def schedule(problem: Problem, method: str = "greedy", *, seed: int = 0) -> Schedule:
    """When and where the tasks of a graph run.

    Args:
        method: ``"greedy"``: HEFT. ``"optimal"``: branch and bound. ``"genetic"``: from HEFT on.
        seed: of the genetic scheduler's own generator.

    Raises:
        ValueError: unknown method.
        PlanError: no schedule was found that fits.

    Example:
        >>> from daskllm.graph import Machine, Task
        >>> tasks = [Task(name, (time, time)) for name, time in zip("abcde", (3.0, 3.0, 2.0, 2.0, 2.0))]
        >>> problem = Problem(tasks, [Machine("x"), Machine("y")], {})
        >>> [schedule(problem, method).makespan for method in ("greedy", "optimal")]
        [7.0, 6.0]
    """
    _check(method)
    if method == "genetic":
        return genetic(problem, seed=seed)
    return optimal(problem) if method == "optimal" else greedy(problem)


def place(found: Split, method: str = "greedy", *, seed: int = 0) -> Split:
    """Give the stages of a split to devices, never worse than they were.

    Args:
        method: ``"greedy"``: the most urgent, then the heaviest stage first, each to the device that is
            quickest with it. ``"optimal"``: the best of all ways to give these stages to devices.
            ``"genetic"``: evolves the order of nodes and of devices and cuts anew, from the greedy result on.

    Raises:
        ValueError: unknown method.

    Example:
        >>> from daskllm.graph import Cluster, CostModel, Device, LayerGraph, Node, Objective, Workload, split
        >>> graph = LayerGraph.chain([Node("a", seconds=1.0), Node("b", seconds=4.0)])
        >>> machines = Cluster((Device("slow", memory=1), Device("fast", memory=1, speed=2.0)))
        >>> found = split(CostModel(graph, machines, Workload()), Objective(), "greedy", stages=2)
        >>> dict(place(found, "optimal").stages)["fast"]
        ('b',)
    """
    _check(method)
    if method == "optimal":
        return _better(found, _Assignment(found).best())
    seeded = _better(found, _heaviest_first(found))
    return _evolved(seeded, seed) if method == "genetic" else seeded


def _better(found: Split, cut: Cut | None) -> Split:
    if cut is None:
        return found
    other = replace(found, cut=cut)
    return other if other.value < found.value else found


def _heaviest_first(found: Split) -> Cut | None:
    costs, devices = found.costs, range(len(found.costs.cluster.devices))
    free, device_of = set(devices), [-1] * len(found.cut)

    def urgency(stage: int) -> tuple[float, float]:
        nodes = found.cut[stage][0]
        return max(costs.nodes[i].priority for i in costs.members(nodes)), min(
            costs.compute(nodes, d) for d in devices
        )

    for stage in sorted(range(len(found.cut)), key=urgency, reverse=True):
        nodes = found.cut[stage][0]
        fitting = [d for d in sorted(free) if costs.fits(nodes, d)]
        if not fitting:
            return None
        device_of[stage] = min(fitting, key=lambda d: costs.compute(nodes, d))
        free.remove(device_of[stage])
    return tuple((nodes, device) for (nodes, _), device in zip(found.cut, device_of, strict=True))


class _Assignment:
    """Branch and bound over the devices of fixed stages, in the order of the stages."""

    def __init__(self, found: Split) -> None:
        self.found, self.costs = found, found.costs
        self.parts = [nodes for nodes, _ in found.cut]
        self.value = found.value
        self.cut: Cut | None = None
        devices = range(len(self.costs.cluster.devices))
        self.seconds = [
            [
                self.costs.compute(p, d) + self.costs.transfer_seconds(p)
                if self.costs.fits(p, d)
                else math.inf
                for d in devices
            ]
            for p in self.parts
        ]
        self.rest = [sum(min(row) for row in self.seconds[i:]) for i in range(len(self.parts) + 1)]
        self.before = [0]
        for part in self.parts:
            self.before.append(self.before[-1] | part)

    def best(self) -> Cut | None:
        self._extend((), Loads(()))
        return self.cut

    def _extend(self, chosen: tuple[int, ...], loads: Loads) -> None:
        stage, objective = len(chosen), self.found.objective
        if stage == len(self.parts):
            back = self.costs.back_seconds(chosen[-1], chosen[0])
            value = objective.value(replace(loads, back=back))
            if value < self.value:
                self.value, self.cut = value, tuple(zip(self.parts, chosen, strict=True))
            return
        for device, seconds in enumerate(self.seconds[stage]):
            if device in chosen or math.isinf(seconds):
                continue
            links = loads.links
            if chosen:
                links = (*links, self.costs.link_seconds(self.before[stage], chosen[-1], device))
            new = Loads((*loads.stages, seconds), links)
            if objective.of(new.total + self.rest[stage + 1], new.largest) < self.value:
                self._extend((*chosen, device), new)


def _evolved(found: Split, seed: int) -> Split:
    """Random keys: one per node says which ready node comes next, one per device which device does."""
    costs, stages = found.costs, len(found.cut)
    nodes, devices = len(costs.nodes), len(costs.cluster.devices)
    in_order, classes = _InOrder(found), device_classes(costs.cluster)
    class_of = {d: number for number, group in enumerate(classes) for d in group}
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, Cut | None]] = {}

    def decode(keys: Keys) -> tuple[float, Cut | None]:
        order = _ordered(costs, keys[:nodes])
        chosen = tuple(sorted(range(devices), key=lambda d: keys[nodes + d]))[:stages]
        # Devices that are alike are taken in their own order, so that no plan is cut twice.
        waiting = [list(group) for group in classes]
        chosen = tuple(waiting[class_of[d]].pop(0) for d in chosen)
        if (order, chosen) not in known:
            known[order, chosen] = in_order.best(order, chosen)
        return known[order, chosen]

    order = [i for part, _ in found.cut for i in costs.members(part)]
    used = [d for _, d in found.cut]
    used += [d for d in range(devices) if d not in used]
    start = [0.0] * (nodes + devices)
    for number, i in enumerate(order):
        start[i] = number / nodes
    for number, d in enumerate(used):
        start[nodes + d] = number / devices
    least = lower_bound(costs, found.objective)
    keys = evolve(
        nodes + devices, lambda k: (decode(k)[0],), [tuple(start)], seed=seed, population=30, enough=(least,)
    )
    return _better(found, decode(keys)[1])


def _ordered(costs: CostModel, keys: Sequence[float]) -> tuple[int, ...]:
    """A topological order in which the ready node of the least key comes next."""
    missing = [len(costs.members(p)) for p in costs.predecessors]
    ready = [(keys[i], i) for i, count in enumerate(missing) if not count]
    heapify(ready)
    order = []
    while ready:
        _, i = heappop(ready)
        order.append(i)
        for j in costs.members(costs.successors[i]):
            missing[j] -= 1
            if not missing[j]:
                heappush(ready, (keys[j], j))
    return tuple(order)


class _InOrder:
    """The best way to cut a fixed order of nodes into stages on a fixed order of devices.

    At each place the Pareto-best (slowest so far, sum so far) are kept, because every objective grows with
    both. Times of sets of nodes are remembered, because other orders have many of the same sets.
    """

    def __init__(self, found: Split) -> None:
        self.costs, self.objective = found.costs, found.objective
        # What is far worse than the start is not worth its time, what is a little worse may lead on.
        self.cutoff = 1.5 * found.value
        self.least = sum(map(min, zip(*found.costs.seconds, strict=True)))
        self._moved: dict[int, float] = {}
        self._links: dict[tuple[int, int, int], float] = {}

    def best(self, order: Sequence[int], devices: Sequence[int]) -> tuple[float, Cut | None]:
        """(objective, cut); (inf, None) where none fits or all are far worse than the start."""
        count, stages = len(order), len(devices)
        labels: dict[int, list[_Label]] = {0: [(0.0, 0.0, ())]}
        for number, device in enumerate(devices):
            following: dict[int, list[_Label]] = {}
            before = 0
            for start in range(count):
                kept = labels.get(start)
                if kept:
                    link = self.link(before, devices[number - 1], device) if number else 0.0
                    for end, nodes, seconds in self.stages(order, start, device):
                        if number + 1 == stages and end < count:
                            continue
                        for largest, total, cut in kept:
                            new = (
                                max(largest, link, seconds),
                                total + link + seconds,
                                (*cut, (nodes, device)),
                            )
                            if self.objective.of(new[1], new[0]) <= self.cutoff:
                                _keep_best(following.setdefault(end, []), new)
                before |= 1 << order[start]
            labels = following
        back = self.costs.back_seconds(devices[-1], devices[0])
        ends = [
            (self.objective.of(total, largest, back), cut) for largest, total, cut in labels.get(count, [])
        ]
        return min(ends, key=lambda e: e[0], default=(math.inf, None))

    def stages(self, order: Sequence[int], start: int, device: int) -> Iterator[tuple[int, int, float]]:
        """(end, nodes, seconds) of every stage from a place on that fits and is not far too slow."""
        costs, nodes, busy = self.costs, 0, 0.0
        for end in range(start + 1, len(order) + 1):
            nodes |= 1 << order[end - 1]
            busy += costs.seconds[device][order[end - 1]]
            if self.objective.of(max(busy, self.least), busy) > self.cutoff or not costs.fits(nodes, device):
                return
            if nodes not in self._moved:
                self._moved[nodes] = costs.transfer_seconds(nodes)
            yield end, nodes, busy + self._moved[nodes]

    def link(self, before: int, source: int, target: int) -> float:
        key = (before, source, target)
        if key not in self._links:
            self._links[key] = self.costs.link_seconds(*key)
        return self._links[key]


def _keep_best(kept: list[_Label], new: _Label) -> None:
    if not any(old[0] <= new[0] and old[1] <= new[1] for old in kept):
        kept[:] = [old for old in kept if old[0] < new[0] or old[1] < new[1]]
        kept.append(new)
