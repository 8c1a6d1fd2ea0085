"""From a graph, a cluster and a workload to a plan: how many stages, how many replicas, on which devices.

Owns the decisions around the splitters and schedulers. Where the model fits one device it stays whole and
the devices become replicas; where it does not, devices are joined into pipelines of as few stages as fit. A
replica must have at least as much work to do as its weights take to load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from daskllm.graph.cluster import Cluster, Device, Workload
from daskllm.graph.cost import CostModel, Kind, Objective, settle
from daskllm.graph.errors import PlanError, explain_impossible
from daskllm.graph.layers import LayerGraph
from daskllm.graph.place import SCHEDULERS, place
from daskllm.graph.plan import Plan
from daskllm.graph.split import SPLITTERS, Split, lower_bound, split

__all__ = ["make_plan"]


def make_plan(
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload | None = None,
    *,
    splitter: str = "exact",
    scheduler: str = "greedy",
    objective: Objective | Kind = "period",
    stages: int | Literal["auto", "best"] = "auto",
    replicas: int | Literal["auto"] = "auto",
    seed: int = 0,
) -> Plan:
    """The plan for a graph on a cluster.

    Args:
        splitter: ``"recursive"``, ``"greedy"`` or ``"exact"``; see `split.split`.
        scheduler: ``"greedy"``, ``"optimal"`` or ``"genetic"``; see `place.place`.
        objective: a kind takes m, the micro-batches in flight, from the workload.
        stages: of each replica. ``"auto"``: one where the model fits, else as few as fit. ``"best"``: one
            replica of as many stages as make its objective least.
        replicas: how many, or ``"auto"``: as many as the devices allow and the job is worth loading for.
        seed: of the genetic scheduler.

    Raises:
        ValueError: unknown splitter, scheduler or objective; more stages than layers or devices.
        PlanError: nothing fits; the message says which layer does not fit where and what would help.

    Example:
        >>> from daskllm.graph.nodes import Node
        >>> graph = LayerGraph.chain([Node(n, weight_bytes=6, seconds=1.0) for n in "abcd"])
        >>> [s.layers for s in make_plan(graph, Cluster.of(2, memory=12)).replicas[0].stages]
        [('a', 'b'), ('c', 'd')]
    """
    if splitter not in SPLITTERS:
        raise ValueError(f"splitter must be one of {', '.join(SPLITTERS)}, not {splitter!r}")
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, not {scheduler!r}")
    planner = _Planner(graph, cluster, workload or Workload(), splitter, scheduler, objective, seed)
    _check_counts(stages, replicas, graph, cluster, splitter)
    if stages == "best":
        return planner.plan([planner.best()], 1)
    found = list(planner.auto(replicas) if stages == "auto" else planner.fixed(stages, replicas))
    return planner.plan(found, replicas)


def _check_counts(
    stages: object, replicas: object, graph: LayerGraph, cluster: Cluster, splitter: str
) -> None:
    if stages == "best":
        if replicas not in ("auto", 1):
            raise ValueError(
                f'stages="best" makes one replica; replicas={replicas!r} asks for another number'
            )
        return
    for name, count in (("stages", stages), ("replicas", replicas)):
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f'{name} must be "auto" or an integer of at least 1, not {count!r}')
    devices = len(cluster.devices)
    if isinstance(stages, int):
        opens = splitter == "recursive" and any(n.inside is not None for n in graph.nodes)
        if stages > len(graph.nodes) and not opens:
            raise ValueError(f"stages={stages} is more than the graph's {len(graph.nodes)} layers")
        if stages > devices:
            raise ValueError(f"stages={stages} is more than the {devices} devices")
    wanted = (stages if isinstance(stages, int) else 1) * (replicas if isinstance(replicas, int) else 1)
    if wanted > devices:
        raise ValueError(f"replicas={replicas} of {stages} stages need {wanted} devices; there are {devices}")


class _Planner:
    def __init__(
        self,
        graph: LayerGraph,
        cluster: Cluster,
        workload: Workload,
        splitter: str,
        scheduler: str,
        objective: Objective | Kind,
        seed: int,
    ) -> None:
        self.graph, self.cluster, self.workload = graph, cluster, workload
        self.splitter, self.scheduler, self.objective, self.seed = splitter, scheduler, objective, seed
        self.whole = CostModel(graph, cluster, workload)

    def pipeline(self, devices: Sequence[Device], stages: int) -> Split:
        """One replica of that many stages on some of these devices."""
        goal, in_flight = settle(self.objective, self.workload, stages)
        costs = CostModel(self.graph, self.cluster.subset(d.name for d in devices), self.workload, in_flight)
        return place(split(costs, goal, self.splitter, stages), self.scheduler, seed=self.seed)

    def by_size(self) -> list[Device]:
        """The roomiest devices first, the faster first among equals."""
        devices = list(enumerate(self.cluster.devices))
        devices.sort(key=lambda x: (-x[1].memory, sum(self.whole.seconds[x[0]])))
        return [d for _, d in devices]

    def most(self, devices: int) -> int:
        """As many stages as there are layers for."""
        graph = self.graph.open_all() if self.splitter == "recursive" else self.graph
        return min(devices, len(graph.nodes))

    def best(self) -> Split:
        """The one replica of least value, over all numbers of stages; of equal ones that of fewest."""
        found: list[Split] = []
        for stages in range(1, self.most(len(self.cluster.devices)) + 1):
            with suppress(PlanError):
                found.append(self.pipeline(self.cluster.devices, stages))
        if not found:
            raise self._impossible()
        # A period is one micro-batch's, and with other numbers of stages those are of other sizes.
        return min(
            found, key=lambda s: s.value * (s.costs.micro_batches if self.objective == "period" else 1)
        )

    def fixed(self, stages: int, replicas: int | Literal["auto"]) -> Iterator[Split]:
        """Replicas of ``stages`` each."""
        count = len(self.cluster.devices) // stages if replicas == "auto" else replicas
        if count == 1:
            # Alone, the search may choose among all devices.
            yield self.pipeline(self.cluster.devices, stages)
            return
        dealt: list[list[Device]] = [[] for _ in range(count)]
        for number, device in enumerate(self.by_size()[: count * stages]):
            turn, place_ = divmod(number, count)
            # Back and forth, so that no replica gets the better device of every turn.
            dealt[place_ if turn % 2 == 0 else count - 1 - place_].append(device)
        for devices in dealt:
            yield self.pipeline(devices, stages)

    def auto(self, replicas: int | Literal["auto"]) -> Iterator[Split]:
        """Whole replicas on devices that hold the model, pipelines of as few stages as fit on the others."""
        left, found = self.by_size(), 0
        for device in [d for d in left if self._holds(d)]:
            if found == replicas:
                return
            yield self.pipeline([device], 1)
            found += 1
            left.remove(device)
        while left and found != replicas:
            chosen = self._shortest(left)
            if chosen is None:
                break
            yield chosen
            found += 1
            used = {device for device, _ in chosen.stages}
            left = [d for d in left if d.name not in used]
        if not found:
            raise self._impossible()
        if replicas != "auto" and found < replicas:
            raise PlanError(
                f"only {found} of {replicas} replicas fit the {len(self.cluster.devices)} devices"
            )

    def _shortest(self, left: Sequence[Device]) -> Split | None:
        """A replica of as few stages as fit, on the roomiest of these devices or, failing that, on any."""
        for stages in range(1, self.most(len(left)) + 1):
            for devices in (left[:stages], left):
                with suppress(PlanError):
                    return self.pipeline(devices, stages)
        return None

    def _holds(self, device: Device) -> bool:
        number = self.cluster.devices.index(device)
        return self.whole.fits(self.whole.all, number)

    def _impossible(self) -> PlanError:
        """The reason, as the widest pipeline finds it."""
        try:
            self.pipeline(self.cluster.devices, self.most(len(self.cluster.devices)))
        except PlanError as error:
            return error
        return explain_impossible(self.whole, self.splitter)

    def plan(self, found: list[Split], replicas: int | Literal["auto"]) -> Plan:
        """The plan of these replicas, as many of them as the job is worth."""
        kept = found if replicas != "auto" else found[: self._worth(found[0])]
        plan = Plan.of([s.stages for s in kept], self.graph, self.cluster, self.workload, self.objective)
        return replace(
            plan,
            splitter=self.splitter,
            scheduler=self.scheduler,
            bound=max(lower_bound(s.costs, s.objective) for s in kept),
            notes=self._notes(found, kept),
        )

    def _worth(self, first: Split) -> int:
        """How many replicas have at least as much work each as their weights take to load."""
        job = self.workload.total_tokens
        devices = {d.name: d for d in self.cluster.devices}
        if job is None:
            return len(self.cluster.devices)
        loads = first.costs.loads(first.cut)
        loop = Objective("period", first.costs.micro_batches)
        step = first.costs.step
        work = job / (step.rows * step.tokens) * loop.value(loads)
        load = 0.0
        for (nodes, _), (device, _) in zip(first.cut, first.stages, strict=True):
            speed = devices[device].load_bandwidth
            load = max(load, first.costs.memory(nodes).weights / speed if speed else 0.0)
        return max(1, math.floor(work / load)) if load else len(self.cluster.devices)

    def _notes(self, found: list[Split], kept: list[Split]) -> tuple[str, ...]:
        notes = []
        used = {device for s in kept for device, _ in s.stages}
        idle = [d.name for d in self.cluster.devices if d.name not in used]
        if len(kept) < len(found):
            notes.append(
                f"{len(found) - len(kept)} more replica(s) would take longer to load than they would save"
            )
        if idle:
            notes.append(f"without a stage: {', '.join(idle)}")
        return tuple(notes)
