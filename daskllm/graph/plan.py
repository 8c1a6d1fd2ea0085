"""A plan: which layers run on which device, in how many replicas, and what that is expected to take.

Owns the plan as data: checked when it is made, written and read as JSON, shown as a table or a picture,
filled with what was measured after a run. Refuses to search (``planner`` does) and to run anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

from daskllm.graph import draw, show
from daskllm.graph.check import Assignment, check_devices, check_fit, check_layers, opened_for
from daskllm.graph.cluster import Cluster, Workload
from daskllm.graph.cost import CostModel, Kind, MemoryUse, Objective, settle
from daskllm.graph.layers import LayerGraph
from daskllm.graph.simulate import Simulated, simulate_batch, simulate_loop

__all__ = ["Assignment", "Measured", "Plan", "Replica", "Stage"]


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers that one device runs, one after the other.

    Attributes:
        seconds: predicted, of one micro-batch.
        link_seconds: predicted, of the message to the next stage; 0 for the last.
        memory: bytes needed, of ``capacity``.

    Example: of a plan, ``plan.replicas[0].stages[0]``.
        >>> use = MemoryUse(weights=6, kv=0, activations=0)
        >>> Stage("cpu-0", ("a", "b"), seconds=2.0, link_seconds=0.1, memory=use, capacity=12).memory.total
        6
    """

    device: str
    layers: tuple[str, ...]
    seconds: float
    link_seconds: float
    memory: MemoryUse
    capacity: float


@dataclass(frozen=True, slots=True)
class Replica:
    """One whole copy of the model.

    Attributes:
        micro_batches: in flight together.
        value: the plan's objective for this replica, in seconds.

    Example:
        >>> use = MemoryUse(weights=6, kv=0, activations=0)
        >>> first, second = (Stage(d, (d.upper(),), t, 0.1, use, 12) for d, t in (("a", 2.0), ("b", 3.0)))
        >>> replica = Replica((first, second), micro_batches=2, value=3.0)
        >>> replica.bottleneck, replica.slowest, replica.layers
        (3.0, 'stage 1 on b', ('A', 'B'))
    """

    stages: tuple[Stage, ...]
    micro_batches: int
    value: float
    back_seconds: float = 0.0

    @property
    def bottleneck(self) -> float:
        """Seconds of the slowest stage or link."""
        return max(max(s.seconds, s.link_seconds) for s in self.stages)

    @property
    def slowest(self) -> str:
        """Which stage or link that is."""
        number, stage = max(enumerate(self.stages), key=lambda x: max(x[1].seconds, x[1].link_seconds))
        if stage.seconds >= stage.link_seconds:
            return f"stage {number} on {stage.device}"
        return f"link {stage.device} -> {self.stages[number + 1].device}"

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers, in the order of the stages."""
        return tuple(name for stage in self.stages for name in stage.layers)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one stage of one replica did in a run: seconds computing and idle, micro-batches passed.

    Example:
        >>> Measured(replica=0, stage=1, busy=4.0, waiting=1.0, passes=100).passes
        100
    """

    replica: int
    stage: int
    busy: float
    waiting: float
    passes: int


