"""The figures as Prometheus has them, on the ``/metrics`` of Dask's scheduler and workers.

`METRICS` is all of them, with what they mean; `table` writes it down. It owns names and labels. It refuses to
know how the figures were gathered. Without ``prometheus_client``, which Dask's own ``/metrics`` needs too,
nothing is exported.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from daskllm.dashboard.engines import PHASES, EngineFigures, engines_of
from daskllm.runtime.progress import told_by

if TYPE_CHECKING:
    from distributed import Scheduler, Worker

    from daskllm.dashboard.board import Board

__all__ = ["METRICS", "Metric", "hide", "of_scheduler", "of_worker", "show_scheduler", "show_worker", "table"]

Sample = tuple[str, tuple[str, ...], float]
"""A metric's name, the values of its labels, and its value."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: without "_total", which a counter's samples have besides.
        on: whose ``/metrics`` it is on.
    """

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    says: str
    on: Literal["scheduler", "worker"]

    @property
    def sample(self) -> str:
        """The name that queries use."""
        return self.name + "_total" * (self.kind == "counter")


_ENGINE: tuple[tuple[str, Literal["counter", "gauge"], tuple[str, ...], str], ...] = (
    ("prompt_tokens", "counter", (), "prompt tokens computed, rows under way included"),
    ("output_tokens", "counter", (), "tokens generated, rows under way included"),
    (
        "engine_seconds",
        "counter",
        ("phase",),
        'seconds in "prefill", "decode", "stage" (of a stage that is not the last) and "idle"',
    ),
    ("batch_sequences", "gauge", (), "sequences in the engines' batches"),
    ("batch_room", "gauge", (), "sequences that the batches take"),
    ("waiting_sequences", "gauge", (), "sequences behind the batches"),
    ("kv_blocks_used", "gauge", (), "KV blocks in use"),
    ("kv_blocks", "gauge", (), "KV blocks that there are"),
    ("resident_bytes", "gauge", ("model", "stage"), "bytes of weights that are held"),
    ("layers", "gauge", ("model", "stage"), "layers that are held"),
)
_JOB: tuple[tuple[str, Literal["counter", "gauge"], tuple[str, ...], str], ...] = (
    ("rows", "counter", ("job",), "rows answered, failed ones included"),
    ("failed_rows", "counter", ("job", "kind"), "rows that failed, by what they failed of"),
    ("remembered_rows", "counter", ("job",), "rows whose answer was there without the model"),
    ("job_prompt_tokens", "counter", ("job",), "prompt tokens of the rows answered"),
    ("job_output_tokens", "counter", ("job",), "output tokens of the rows answered"),
)

METRICS = (
    *(Metric(f"daskllm_{n}", kind, ("worker", *ls), says, "scheduler") for n, kind, ls, says in _ENGINE),
    *(Metric(f"daskllm_{n}", kind, ls, says, "scheduler") for n, kind, ls, says in _JOB),
    Metric(
        "daskllm_recomputed_rows", "counter", ("job",), "rows that a task answered a second time", "scheduler"
    ),
    Metric("daskllm_job_rows", "gauge", ("job",), "rows of the job, where that is known", "scheduler"),
    Metric("daskllm_job_eta_seconds", "gauge", ("job",), "time left, where that is known", "scheduler"),
    Metric("daskllm_job_tasks", "gauge", ("job", "state"), 'tasks "running" and "waiting"', "scheduler"),
    Metric("daskllm_job_priority", "gauge", ("job",), "its priority; more is sooner", "scheduler"),
    Metric("daskllm_steals", "counter", (), "tasks of rows that an idle worker took over", "scheduler"),
    Metric("daskllm_workers", "gauge", (), "workers that hold a model", "scheduler"),
    Metric("daskllm_lost_workers", "counter", (), "workers that left while they held one", "scheduler"),
    *(Metric(f"daskllm_worker_{n}", kind, ls, says, "worker") for n, kind, ls, says in (*_ENGINE, *_JOB)),
    Metric("daskllm_worker_steps", "counter", (), "steps of the engines and stages", "worker"),
    Metric("daskllm_worker_preemptions", "counter", (), "sequences put back for lack of KV blocks", "worker"),
    Metric("daskllm_worker_reused_tokens", "counter", (), "prompt tokens found, not computed", "worker"),
)


def table() -> str:
    """All metrics as a table in Markdown.

    >>> print(table().splitlines()[2])
    | `daskllm_prompt_tokens_total` | counter | worker | prompt tokens computed, rows under way included |
    """
    rows = [(f"`{m.sample}`", m.kind, ", ".join(m.labels), m.says) for m in METRICS]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [("metric", "kind", "labels", "says"), ("---",) * 4, *rows]
    )


def of_worker(worker: Worker) -> Iterator[Sample]:
    """What a worker's ``/metrics`` says."""
    engines = engines_of(worker)
    yield from _of_engines("daskllm_worker_", (), engines, _seconds(engines))
    for name in ("steps", "preemptions", "reused_tokens"):
        yield f"daskllm_worker_{name}", (), sum(getattr(engine, name) for engine in engines)
    for label, counts in told_by(worker.id).items():
        yield from _of_job("daskllm_worker_", label, counts)


