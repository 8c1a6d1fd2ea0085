"""The best contiguous split of a graph over devices, found by dynamic programming over its ideals.

Owns the search. An ideal is a set of nodes that holds all predecessors of its members; the stages of a
contiguous split are the differences along a growing chain of ideals (Tarnawski et al., NeurIPS 2020, after
PipeDream's search over chains). A state is an ideal, how many devices of each class are used, and the class
that the last stage is on; its labels are the Pareto-best pairs (slowest stage or link so far, sum so far).
All three objectives grow with both numbers, so the best label at the end is the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from daskllm.graph.cluster import Cluster
from daskllm.graph.cost import CostModel, Objective

__all__ = ["Cut", "SearchLimitError", "best_cut", "device_classes"]

Cut: TypeAlias = "tuple[tuple[int, int], ...]"
"""(set of nodes, device) for each stage, in order."""

_Label: TypeAlias = "tuple[float, float, _Label | None, int, int]"  # largest, total, before, stage, class
_State: TypeAlias = (
    "tuple[int, tuple[int, ...], int]"  # ideal, devices used by class, class of the last stage
)


class SearchLimitError(Exception):
    """The instance is too large for this search."""


def device_classes(cluster: Cluster) -> list[list[int]]:
    """Device numbers grouped so that two of a group can be exchanged in any plan without changing it."""
    devices = cluster.devices

    def same(a: int, b: int) -> bool:
        x, y = devices[a], devices[b]
        between = cluster.between
        return (
            replace(x, name=y.name) == y
            and between(x.name, y.name) == between(y.name, x.name)
            and all(
                between(x.name, z.name) == between(y.name, z.name)
                and between(z.name, x.name) == between(z.name, y.name)
                for i, z in enumerate(devices)
                if i not in (a, b)
            )
        )

    classes: list[list[int]] = []
    for i in range(len(devices)):
        for group in classes:
            if same(group[0], i):
                group.append(i)
                break
        else:
            classes.append([i])
    return classes


@dataclass(frozen=True, slots=True)
class _Stage:
    """A possible next stage: the ideal that it ends at, its nodes, and its seconds by class (inf: unfit)."""

    ideal: int
    nodes: int
    seconds: tuple[float, ...]


def best_cut(
    costs: CostModel,
    objective: Objective,
    *,
    stages: int | None = None,
    incumbent: Cut | None = None,
    limit: int = 2_000_000,
) -> Cut | None:
    """The split that makes the objective least, or None where none fits.

    Args:
        stages: exactly that many; None allows any number up to that of the devices.
        incumbent: a split to beat; it is given back unless a better one is found.
        limit: the most stages and labels to look at.

    Raises:
        SearchLimitError: there are more than ``limit``.
    """
    search = _Search(costs, objective, stages, limit)
    if incumbent is not None:
        search.offer(incumbent, objective.value(costs.loads(incumbent)))
    # The way back depends on the first device only where links differ.
    by_first = objective.kind == "period" and search.unlike_links
    for first in range(len(search.classes)) if by_first else [None]:
        search.run(first)
    return search.best


class _Search:
    def __init__(
        self,
        costs: CostModel,
        objective: Objective,
        stages: int | None,
        limit: int,
    ) -> None:
        self.costs, self.objective = costs, objective
        self.classes = device_classes(costs.cluster)
        self.exactly = stages
        self.most = min(stages or len(costs.nodes), sum(map(len, self.classes)))
        self.best: Cut | None = None
        self.value = math.inf
        self.left = limit
        # A state needs the class of its last stage only where links differ.
        self.unlike_links = costs.cluster.transfers == "direct" and bool(costs.cluster.links)
        self._next: dict[int, list[_Stage]] = {}
        self._links: dict[tuple[int, int, int], float] = {}
        self.unused: dict[tuple[int, ...], list[float]] = {}
        self.fastest = [min(costs.seconds[g[0]][i] for g in self.classes) for i in range(len(costs.nodes))]
        self.rest: dict[int, float] = {}
        self.slowness = [self._slowness(group[0]) for group in self.classes]

    def offer(self, cut: Cut, value: float) -> None:
        if value < self.value:
            self.best, self.value = cut, value

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SearchLimitError

    def run(self, first: int | None) -> None:
        """All splits whose first stage is on a device of class ``first`` (None: of any)."""
        start: _State = (0, (0,) * len(self.classes), -1)
        level: dict[_State, list[_Label]] = {start: [(0.0, 0.0, None, 0, -1)]}
        for number in range(1, self.most + 1):
            following: dict[_State, list[_Label]] = {}
            for state, labels in level.items():
                self.spread(state, labels, following, first, number)
            level = following

    def spread(
        self,
        state: _State,
        labels: list[_Label],
        following: dict[_State, list[_Label]],
        first: int | None,
        number: int,
    ) -> None:
        ideal, used, last = state
        for stage in self.next_stages(ideal):
            done = stage.ideal == self.costs.all
            if self.exactly not in (None, number) if done else number == self.most:
                continue
            for place in self.free(used, first, number):
                if math.isinf(stage.seconds[place]):
                    continue
                link = self.link(ideal, last, place) if last >= 0 else 0.0
                key = (
                    stage.ideal,
                    tuple(u + (c == place) for c, u in enumerate(used)),
                    place if self.unlike_links else 0,
                )
                for label in labels:
                    largest = max(label[0], link, stage.seconds[place])
                    total = label[1] + link + stage.seconds[place]
                    new: _Label = (largest, total, label, stage.nodes, place)
                    if done:
                        self.finish(new, first, place, number)
                    elif self.promising(new, stage.ideal, key[1]):
                        self.spend(_keep(following.setdefault(key, []), self.project(new)))

    def free(self, used: tuple[int, ...], first: int | None, number: int) -> Sequence[int]:
        if number == 1 and first is not None:
            return (first,)
        return [c for c, group in enumerate(self.classes) if used[c] < len(group)]

    def project(self, label: _Label) -> _Label:
        """Drop the number that the objective does not look at, so that fewer labels are kept."""
        if self.objective.kind == "latency":
            return (0.0, *label[1:])
        if self.objective.kind == "period" and math.isinf(self.objective.micro_batches):
            return (label[0], 0.0, *label[2:])
        return label

    def promising(self, label: _Label, ideal: int, used: tuple[int, ...]) -> bool:
        """Whether the nodes that are left could still end below the best, shared out at will."""
        if self.best is None:
            return True
        if ideal not in self.rest:
            self.rest[ideal] = sum(self.fastest[i] for i in self.costs.members(self.costs.all & ~ideal))
        rest = self.rest[ideal]
        if used not in self.unused:
            factors = [s for s, g, u in zip(self.slowness, self.classes, used, strict=True) for _ in g[u:]]
            self.unused[used] = sorted(factors)[: self.most - sum(used)]
        largest, total, left = label[0], label[1], rest
        if rest:
            # Each unused device does at most its share of the work in the time of the slowest.
            largest = max(largest, rest / sum(1 / s for s in self.unused[used]))
        for factor in self.unused[used]:
            # No stage of a better split takes longer than the best value; the fastest are filled first.
            seconds = min(left * factor, self.value)
            total += seconds
            left -= seconds / factor
        return left <= 1e-12 * rest and self.objective.of(total, largest) < self.value

    def _slowness(self, device: int) -> float:
        """How many times as long as the fastest device this one takes at least, whatever the node."""
        pairs = zip(self.costs.seconds[device], self.fastest, strict=True)
        return min((own / fastest for own, fastest in pairs if fastest), default=1.0)

    def finish(self, label: _Label, first: int | None, last: int, number: int) -> None:
        back = 0.0
        if first is not None and number > 1:
            back = self.costs.back_seconds(*self.pair(last, first))
        elif number > 1 and self.objective.kind == "period" and not self.unlike_links:
            back = self.costs.back_seconds(0, 1)
        if self.objective.of(label[1], label[0], back) < self.value:
            # The sums of a projected label are not the plan's, so the plan itself is asked.
            cut = self.concrete(label)
            self.offer(cut, self.objective.value(self.costs.loads(cut)))

    def concrete(self, label: _Label) -> Cut:
        stages: list[tuple[int, int]] = []
        step: _Label | None = label
        while step is not None and step[2] is not None:
            stages.append((step[3], step[4]))
            step = step[2]
        waiting = [list(group) for group in self.classes]
        return tuple((nodes, waiting[place].pop(0)) for nodes, place in reversed(stages))

    def pair(self, a: int, b: int) -> tuple[int, int]:
        """Two different devices of two classes."""
        return self.classes[a][0], self.classes[b][1 if a == b else 0]

    def link(self, ideal: int, a: int, b: int) -> float:
        key = (ideal, a, b) if self.unlike_links else (ideal, 0, 0)
        if key not in self._links:
            devices = self.pair(a, b) if self.unlike_links else (0, 1)
            self._links[key] = self.costs.link_seconds(ideal, *devices)
        return self._links[key]

    def next_stages(self, ideal: int) -> list[_Stage]:
        """Every set of nodes that can follow an ideal as one stage and fits some device."""
        if ideal not in self._next:
            self._next[ideal] = self._grow(ideal)
        return self._next[ideal]

    def _grow(self, ideal: int) -> list[_Stage]:
        costs, found, seen, stack = self.costs, [], {ideal}, [ideal]
        while stack:
            grown = stack.pop()
            for i in costs.members(costs.all & ~grown):
                larger = grown | 1 << i
                if self.costs.predecessors[i] & ~grown or larger in seen:
                    continue
                seen.add(larger)
                self.spend(1)
                nodes = larger & ~ideal
                fits = [costs.fits(nodes, group[0]) for group in self.classes]
                if not any(fits):  # memory and labels only grow with the stage, so nothing larger fits either
                    continue
                stack.append(larger)
                moved = costs.transfer_seconds(nodes)
                seconds = tuple(
                    costs.compute(nodes, group[0]) + moved if fit else math.inf
                    for group, fit in zip(self.classes, fits, strict=True)
                )
                found.append(_Stage(larger, nodes, seconds))
        return found


def _keep(labels: list[_Label], new: _Label) -> int:
    """Add a label unless another is at least as good in both numbers; drop those that it beats."""
    if any(old[0] <= new[0] and old[1] <= new[1] for old in labels):
        return 0
    labels[:] = [old for old in labels if not (new[0] <= old[0] and new[1] <= old[1])]
    labels.append(new)
    return 1