@dataclass(frozen=True)
class Plan:
    """Replicas of a graph on a cluster.

    Attributes:
        objective: what was made small.
        bound: no plan for one replica on its devices has a lower value; 0 where unknown.
        notes: what the planner wants a reader to know.
        measured: after a run.

    Example:
        >>> from daskllm.graph import Cluster, Node, make_plan
        >>> graph = LayerGraph.chain([Node(n, weight_bytes=6, seconds=1.0) for n in "abc"])
        >>> machines = Cluster.of(2, memory=12)
        >>> plan = make_plan(graph, machines)
        >>> plan.assignment, plan.placement
        ([[('device-0', ['a', 'b']), ('device-1', ['c'])]], {'device-0': ('a', 'b'), 'device-1': ('c',)})
        >>> plan.value, plan.bottleneck, plan.tokens_per_second, round(plan.imbalance(), 3)
        (2.0, 2.0, 0.25, 0.333)
        >>> print(plan.summary().partition(", bottleneck")[0])
        model: 1 replica(s) of 2 stage(s); period 2 s
        >>> plan.simulate(graph, machines)[0].period
        2.0
        >>> ran = plan.with_measured([Measured(0, 0, busy=4.2, waiting=0.0, passes=2)])
        >>> "2100" in ran.explain()  # milliseconds
        True
        >>> Plan.from_json(plan.to_json()) == plan, len(plan.picture().boxes)
        (True, 2)
        >>> plan.visualize().text == plan.explain()
        True
    """

    graph: str
    replicas: tuple[Replica, ...]
    objective: Objective
    workload: Workload
    splitter: str = "by hand"
    scheduler: str = "by hand"
    bound: float = 0.0
    notes: tuple[str, ...] = ()
    measured: tuple[Measured, ...] = ()

    @classmethod
    def of(
        cls,
        assignment: Assignment,
        graph: LayerGraph,
        cluster: Cluster,
        workload: Workload | None = None,
        objective: Objective | Kind = "period",
    ) -> Plan:
        """A plan written by hand, checked, with what it is expected to take.

        Raises:
            PlanError: a layer that is not there, is missing or comes twice; an edge that goes back; a device
                that is not there or has two stages; a stage that does not fit. The message names it.

        Example:
            >>> from daskllm.graph.cluster import Device
            >>> from daskllm.graph.nodes import Node
            >>> graph = LayerGraph.chain([Node("a", seconds=2.0), Node("b", seconds=3.0)])
            >>> cluster = Cluster((Device("x", memory=1), Device("y", memory=1)))
            >>> plan = Plan.of([[("x", ["a"]), ("y", ["b"])]], graph, cluster)
            >>> plan.bottleneck, plan.replicas[0].slowest
            (3.0, 'stage 1 on y')
        """
        workload = workload or Workload()
        check_devices(assignment, cluster)
        goals, replicas = [], []
        for stages in assignment:
            opened = opened_for(graph, stages)
            check_layers(stages, opened)
            goal, in_flight = settle(objective, workload, len(stages))
            goals.append(goal)
            replicas.append(_replica(CostModel(opened, cluster, workload, in_flight), stages, goal))
        return cls(graph.name, tuple(replicas), goals[0], workload)

    @property
    def bottleneck(self) -> float:
        """Seconds of the slowest stage or link of all replicas."""
        return max(r.bottleneck for r in self.replicas)

    @property
    def value(self) -> float:
        """The objective of the slowest replica, in seconds."""
        return max(r.value for r in self.replicas)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all replicas while each loops with its micro-batches in flight."""
        total = 0.0
        for replica in self.replicas:
            times = [s.seconds for s in replica.stages] + [s.link_seconds for s in replica.stages]
            endless = math.isinf(self.objective.micro_batches)
            loop = Objective("period", math.inf if endless else replica.micro_batches)
            period = loop.of(sum(times), max(times), replica.back_seconds)
            tokens = self.workload.rows * self.workload.tokens / replica.micro_batches
            total += tokens / period if period else math.inf
        return total

    @property
    def assignment(self) -> list[list[tuple[str, list[str]]]]:
        """Devices and layers alone, to be changed and given to `of`."""
        return [[(s.device, list(s.layers)) for s in replica.stages] for replica in self.replicas]

    @property
    def placement(self) -> dict[str, tuple[str, ...]]:
        """Device -> the layers whose weights it holds."""
        return {s.device: s.layers for replica in self.replicas for s in replica.stages}

    def with_measured(self, measured: Iterable[Measured]) -> Plan:
        """The same plan beside what a run of it took; ValueError for a stage that it does not have."""
        found = tuple(measured)
        for m in found:
            if not (
                0 <= m.replica < len(self.replicas) and 0 <= m.stage < len(self.replicas[m.replica].stages)
            ):
                raise ValueError(f"the plan has no stage {m.stage} in replica {m.replica}")
        return replace(self, measured=found)

    def imbalance(self, replica: int | None = None) -> float:
        """How much longer the busiest stage (of a replica, or of all) worked than the mean: 0 is even.

        As measured, or as predicted before a run.
        """
        busy = [m.busy for m in self.measured if replica in (None, m.replica)]
        return _unevenness(busy) if busy else self._predicted_imbalance(replica)

    def _predicted_imbalance(self, replica: int | None = None) -> float:
        chosen = self.replicas if replica is None else (self.replicas[replica],)
        return _unevenness([s.seconds for r in chosen for s in r.stages])

    def simulate(self, graph: LayerGraph, cluster: Cluster, *, rounds: int = 40) -> list[Simulated]:
        """Each replica played out event by event: a loop for "period", one batch for the other objectives."""
        results = []
        for r in self.replicas:
            stages = [(s.device, s.layers) for s in r.stages]
            step, opened = self.workload.step(r.micro_batches), graph.reach(r.layers)
            if self.objective.kind == "period":
                back = step.rows * self.workload.return_bytes
                # Twice as many as stages keep the slowest stage or link busy whatever the others take.
                endless = math.isinf(self.objective.micro_batches)
                in_flight = 2 * len(stages) if endless else r.micro_batches
                run = simulate_loop(
                    opened, cluster, stages, step, in_flight, return_bytes=back, rounds=rounds
                )
            else:
                count = 1 if self.objective.kind == "latency" else r.micro_batches
                run = simulate_batch(opened, cluster, stages, step, count)
            results.append(run)
        return results

    def explain(self) -> str:
        """The plan as a text table: a line for each stage, what was measured beside what was predicted.

        Times are those of one micro-batch.
        """
        head = ["replica", "stage", "device", "layers", "weights", "KV", "memory", "of", "ms", "link ms"]
        seen = {(m.replica, m.stage): m for m in self.measured}
        if seen:
            head += ["measured ms", "busy s", "waiting s", "passes"]
        rows = []
        for i, replica in enumerate(self.replicas):
            for j, stage in enumerate(replica.stages):
                rows.append([*_cells(i, j, stage), *(_measured_cells(seen.get((i, j))) if seen else [])])
        lines = [draw.table(head, rows), "", self.summary()]
        if seen:
            each = ", ".join(
                f"{self.imbalance(i):.1%} in replica {i}, predicted {self._predicted_imbalance(i):.1%}"
                for i in sorted({m.replica for m in self.measured})
            )
            all_ = f"{self.imbalance():.1%}, predicted {self._predicted_imbalance():.1%}"
            lines.append(f"imbalance measured: {all_} ({each})")
        return "\n".join([*lines, *self.notes])

    def summary(self) -> str:
        """The plan in a line."""
        slowest = max(self.replicas, key=lambda r: r.bottleneck)
        stages = sorted({len(r.stages) for r in self.replicas})
        return (
            f"{self.graph}: {len(self.replicas)} replica(s) of {' or '.join(map(str, stages))} stage(s); "
            f"{self.objective.kind} {self.value:.6g} s, bottleneck {self.bottleneck:.6g} s "
            f"({slowest.slowest}); splitter {self.splitter}, scheduler {self.scheduler}"
        )

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        return f"<Plan {self.summary()}>"

    def _repr_html_(self) -> str:
        return show.plan_html(self)

    def picture(self) -> draw.Picture:
        """Stages as boxes, replicas as frames."""
        boxes, arrows = [], []
        for i, replica in enumerate(self.replicas):
            group = f"replica {i}" if len(self.replicas) > 1 else None
            for j, s in enumerate(replica.stages):
                lines = (
                    f"stage {j}: {s.device}",
                    draw.layer_range(s.layers),
                    f"{draw.size(s.memory.total)}, {1000 * s.seconds:.4g} ms",
                )
                boxes.append(draw.Box(f"{i}.{j}", lines, s.device, group))
                if j + 1 < len(replica.stages):
                    arrows.append(draw.Arrow(f"{i}.{j}", f"{i}.{j + 1}", f"{1000 * s.link_seconds:.4g} ms"))
        return draw.Picture(f"plan of {self.graph}", tuple(boxes), tuple(arrows))

    def visualize(self, path: str | PathLike[str] | None = None) -> draw.Drawing:
        """The plan drawn; written to ``path`` when given (.svg, .mmd, .txt or .json)."""
        drawing = draw.Drawing(self.picture(), self.explain(), self.to_json())
        if path is not None:
            drawing.save(path)
        return drawing

    def to_json(self) -> str:
        """The plan as JSON that `from_json` reads back to an equal plan."""
        plain = {"format": "daskllm.plan/1", **asdict(self)}
        if math.isinf(self.objective.micro_batches):
            plain["objective"]["micro_batches"] = None
        for stage in (s for r in plain["replicas"] for s in r["stages"]):
            stage["capacity"] = None if math.isinf(stage["capacity"]) else stage["capacity"]
        return json.dumps(plain, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote; ValueError says what is wrong with the text."""
        try:
            plain = json.loads(text)
            if not isinstance(plain, dict) or plain.pop("format", None) != "daskllm.plan/1":
                raise ValueError('"format" must be "daskllm.plan/1"')
            objective = plain.pop("objective")
            m = objective["micro_batches"]
            return cls(
                replicas=tuple(_read_replica(r) for r in plain.pop("replicas")),
                objective=Objective(objective["kind"], math.inf if m is None else m),
                workload=Workload(**plain.pop("workload")),
                notes=tuple(plain.pop("notes", ())),
                measured=tuple(Measured(**m) for m in plain.pop("measured", ())),
                **plain,
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a plan in JSON: {error}") from error


def _cells(replica: int, number: int, stage: Stage) -> list[str]:
    use = stage.memory
    sizes = (use.weights, use.kv, use.total, stage.capacity)
    times = (stage.seconds, stage.link_seconds)
    names = draw.layer_range(stage.layers)
    cells = [str(replica), str(number), stage.device, names, *map(draw.size, sizes)]
    return cells + [f"{1000 * t:.4g}" for t in times]


def _measured_cells(m: Measured | None) -> list[str]:
    if m is None:
        return [""] * 4
    mean = f"{1000 * m.busy / m.passes:.4g}" if m.passes else ""
    return [mean, f"{m.busy:.4g}", f"{m.waiting:.4g}", str(m.passes)]


def _unevenness(busy: Sequence[float]) -> float:
    mean = sum(busy) / len(busy)
    return max(busy) / mean - 1 if mean else 0.0


def _read_replica(plain: Mapping[str, Any]) -> Replica:
    stages = tuple(
        Stage(
            **{
                **s,
                "layers": tuple(s["layers"]),
                "memory": MemoryUse(**s["memory"]),
                "capacity": math.inf if s["capacity"] is None else s["capacity"],
            }
        )
        for s in plain["stages"]
    )
    return Replica(**{**plain, "stages": stages})


def _replica(costs: CostModel, stages: Sequence[tuple[str, Sequence[str]]], objective: Objective) -> Replica:
    """The stages with their predicted times and bytes; PlanError where one does not fit."""
    devices = {d.name: i for i, d in enumerate(costs.cluster.devices)}
    cut = [(costs.mask(layers), devices[device]) for device, layers in stages]
    for number, (nodes, device) in enumerate(cut):
        check_fit(costs, number, nodes, device)
    loads = costs.loads(cut)
    found = tuple(
        Stage(
            device=costs.cluster.devices[device].name,
            layers=costs.names(nodes),
            seconds=seconds,
            link_seconds=link,
            memory=costs.memory(nodes),
            capacity=costs.cluster.devices[device].memory,
        )
        for (nodes, device), seconds, link in zip(cut, loads.stages, (*loads.links, 0.0), strict=True)
    )
    return Replica(found, costs.micro_batches, objective.value(loads), loads.back)
