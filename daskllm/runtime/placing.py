"""Which worker gets which layers: from live workers and a user's wishes to a plan and its stages.

It owns what a worker looks like to the planner and the checks of ``stages`` and ``plan``. It refuses to
search (`daskllm.graph` does) and to open anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from daskllm import machine
from daskllm.graph import Cluster, Device, LayerGraph, Link, Measured, Plan, PlanError, Workload, make_plan
from daskllm.models import layer_names
from daskllm.types import StageSpec

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.models import DecoderConfig
    from daskllm.types import ModelSpec

__all__ = [
    "Stages",
    "check_stages",
    "cluster_of",
    "live_cluster",
    "place",
    "plan_of",
    "plan_on",
    "stages_of",
    "with_times",
]

Stages = Literal["auto"] | int

HERE = "this process"
# Of a core, roughly: only the ratio of arithmetic to memory matters to where like workers are cut.
_FLOPS, _BANDWIDTH = 1e11, 2e10
# A message between two workers of one machine as measured: 0.4 ms, and 700 MB/s once it is on its way.
_LINK = Link(latency=4e-4, bandwidth=7e8)
_ROWS, _CONTEXT = (64, 8), 512
"""What is planned for: as many rows as an engine runs together, or else fewer, of middling length."""


def check_stages(stages: Any, plan: Any, client: Client | None) -> None:
    """Refuse what can be refused before a model is looked at.

    Raises:
        ValueError: no such stages or plan, or ones that need a client; the message names the argument.
    """
    if stages != "auto" and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
        raise ValueError(f'stages must be "auto" or an integer of at least 1, not {stages!r}')
    if not isinstance(plan, Plan) and not (isinstance(plan, str) and plan == "auto"):
        raise ValueError(f'plan must be "auto" or a daskllm.graph.Plan, not {plan!r:.80}')
    if client is None and (isinstance(plan, Plan) or stages not in ("auto", 1)):
        given = "plan" if isinstance(plan, Plan) else f"stages={stages}"
        raise ValueError(f"{given} needs the workers of a Dask client: pass client=")
    if isinstance(plan, Plan):
        if len(plan.replicas) != 1:
            raise ValueError(f"plan has {len(plan.replicas)} replicas; one of several stages is what runs")
        if stages not in ("auto", len(plan.replicas[0].stages)):
            raise ValueError(f"stages={stages} and plan, which has {len(plan.replicas[0].stages)}, disagree")


def live_cluster(client: Client) -> Cluster:
    """The client's workers as the planner sees them.

    Raises:
        ValueError: there is no worker.
    """
    workers: Mapping[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    unlimited = [address for address, known in workers.items() if not known["memory_limit"]]
    return cluster_of(workers, client.run(machine.total_memory, workers=unlimited) if unlimited else {})


def cluster_of(workers: Mapping[str, Any], totals: Mapping[str, int] | None = None) -> Cluster:
    """Workers, by address, with the memory that each may hold.

    Args:
        workers: as the scheduler tells of them.
        totals: bytes of the machines of those without a limit of their own; by default this machine's. They
            are shared with the workers beside them.

    Raises:
        ValueError: there is no worker.
    """
    if not workers:
        raise ValueError("the client's cluster has no workers: start one, or wait for one, before load")
    beside = Counter(known["host"] for known in workers.values())

    def memory(address: str) -> int:
        total = machine.total_memory() if totals is None else totals[address]
        return total // beside[workers[address]["host"]]

    devices = [
        Device(
            address,
            memory=known["memory_limit"] or memory(address),
            flops=_FLOPS * known["nthreads"],
            bandwidth=_BANDWIDTH * known["nthreads"],
            resources=known["resources"],
        )
        for address, known in sorted(workers.items())
    ]
    return Cluster(tuple(devices), _LINK)


def place(
    client: Client, spec: ModelSpec, config: DecoderConfig, stages: Stages, plan: Plan | Literal["auto"]
) -> ModelSpec:
    """``spec`` with its stages, as asked for or as planned; without any where each worker gets the whole.

    Raises: as `plan_on` and `stages_of`.
    """
    if plan == "auto" and stages == 1:
        return spec
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if not isinstance(plan, Plan):
        dtype = config.dtype if spec.dtype == "auto" else spec.dtype
        plan = plan_on(live_cluster(client), config, dtype, stages)
        if len(plan.replicas) == len(workers):
            return spec
    return replace(spec, stages=stages_of(plan, config, workers))


def plan_on(cluster: Cluster, config: DecoderConfig, dtype: str, stages: Stages) -> Plan:
    """The plan of a model on workers: one replica of as many stages as asked for.

    With "auto", a model that fits each worker is whole on all of them; another is cut into as few stages as
    fit.

    Raises:
        ValueError: more stages than workers or layers.
        PlanError: nothing fits; the message says which layer does not fit where and what would help.
    """
    graph = LayerGraph.of(config, dtype)
    for count, what in ((len(graph.nodes), "layers of the model"), (len(cluster.devices), "workers")):
        if stages != "auto" and stages > count:
            raise ValueError(f"stages={stages} is more than the {count} {what}")

    def made(workload: Workload) -> Plan:
        if stages != "auto":
            return make_plan(graph, cluster, workload, stages=stages, replicas=1)
        plan = make_plan(graph, cluster, workload)
        if len(plan.replicas) == len(cluster.devices):
            return plan
        return make_plan(graph, cluster, workload, replicas=1)

    return _with_room(config, made)


def plan_of(spec: ModelSpec, config: DecoderConfig, client: Client | None) -> Plan:
    """The plan that a specification follows: its stages, or the whole model on every worker, or here.

    Raises:
        PlanError: a stage's worker is gone, or has not the memory.
    """
    graph = LayerGraph.of(config, config.dtype if spec.dtype == "auto" else spec.dtype)
    here = Cluster((Device(HERE, memory=machine.total_memory()),))
    cluster = here if client is None else live_cluster(client)
    assignment = [[(device.name, layer_names(config))] for device in cluster.devices]
    if spec.stages:
        assignment = [[(stage.worker, stage.layers) for stage in spec.stages]]
    return _with_room(config, lambda workload: Plan.of(assignment, graph, cluster, workload))


def _with_room(config: DecoderConfig, made: Callable[[Workload], Plan]) -> Plan:
    """The plan for as many rows as fit; what does not fit with one row does not fit."""
    context = min(_CONTEXT, config.max_positions)
    for rows in _ROWS:
        with suppress(PlanError):
            return made(Workload(rows=rows, context=context))
    return made(Workload(rows=1, context=context))


def stages_of(plan: Plan, config: DecoderConfig, workers: Iterable[str]) -> tuple[StageSpec, ...]:
    """The stages of a plan of one replica, checked against the model and the live workers.

    Raises:
        PlanError: a layer that is missing, unknown, out of order or there twice; a worker that is not there
            or has two stages. The message names it.
    """
    found = tuple(StageSpec(stage.device, tuple(stage.layers)) for stage in plan.replicas[0].stages)
    names = layer_names(config)
    planned = [name for stage in found for name in stage.layers]
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
    if empty := [stage.worker for stage in found if not stage.layers]:
        raise PlanError(f"the plan's stage on {empty[0]!r} has no layers")
    there = sorted(workers)
    for worker, count in Counter(stage.worker for stage in found).items():
        if worker not in there:
            raise PlanError(f"the plan's worker {worker!r} is not there; the workers are {', '.join(there)}")
        if count > 1:
            raise PlanError(f"the plan gives worker {worker!r} {count} stages; a worker runs one")
    return found


def with_times(plan: Plan, client: Client, spec: ModelSpec) -> Plan:
    """The plan beside what the stages of ``spec`` have done so far."""
    if not spec.stages:
        return plan
    from daskllm.runtime.stages import times_on  # distributed, which whoever has a client has imported

    times = client.run(times_on, spec).values()
    return plan.with_measured(Measured(0, *found) for found in times if found is not None)
