"""Which worker gets which layers: from live workers and a user's wishes to a plan and its stages.

It owns what a worker looks like to the planner and the checks of ``stages``, ``replicas`` and ``plan``. It
refuses to search (`daskllm.graph` does), to measure (`devices` does) and to open anything.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from daskllm import machine
from daskllm.graph import Cluster, Device, Link, Measured, Plan, PlanError, Workload, make_plan
from daskllm.models import layer_names
from daskllm.runtime.devices import Rate, Speeds, measured_speeds
from daskllm.runtime.process import engine_times, engine_times_on
from daskllm.runtime.sizes import dtype_of, graph_of
from daskllm.types import StageSpec

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.models import DecoderConfig
    from daskllm.types import ModelSpec

__all__ = [
    "Replicas",
    "Stages",
    "chains_of",
    "check_stages",
    "cluster_of",
    "live_cluster",
    "place",
    "plan_of",
    "plan_on",
    "with_times",
]

Stages = Literal["auto"] | int
Replicas = Literal["auto"] | int

HERE = "this process"
# Of a core, roughly, where nothing was measured: only the ratio of arithmetic to memory matters to where
# like workers are cut.
_FLOPS, _BANDWIDTH = 1e11, 2e10
# A message between two workers of one machine as measured: 0.4 ms, and 700 MB/s once it is on its way.
_LINK = Link(latency=4e-4, bandwidth=7e8)
_ROWS, _CONTEXT, _TOKENS = (64, 8), 512, 3
"""What is planned for: as many rows as an engine runs together, or else fewer, of middling length, that read
two tokens for each that they write. The head works for those that are written alone: planned for decoding
alone, the stages of a small model with a large vocabulary were 8% out of balance, like this 2%."""


def check_stages(stages: Any, replicas: Any, plan: Any, client: Client | None) -> None:
    """Refuse what can be refused before a model is looked at.

    Raises:
        ValueError: no such stages, replicas or plan, or ones that need a client; the message names the
            argument.
    """
    for name, count in (("stages", stages), ("replicas", replicas)):
        if count != "auto" and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f'{name} must be "auto" or an integer of at least 1, not {count!r}')
    if not isinstance(plan, Plan) and not (isinstance(plan, str) and plan == "auto"):
        raise ValueError(f'plan must be "auto" or a daskllm.graph.Plan, not {plan!r:.80}')
    # Without a client each process that answers rows opens the model, which nothing can bound from here.
    wanted = {"plan": isinstance(plan, Plan), f"stages={stages}": stages not in ("auto", 1)}
    wanted[f"replicas={replicas}"] = replicas != "auto"
    if client is None and any(wanted.values()):
        given = next(name for name, there in wanted.items() if there)
        raise ValueError(f"{given} needs the workers of a Dask client: pass client=")
    if isinstance(plan, Plan):
        lengths = sorted({len(replica.stages) for replica in plan.replicas})
        if stages != "auto" and lengths != [stages]:
            has = " or ".join(map(str, lengths))
            raise ValueError(f"stages={stages} and plan, which has {has}, disagree")
        if replicas not in ("auto", len(plan.replicas)):
            raise ValueError(f"replicas={replicas} and plan, which has {len(plan.replicas)}, disagree")


def live_cluster(client: Client, dtype: str | None = None, device: str = "auto") -> Cluster:
    """The client's workers as the planner sees them.

    Args:
        dtype: that a model computes in there: the workers and their links are measured, where that has not
            been done yet. None takes usual figures for them.
        device: as `daskllm.types.ModelSpec` has it.

    Raises:
        ValueError: there is no worker, or one that reports no memory.
    """
    workers: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    speeds = measured_speeds(client, dtype, device) if workers and dtype is not None else None
    unlimited = [address for address, known in workers.items() if not known["memory_limit"]]
    totals = client.run(machine.total_memory, workers=unlimited) if unlimited else {}
    return cluster_of(workers, totals, speeds)


def cluster_of(
    workers: Mapping[str, Any], totals: Mapping[str, int] | None = None, speeds: Speeds | None = None
) -> Cluster:
    """Workers, by address, with the memory that each may hold and what is known of their speeds.

    Args:
        workers: as the scheduler tells of them.
        totals: bytes of the machines of those without a limit of their own; by default this machine's. They
            are shared with the workers beside them.
        speeds: as measured; usual figures stand for what was not.

    Raises:
        ValueError: there is no worker, or one that reports no memory.
    """
    if not workers:
        raise ValueError(
            "the client's cluster has no workers: start one, or wait for one, before load; stages=1 asks for "
            "none, where workers come with the first rows (adapt with a minimum of 0)"
        )
    beside = Counter(known["host"] for known in workers.values())

    def memory(address: str) -> int:
        total = machine.total_memory() if totals is None else totals[address]
        return total // beside[workers[address]["host"]]

    devices = []
    for address, known in sorted(workers.items()):
        rate = speeds.rate(known) if speeds is not None else None
        usual = Rate(_FLOPS * known["nthreads"], _BANDWIDTH * known["nthreads"])
        room = (rate.memory if rate is not None else 0) or known["memory_limit"] or memory(address)
        if not room:
            raise ValueError(f"worker {address} reports no memory: start it with a limit (--memory-limit)")
        rate = rate or usual
        devices.append(Device(address, room, rate.flops, rate.bandwidth, resources=known["resources"]))
    if speeds is None or not speeds.links:
        return Cluster(tuple(devices), _LINK)
    return Cluster(tuple(devices), *_links(workers, speeds))


def _links(workers: Mapping[str, Any], speeds: Speeds) -> tuple[Link, dict[tuple[str, str], Link]]:
    """The most frequent link, and those between two workers that have another."""
    pairs = list(itertools.permutations(sorted(workers), 2))
    found = {(a, b): speeds.link(workers[a], workers[b]) or _LINK for a, b in pairs}
    usual = Counter(found.values()).most_common(1)[0][0] if found else _LINK
    return usual, {pair: link for pair, link in found.items() if link != usual}


def place(
    client: Client,
    spec: ModelSpec,
    config: DecoderConfig,
    stages: Stages,
    replicas: Replicas,
    plan: Plan | Literal["auto"],
) -> ModelSpec:
    """``spec`` with its chains of stages, as asked for or as planned; none where each worker gets the whole.

    Raises: as `plan_on` and `chains_of`.
    """
    if not isinstance(plan, Plan):
        if replicas == "auto" and (stages == 1 or (stages == "auto" and _fits_each(client, spec, config))):
            return spec
        cluster = live_cluster(client, dtype_of(spec, config), spec.device)
        plan = plan_on(cluster, spec, config, stages, replicas)
    return spec.with_chains(chains_of(plan, config, client.scheduler_info(n_workers=-1)["workers"]))


def _fits_each(client: Client, spec: ModelSpec, config: DecoderConfig) -> bool:
    """Whether the whole model goes on every worker: how fast they are is not worth a measurement then."""
    plan = plan_on(live_cluster(client), spec, config, "auto", "auto")
    return len(plan.replicas) == len(client.scheduler_info(n_workers=-1)["workers"])


def plan_on(
    cluster: Cluster, spec: ModelSpec, config: DecoderConfig, stages: Stages, replicas: Replicas = 1
) -> Plan:
    """The plan of a model on workers: so many replicas of so many stages.

    With ``stages="auto"``, a replica is the whole model on a worker that it fits, or else as few stages as
    fit. With ``replicas="auto"``, there are as many as the workers have room for.

    Raises:
        ValueError: more stages than workers or layers, more replicas than workers for them.
        PlanError: nothing fits; the message says which layer does not fit where and what would help.
    """
    graph = graph_of(spec, config)
    workers = len(cluster.devices)
    for count, what in ((len(graph.nodes), "layers of the model"), (workers, "workers")):
        if stages != "auto" and stages > count:
            raise ValueError(f"stages={stages} is more than the {count} {what}")
    if stages == "auto":
        if replicas != "auto" and replicas > workers:
            raise ValueError(f"replicas={replicas} is more than the {workers} workers")
        return _with_room(config, lambda w: make_plan(graph, cluster, w, replicas=replicas))
    if replicas != "auto" and replicas * stages > workers:
        raise ValueError(
            f"replicas={replicas} of {stages} stages need {replicas * stages} workers; there are {workers}"
        )

    def of(count: int) -> Plan:
        return _with_room(config, lambda w: make_plan(graph, cluster, w, stages=stages, replicas=count))

    if replicas != "auto":
        return of(replicas)
    for count in range(workers // stages, 1, -1):
        with suppress(PlanError):
            return of(count)
    return of(1)


def plan_of(spec: ModelSpec, config: DecoderConfig, client: Client | None) -> Plan:
    """The plan that a specification follows: its chains, or the whole model on every worker, or here.

    Raises:
        PlanError: a stage's worker is gone, or has not the memory.
    """
    graph = graph_of(spec, config)
    here = Cluster((Device(HERE, memory=machine.total_memory()),))
    cluster = here if client is None else live_cluster(client, dtype_of(spec, config), spec.device)
    assignment = [[(device.name, layer_names(config))] for device in cluster.devices]
    if spec.chains:
        assignment = [[(stage.worker, stage.layers) for stage in chain.stages] for chain in spec.chains]
    return _with_room(config, lambda workload: Plan.of(assignment, graph, cluster, workload))


def _with_room(config: DecoderConfig, made: Callable[[Workload], Plan]) -> Plan:
    """The plan for as many rows as fit; what does not fit with one row does not fit."""
    context = min(_CONTEXT, config.max_positions)
    for rows in _ROWS:
        with suppress(PlanError):
            return made(Workload(rows=rows, context=context, tokens=_TOKENS))
    return made(Workload(rows=1, context=context, tokens=_TOKENS))


def chains_of(plan: Plan, config: DecoderConfig, workers: Iterable[str]) -> list[tuple[StageSpec, ...]]:
    """The stages of each replica of a plan, checked against the model and the live workers.

    Raises:
        PlanError: a layer that is missing, unknown, out of order or there twice; a worker that is not there
            or has two stages. The message names it.
    """
    chains = [
        tuple(StageSpec(stage.device, tuple(stage.layers)) for stage in replica.stages)
        for replica in plan.replicas
    ]
    for chain in chains:
        _check_layers(chain, layer_names(config))
    there = sorted(workers)
    for worker, count in Counter(stage.worker for chain in chains for stage in chain).items():
        if worker not in there:
            raise PlanError(f"the plan's worker {worker!r} is not there; the workers are {', '.join(there)}")
        if count > 1:
            raise PlanError(f"the plan gives worker {worker!r} {count} stages; a worker runs one")
    if not chains:
        raise PlanError("the plan has no replica")
    return chains


def _check_layers(chain: Sequence[StageSpec], names: Sequence[str]) -> None:
    planned = [name for stage in chain for name in stage.layers]
    for name in planned:
        if name not in names:
            raise PlanError(f"the plan names layer {name!r}; the model's are {', '.join(names)}")
    for name in names:
        if planned.count(name) != 1:
            raise PlanError(
                f"the plan has layer {name!r} {planned.count(name)} times: each must be there once"
            )
    if planned != list(names):
        at = next(i for i, (a, b) in enumerate(zip(planned, names, strict=True)) if a != b)
        raise PlanError(f"the plan has layer {planned[at]!r} where {names[at]!r} comes: keep their order")
    if empty := [stage.worker for stage in chain if not stage.layers]:
        raise PlanError(f"the plan's stage on {empty[0]!r} has no layers")


def with_times(plan: Plan, client: Client | None, spec: ModelSpec) -> Plan:
    """The plan beside what its stages, or the engines of whole models, have done so far."""
    if client is None:
        found = engine_times(spec)
        return plan if found is None else plan.with_measured([Measured(0, 0, *found)])
    if not spec.chains:
        replicas = {replica.stages[0].device: i for i, replica in enumerate(plan.replicas)}
        times = client.run(engine_times_on, spec, workers=list(replicas))
        return plan.with_measured(Measured(replicas[w], 0, *t) for w, t in times.items() if t is not None)
    from daskllm.runtime.stages import times_on  # distributed, which whoever has a client has imported

    staged = client.run(times_on, spec).values()
    return plan.with_measured(Measured(*found) for found in staged if found is not None)