def of_scheduler(board: Board, now: float) -> Iterator[Sample]:
    """What a scheduler's ``/metrics`` says.

    Args:
        now: seconds of the epoch.
    """
    for view in board.workers.values():
        spent = {phase: view.sums.get(phase, 0.0) for phase in (*PHASES, "idle")}
        yield from _of_engines("daskllm_", (view.name,), view.engines, spent)
    for job in board.jobs.values():
        yield from _of_job("daskllm_", job.label, job.sums)
        state = job.state(now)
        yield "daskllm_recomputed_rows", (job.label,), job.sums["recomputed"]
        yield "daskllm_job_priority", (job.label,), job.priority
        for name, tasks in (("running", job.running), ("waiting", job.waiting)):
            yield "daskllm_job_tasks", (job.label, name), tasks
        if state.total_rows is not None:
            yield "daskllm_job_rows", (job.label,), state.total_rows
        if state.eta is not None:
            left = 0.0 if job.status(now) == "done" else state.eta
            yield "daskllm_job_eta_seconds", (job.label,), left
    yield "daskllm_steals", (), board.steals
    yield "daskllm_workers", (), sum(bool(view.engines) for view in board.workers.values())
    yield "daskllm_lost_workers", (), board.losses


def _seconds(engines: Iterable[EngineFigures]) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for engine in engines:
        for phase in PHASES:
            sums[phase] += getattr(engine, f"{phase}_seconds")
        sums["idle"] += engine.idle_seconds
    return sums


def _of_engines(
    prefix: str, labels: tuple[str, ...], engines: Iterable[EngineFigures], seconds: dict[str, float]
) -> Iterator[Sample]:
    engines = list(engines)
    for name, field in (
        ("prompt_tokens", "prompt_tokens"),
        ("output_tokens", "output_tokens"),
        ("batch_sequences", "running"),
        ("batch_room", "room"),
        ("waiting_sequences", "waiting"),
        ("kv_blocks_used", "kv_used"),
        ("kv_blocks", "kv_blocks"),
    ):
        yield prefix + name, labels, sum(getattr(engine, field) for engine in engines)
    for phase, spent in seconds.items():
        yield f"{prefix}engine_seconds", (*labels, phase), spent
    held: Counter[tuple[str, str, str]] = Counter()
    for engine in engines:
        held["resident_bytes", engine.model, engine.stage] += engine.resident_bytes
        held["layers", engine.model, engine.stage] += engine.layer_count
    for (name, model, stage), size in held.items():
        yield prefix + name, (*labels, model, stage), size


def _of_job(prefix: str, label: str, counts: Counter[str]) -> Iterator[Sample]:
    for name, counted in (
        ("rows", "rows"),
        ("remembered_rows", "remembered"),
        ("job_prompt_tokens", "prompt_tokens"),
        ("job_output_tokens", "output_tokens"),
    ):
        yield prefix + name, (label,), counts[counted]
    for counted, rows in counts.items():
        if counted.startswith("error:"):
            yield f"{prefix}failed_rows", (label, counted.partition(":")[2]), rows


# --- Prometheus' own registry, one for each process ---------------------------------------------------------

_sources: dict[str, Callable[[], Iterable[Sample]]] = {}
_registered: list[Any] = []


def show_worker(worker: Worker) -> None:
    """Have a worker's ``/metrics`` say what `of_worker` does."""
    _show(worker.id, lambda: of_worker(worker))


def show_scheduler(scheduler: Scheduler, board: Board) -> None:
    """Have a scheduler's ``/metrics`` say what `of_scheduler` does."""
    _show(scheduler.id, lambda: of_scheduler(board, time.time()))


def hide(server: Worker | Scheduler) -> None:
    """Say no more of it."""
    _sources.pop(server.id, None)


def _show(name: str, samples: Callable[[], Iterable[Sample]]) -> None:
    try:
        from prometheus_client import REGISTRY
    except ImportError:
        return
    _sources[name] = samples
    if not _registered:
        _registered.append(_Collector())
        REGISTRY.register(_registered[0])


class _Collector:
    """All that is shown in this process: several workers may share one, and no series may come twice."""

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        sums: defaultdict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        for samples in list(_sources.values()):
            for name, labels, value in samples():
                sums[name][labels] = sums[name].get(labels, 0) + value
        for metric in METRICS:
            if metric.name in sums:
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                found = family(metric.name, metric.says, labels=metric.labels)
                for labels, value in sums[metric.name].items():
                    found.add_metric(labels, value)
                yield found
