"""Small planning problems, drawn at random or known from print, and a judge that shares no formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from daskllm.graph import Cluster, Device, Edge, LayerGraph, Link, Machine, Node, Problem, Task, Workload
from daskllm.models.description import DecoderConfig, Rope

SHARED = Path(__file__).resolve().parents[3] / "shared"

_TIMES = (
    (14, 16, 9),
    (13, 19, 18),
    (11, 13, 19),
    (13, 8, 17),
    (12, 13, 10),
    (13, 16, 9),
    (7, 15, 11),
    (5, 11, 14),
    (18, 12, 20),
    (21, 7, 16),
)
_MESSAGES = (
    (1, 2, 18),
    (1, 3, 12),
    (1, 4, 9),
    (1, 5, 11),
    (1, 6, 14),
    (2, 8, 19),
    (2, 9, 16),
    (3, 7, 23),
    (4, 8, 27),
    (4, 9, 23),
    (5, 9, 13),
    (6, 8, 15),
    (7, 10, 17),
    (8, 10, 11),
    (9, 10, 13),
)


def ten_tasks() -> Problem:
    """The worked example of Topcuoglu et al. 2002 (figure 2): HEFT 80, best 73."""
    tasks = tuple(Task(f"n{i}", tuple(map(float, row))) for i, row in enumerate(_TIMES, 1))
    edges = {(f"n{a}", f"n{b}"): float(c) for a, b, c in _MESSAGES}
    return Problem(tasks, tuple(Machine(f"P{i}") for i in (1, 2, 3)), edges)


def decoder(**changes: Any) -> DecoderConfig:
    """A small Llama-like description."""
    layers = changes.get("num_layers", 4)
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_layers": layers,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 8,
        "max_positions": 256,
        "norm": "rms",
        "norm_eps": 1e-5,
        "activation": "silu",
        "gated": True,
        "rope": Rope(10_000.0),
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "windows": (None,) * layers,
        "attention_scale": 8**-0.5,
        "tied": False,
        "dtype": "float32",
    }
    return DecoderConfig(**{**fields, **changes})


def random_graph(random: Random, nodes: int, *, chain: bool = False, given: bool | None = None) -> LayerGraph:
    """A DAG (or chain) whose nodes have given times or work, in an order that is not topological."""
    given = random.random() < 0.5 if given is None else given
    made = []
    for i in range(nodes):
        work: dict[str, Any] = {"seconds": float(random.randint(0, 9))}
        if not given:
            work = {"flops_per_token": random.randint(0, 20), "activation_bytes": random.randint(0, 3)}
        if given and random.random() < 0.3:
            work["send_seconds"] = random.choice((0.0, 0.5, 2.0))
        made.append(
            Node(
                f"n{i}",
                weight_bytes=random.randint(0, 10),
                kv_bytes=random.choice((0, 0, 1)),
                output_bytes=random.randint(0, 6),
                resources={"gpu": 1} if random.random() < 0.05 else {},
                **work,
            )
        )
    pairs = [(i, i + 1) for i in range(nodes - 1)]
    if not chain:
        pairs = [p for p in itertools.combinations(range(nodes), 2) if random.random() < 0.45]
    edges = [Edge(f"n{a}", f"n{b}", random.choice((None, None, random.randint(0, 6)))) for a, b in pairs]
    random.shuffle(made)
    return LayerGraph(made, edges, "random")


def random_cluster(random: Random, devices: int) -> Cluster:
    """Devices, half the time unequal, with links of their own and often too little memory."""
    equal, memory = random.random() < 0.4, random.choice((math.inf, 40.0, 25.0))
    made = []
    for i in range(devices):
        speed = 1.0 if equal else random.choice((0.5, 1.0, 2.0))
        made.append(
            Device(
                f"d{i}",
                memory=memory if equal else random.choice((memory, memory * 0.7)),
                flops=2.0 * speed,
                bandwidth=5.0,
                launch=0.25,
                speed=speed,
                resources={"gpu": 1} if equal or random.random() < 0.7 else {},
            )
        )

    def link() -> Link:
        return Link(random.choice((0.0, 0.5, 1.0)), random.choice((math.inf, 1.0, 4.0)))

    links = {}
    if not equal:
        pairs = itertools.permutations([d.name for d in made], 2)
        links = {pair: link() for pair in pairs if random.random() < 0.5}
    return Cluster(tuple(made), link(), links, random.choice(("direct", "direct", "host")))


@dataclass(frozen=True)
class Judged:
    """What a split costs, by the words of the documentation."""

    stages: list[float]
    links: list[float]
    back: float

    def value(self, kind: str, m: float) -> float:
        total, largest = sum(self.stages) + sum(self.links), max(self.stages + self.links)
        if kind == "latency":
            return total
        if kind == "batch":
            return total + (m - 1) * largest
        return max(largest, self.back, (total + self.back) / m)


def judge(
    graph: LayerGraph,
    cluster: Cluster,
    workload: Workload,
    stages: Sequence[tuple[Device, Sequence[Node]]],
    m: int,
) -> Judged | None:
    """Times of a split, or None where it does not fit."""
    rows = workload.rows / m
    stage_of = {n.name: i for i, (_, nodes) in enumerate(stages) for n in nodes}
    seconds = []
    for device, nodes in stages:
        kv = sum(n.kv_bytes * workload.rows * workload.context for n in nodes)
        active = max(n.activation_bytes * rows for n in nodes)
        if sum(n.weight_bytes for n in nodes) + kv + active > device.memory:
            return None
        if any(n.resources and not device.resources for n in nodes):
            return None
        time = 0.0
        for n in nodes:
            if n.seconds is not None:
                time += n.seconds / device.speed
            else:
                moved = n.weight_bytes + rows * (n.activation_bytes + workload.context * n.kv_bytes)
                time += max(rows * n.flops_per_token / device.flops, moved / device.bandwidth) + device.launch
        seconds.append(time)

    def sent(source: Node, wanted: set[str]) -> tuple[float, float]:
        edges = [e for e in graph.edges if e.source == source.name and e.target in wanted]
        if not edges:
            return 0.0, 0.0
        if source.send_seconds is not None:
            return 0.0, source.send_seconds
        return rows * max(source.output_bytes if e.bytes is None else e.bytes for e in edges), 0.0

    def over(link: Link, size: float) -> float:
        return link.latency + size / link.bandwidth if size else 0.0

    if cluster.transfers == "host":
        for i in range(len(stages)):
            inside = {name for name, stage in stage_of.items() if stage == i}
            for n in graph.nodes:
                size, given = sent(n, set(stage_of) - inside if n.name in inside else inside)
                seconds[i] += over(cluster.link, size) + given
        return Judged(seconds, [], 0.0)
    links = []
    for i in range(len(stages) - 1):
        later = {name for name, stage in stage_of.items() if stage > i}
        parts = [sent(n, later) for n in graph.nodes if stage_of[n.name] <= i]
        link = cluster.between(stages[i][0].name, stages[i + 1][0].name)
        links.append(over(link, sum(size for size, _ in parts)) + sum(given for _, given in parts))
    last, first = stages[-1][0], stages[0][0]
    back = (
        over(cluster.between(last.name, first.name), rows * workload.return_bytes) if last != first else 0.0
    )
    return Judged(seconds, links, back)


def all_splits(graph: LayerGraph, cluster: Cluster, stages: int) -> Iterator[list[tuple[Device, list[Node]]]]:
    """Every way to give the nodes to that many stages in an order of devices, edges never going back."""
    nodes = list(graph.nodes)
    place = {n.name: i for i, n in enumerate(nodes)}
    for chosen in itertools.product(range(stages), repeat=len(nodes)):
        if len(set(chosen)) < stages:
            continue
        if any(chosen[place[e.source]] > chosen[place[e.target]] for e in graph.edges):
            continue
        parts = [[n for n, c in zip(nodes, chosen, strict=True) if c == s] for s in range(stages)]
        for devices in itertools.permutations(cluster.devices, stages):
            yield list(zip(devices, parts, strict=True))


def random_problem(random: Random, tasks: int, machines: int) -> Problem:
    """Tasks with random times, some of which cannot run everywhere, and random messages."""
    made = tuple(
        Task(
            f"t{i}",
            tuple(
                float(random.randint(1, 9)) if m == 0 or random.random() < 0.9 else math.inf
                for m in range(machines)
            ),
            priority=random.choice((0, 0, 0, 1)),
            memory=random.choice((0, 1)),
        )
        for i in range(tasks)
    )
    edges = {
        (f"t{a}", f"t{b}"): float(random.randint(0, 6))
        for a, b in itertools.combinations(range(tasks), 2)
        if random.random() < 0.35
    }
    room = random.choice((math.inf, 3.0))
    return Problem(
        made, tuple(Machine(f"m{i}", memory=room if i else math.inf) for i in range(machines)), edges
    )
