"""Cutting a graph into the stages of a pipeline: recursive, greedy, exact.

Owns the three splitters. Each takes a `CostModel` and gives a `Split`: which nodes, in which order, on which
devices. Refuses to know how many stages are wise and how replicas are grouped: ``planner`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from daskllm.graph.cost import CostModel, Objective
from daskllm.graph.errors import PlanError, explain_impossible
from daskllm.graph.exact import Cut, SearchLimitError, best_cut

__all__ = ["SPLITTERS", "Split", "Splitter", "lower_bound", "split"]

Splitter: TypeAlias = Literal["recursive", "greedy", "exact"]
SPLITTERS: tuple[str, ...] = get_args(Splitter)


@dataclass(frozen=True)
class Split:
    """Stages of a graph on devices.

    Attributes:
        costs: of the graph that was cut, which the recursive splitter may have opened further.
        cut: (set of nodes, device number) for each stage, in order.

    Example:
        >>> from daskllm.graph import Cluster, LayerGraph, Node, Workload
        >>> graph = LayerGraph.chain([Node(n, seconds=1.0) for n in "abcd"])
        >>> found = split(CostModel(graph, Cluster.of(2, memory=1), Workload()), Objective())
        >>> found.stages, found.value
        ((('device-0', ('a', 'b')), ('device-1', ('c', 'd'))), 2.0)
    """

    costs: CostModel
    cut: Cut
    objective: Objective

    @property
    def value(self) -> float:
        """The objective of this split."""
        return self.objective.value(self.costs.loads(self.cut))

    @property
    def stages(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(device, names of its nodes) for each stage."""
        devices = self.costs.cluster.devices
        return tuple((devices[device].name, self.costs.names(nodes)) for nodes, device in self.cut)


def split(costs: CostModel, objective: Objective, method: str = "exact", stages: int | None = None) -> Split:
    """Cut a graph into contiguous stages, each on a device of its own.

    Args:
        method: ``"recursive"``: open what fits no device, then halve the devices and the layers between
            them by capacity, again and again. ``"greedy"``: fill device after device to its share.
            ``"exact"``: the best there is over all contiguous splits and orders of devices.
        stages: exactly that many; None: as many as there are devices (nodes, if those are fewer), and for
            ``"exact"`` the best number up to that.

    Raises:
        ValueError: unknown method; more stages than nodes or devices.
        PlanError: nothing fits, or the instance is too large for an exact search.

    Example:
        >>> from daskllm.graph import Cluster, LayerGraph, Node, Workload
        >>> graph = LayerGraph.chain([Node(n, seconds=1.0) for n in "abc"])
        >>> costs = CostModel(graph, Cluster.of(3, memory=1), Workload())
        >>> [len(split(costs, Objective(), method, stages=3).stages) for method in SPLITTERS]
        [3, 3, 3]
    """
    if method not in SPLITTERS:
        raise ValueError(f"splitter must be one of {', '.join(SPLITTERS)}, not {method!r}")
    if method == "recursive":
        costs = _descend(costs, stages)
    _check_stages(costs, stages)
    if method == "exact":
        return _exact(costs, objective, stages)
    count = stages or min(len(costs.cluster.devices), len(costs.nodes))
    walk = _bisect if method == "recursive" else _fill
    found = _first_fitting(costs, objective, count, walk)
    if found is None:
        raise explain_impossible(costs, method, stages)
    return Split(costs, found, objective)


def _check_stages(costs: CostModel, stages: int | None) -> None:
    if stages is None:
        return
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages must be an integer of at least 1, not {stages!r}")
    if stages > len(costs.nodes):
        raise ValueError(f"stages={stages} is more than the graph's {len(costs.nodes)} layers")
    if stages > len(costs.cluster.devices):
        raise ValueError(f"stages={stages} is more than the {len(costs.cluster.devices)} devices")


def _exact(costs: CostModel, objective: Objective, stages: int | None) -> Split:
    count = stages or min(len(costs.cluster.devices), len(costs.nodes))
    # Any split that fits is a bound that lets the search drop most of its states.
    seed = _first_fitting(costs, objective, count, _fill) or _first_fitting(costs, objective, count, _bisect)
    if seed is not None:
        seed = _swapped(costs, objective, seed)
    try:
        cut = best_cut(costs, objective, stages=stages, incumbent=seed)
    except SearchLimitError:
        raise PlanError(
            f"the graph's {len(costs.nodes)} layers allow too many splits over {len(costs.cluster.devices)} "
            'devices for splitter="exact"; use "recursive" or "greedy", or a graph that is opened less'
        ) from None
    if cut is None:
        raise explain_impossible(costs, "exact", stages)
    return Split(costs, cut, objective)


def lower_bound(costs: CostModel, objective: Objective) -> float:
    """A time that no plan on these devices goes below: nothing travels, each node on its fastest device.

    Example:
        >>> from daskllm.graph import Cluster, LayerGraph, Node, Workload
        >>> graph = LayerGraph.chain([Node(n, seconds=1.0) for n in "abc"])
        >>> lower_bound(CostModel(graph, Cluster.of(2, memory=1), Workload()), Objective())
        1.5
    """
    devices = range(len(costs.cluster.devices))
    times = [
        min((costs.seconds[d][i] for d in devices if costs.allowed(i, d)), default=0.0)
        for i in range(len(costs.nodes))
    ]
    return objective.of(sum(times), max(max(times), sum(times) / len(devices)))


def _descend(costs: CostModel, stages: int | None) -> CostModel:
    """Open nodes that fit no device, and, where there are fewer than stages, the one that takes longest."""
    devices = range(len(costs.cluster.devices))
    while True:
        nodes = costs.nodes
        unfit = [
            n.name
            for i, n in enumerate(nodes)
            if n.inside is not None and not any(costs.fits(1 << i, d) for d in devices)
        ]
        if not unfit and stages is not None and len(nodes) < stages:
            opens = [i for i, n in enumerate(nodes) if n.inside is not None]
            unfit = [nodes[max(opens, key=lambda i: costs.seconds[0][i])].name] if opens else []
        if not unfit:
            return costs
        costs = costs.opened(unfit)


_Walk: TypeAlias = "Callable[[CostModel, Sequence[int]], list[int] | None]"
"""Devices in order -> where in the topological order each stage ends, or None."""


def _first_fitting(costs: CostModel, objective: Objective, count: int, walk: _Walk) -> Cut | None:
    """The best of a few orders of devices in which the walk finds room."""
    best, value = None, float("inf")
    for devices in _device_orders(costs, count):
        ends = walk(costs, devices)
        if ends is None:
            continue
        cut = tuple((_run(a, b), d) for a, b, d in zip([0, *ends], ends, devices, strict=False))
        new = objective.value(costs.loads(cut))
        if new < value:
            best, value = cut, new
    return best


def _swapped(costs: CostModel, objective: Objective, cut: Cut) -> Cut:
    """A cut with devices exchanged, among each other or for unused ones, as long as that makes it better."""
    order, count = [d for _, d in cut], len(cut)
    order += [d for d in range(len(costs.cluster.devices)) if d not in order]
    value, better = objective.value(costs.loads(cut)), True
    while better:
        better = False
        for a, b in ((x, y) for x in range(count) for y in range(x + 1, len(order))):
            tried = order.copy()
            tried[a], tried[b] = tried[b], tried[a]
            ends = _fill(costs, tried[:count])
            if ends is None:
                continue
            new = tuple((_run(x, y), d) for x, y, d in zip([0, *ends], ends, tried, strict=False))
            if objective.value(costs.loads(new)) < value:
                order, cut, value, better = tried, new, objective.value(costs.loads(new)), True
    return cut


def _device_orders(costs: CostModel, count: int) -> Iterator[Sequence[int]]:
    """The fastest devices, then the roomiest, in the cluster's order and with the best first."""
    devices = range(len(costs.cluster.devices))
    seen = set()
    for key in (lambda d: -_power(costs, d), lambda d: -costs.cluster.devices[d].memory):
        chosen = sorted(devices, key=key)[:count]
        for order in (tuple(sorted(chosen)), tuple(chosen)):
            if order not in seen:
                seen.add(order)
                yield order


def _power(costs: CostModel, device: int) -> float:
    """How much of the graph a device computes in a second."""
    seconds = sum(costs.seconds[device])
    return 1 / seconds if seconds else 1.0


def _run(start: int, stop: int) -> int:
    return (1 << stop) - (1 << start)


def _weights(costs: CostModel) -> list[float]:
    """What a node counts in sharing work out: its mean time over the devices."""
    devices = len(costs.seconds)
    times = [sum(row[i] for row in costs.seconds) / devices for i in range(len(costs.nodes))]
    return times if any(times) else [1.0] * len(times)


def _fill(costs: CostModel, devices: Sequence[int]) -> list[int] | None:
    """Each device in turn takes nodes up to its share of what is left, and more where the rest needs it.

    A node that would overshoot the share is taken when that comes closer to it than leaving it would.
    """
    work, total = _weights(costs), len(costs.nodes)
    room = _rooms(costs, devices)
    if room is None:
        return None
    ends: list[int] = []
    start = 0
    for number, device in enumerate(devices):
        left = devices[number:]
        share = sum(work[start:]) * _power(costs, device) / sum(_power(costs, d) for d in left)
        last = total - (len(left) - 1)
        end, done = start + 1, work[start]
        while end < last and costs.fits(_run(start, end + 1), device):
            # ``room`` knows how far the later devices reach back: before that, this one must go on.
            if end >= room[number + 1] and abs(done + work[end] - share) > abs(done - share):
                break
            done += work[end]
            end += 1
        if not costs.fits(_run(start, end), device) or end < room[number + 1]:
            return None
        ends.append(end)
        start = end
    return ends if ends[-1] == total else None


def _rooms(costs: CostModel, devices: Sequence[int]) -> list[int] | None:
    """From where on the devices from each number on can hold all nodes, packed from the back."""
    rooms, start = [len(costs.nodes)], len(costs.nodes)
    for number, device in reversed(list(enumerate(devices))):
        end = start
        while start > number and costs.fits(_run(start - 1, end), device):
            start -= 1
        if start == end:
            return None
        rooms.append(start)
    return rooms[::-1] if start == 0 else None


def _bisect(costs: CostModel, devices: Sequence[int]) -> list[int] | None:
    """Halve the devices, cut the nodes where the halves' shares meet, and go on in both halves."""
    work = _weights(costs)
    done = [0.0]
    for amount in work:
        done.append(done[-1] + amount)
    failed: set[tuple[int, int, int, int]] = set()

    def cut(start: int, stop: int, low: int, high: int) -> list[int] | None:
        if high - low == 1:
            return [stop] if costs.fits(_run(start, stop), devices[low]) else None
        if (start, stop, low, high) in failed:
            return None
        middle = (low + high) // 2
        left = sum(_power(costs, d) for d in devices[low:middle])
        share = (done[stop] - done[start]) * left / sum(_power(costs, d) for d in devices[low:high])
        places = range(start + middle - low, stop - (high - middle) + 1)
        for place in sorted(places, key=lambda p: abs(done[p] - done[start] - share)):
            first = cut(start, place, low, middle)
            second = cut(place, stop, middle, high) if first is not None else None
            if first is not None and second is not None:
                return first + second
        failed.add((start, stop, low, high))
        return None

    return cut(0, len(work), 0, len(devices))
