"""What is known of a cluster's models and jobs at this moment, gathered from what workers tell.

It owns the sums, the rates and the history that a page or Prometheus shows, of jobs and workers that are gone
too. Time is given to it. It refuses to know how messages come and how figures are shown.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from daskllm.dashboard.engines import PHASES, EngineFigures
from daskllm.jobs.eta import Eta, State
from daskllm.runtime.progress import Increment
from daskllm.types import SamplingParams

__all__ = ["Board", "Job", "JobStatus", "Moment", "WorkerView"]

HISTORY_SECONDS = 600
"""How far back the lines go, at one point a second."""
_RATE_SECONDS = 2.0
"""That a rate is told from: of less, it jumps with what the scheduler happened to hear of last."""
_JOBS = 32
_LOST = 20
_OVER_SECONDS = 2.0
"""A job that has no tasks and has been silent so long is over."""
_FORGET_SECONDS = 60.0
"""One that has been silent so long does not need to know its tasks any more."""

JobStatus = Literal["running", "waiting", "done"]
Parts = Callable[[], Collection[int]]


@dataclass(frozen=True, slots=True)
class Moment:
    """One point of the lines: tokens per second of all workers, and sequences in their batches."""

    time: float
    prompt_rate: float
    output_rate: float
    running: int
    workers: int


@dataclass
class WorkerView:
    """One worker.

    Attributes:
        seen: when it last told, seconds of its clock.
        prompt_rate, output_rate: tokens per second.
        shares: part of the latest time that went to "prefill", "decode" and "stage"; the rest is idle.
        sums: prompt and output tokens, and seconds for each phase and "idle", since it was first seen.
    """

    address: str
    name: str
    engines: Sequence[EngineFigures] = ()
    seen: float = 0.0
    prompt_rate: float = 0.0
    output_rate: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    _looks: deque[tuple[float, dict[str, float]]] = field(default_factory=deque)

    def take(self, engines: Sequence[EngineFigures], time: float) -> None:
        """What it told at a time; the same again changes nothing."""
        self.engines, self.seen = engines, time
        now = _sums(engines)
        if self._looks and time <= self._looks[-1][0]:
            return
        if self._looks:
            for name, count in _passed(self._looks[-1], (time, now)).items():
                self.sums[name] = self.sums.get(name, 0.0) + count
        self._looks.append((time, now))
        while len(self._looks) > 2 and time - self._looks[1][0] >= _RATE_SECONDS:
            self._looks.popleft()
        if len(self._looks) > 1:
            new = _passed(self._looks[0], self._looks[-1])
            seconds = time - self._looks[0][0]
            self.prompt_rate, self.output_rate = new["prompt"] / seconds, new["output"] / seconds
            spent = sum(new[phase] for phase in (*PHASES, "idle"))  # a step may have begun before
            self.shares = {phase: new[phase] / spent for phase in PHASES}

    def of_all(self, name: str) -> int:
        """The sum of a count over its engines.

        >>> engines = [EngineFigures("m", room=64), EngineFigures("n", room=64)]
        >>> WorkerView("tcp://a", "a", engines).of_all("room")
        128
        """
        return sum(getattr(engine, name) for engine in self.engines)


def _passed(
    before: tuple[float, dict[str, float]], after: tuple[float, dict[str, float]]
) -> dict[str, float]:
    """What came to the sums, and what was idle; an engine that was closed takes its sums with it."""
    new = {name: max(0.0, count - before[1][name]) for name, count in after[1].items()}
    new["idle"] = max(0.0, after[0] - before[0] - sum(new[phase] for phase in PHASES))
    return new


def _sums(engines: Sequence[EngineFigures]) -> dict[str, float]:
    return {
        "prompt": sum(e.prompt_tokens for e in engines),
        "output": sum(e.output_tokens for e in engines),
        **{phase: sum(getattr(e, f"{phase}_seconds") for e in engines) for phase in PHASES},
    }


@dataclass
class Job:
    """The rows of one label, see `Increment.label`: of one table, or of all that is in a span.

    Attributes:
        counts: of the present run; ``rows``, ``errors``, ``remembered``, ``recomputed``, ``prompt_tokens``,
            ``output_tokens`` and ``error:KIND``.
        sums: the same of all its runs.
        running, waiting: its tasks.
        seen: when it was last heard of.
    """

    label: str
    priority: int = 0
    running: int = 0
    waiting: int = 0
    seen: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    _etas: dict[str, Eta] = field(default_factory=dict)
    _ran: set[int] = field(default_factory=set)
    _again: set[int] = field(default_factory=set)
    _over: bool = False

    def take(self, new: Increment, parts: Parts, now: float) -> None:
        """One event of its tasks.

        Args:
            parts: gives the numbers of its table's partitions, as far as they are known; asked once.
        """
        if new.cut_rows and (self._over or (self._answered(now) and not (self.running or self.waiting))):
            self.counts, self._etas, self._ran, self._again = Counter(), {}, set(), set()
        self._over = False
        self.seen, self.priority = now, new.priority
        eta = self._etas.get(new.job)
        if eta is None:
            eta = self._etas[new.job] = Eta(_params(new), None, parts())
        eta.take(new, now)
        counted = Counter({name: getattr(new, name) for name in _COUNTED if getattr(new, name)})
        counted.update({f"error:{kind}": rows for kind, rows in new.kinds})
        counted["recomputed"] = self._recomputed(new)
        for sums in (self.counts, self.sums):
            sums.update(counted)

    def _recomputed(self, new: Increment) -> int:
        """Of the rows that an event tells of, those that a task answered with the model for a second time."""
        task = hash(new.task)
        if new.begun_rows:
            (self._again if task in self._ran else self._ran).add(task)
        return max(0, new.rows - new.remembered) if task in self._again else 0

    def queue(self, running: int, waiting: int, now: float) -> None:
        """Its tasks at this moment."""
        self.running, self.waiting = running, waiting
        # Quick tasks may all have come since the last look: what was just heard of is not over.
        self._over = not (running or waiting) and now - self.seen > _OVER_SECONDS
        if self._over and now - self.seen > _FORGET_SECONDS:
            self._ran.clear()
            self._again.clear()

    def _answered(self, now: float) -> bool:
        """Whether all its rows are answered, as far as they are known."""
        state = self.state(now)
        return state.total_rows is not None and state.rows >= state.total_rows > 0

    def status(self, now: float) -> JobStatus:
        """Where it stands."""
        if self._over or self._answered(now):
            return "done"
        return "waiting" if self.waiting and not self.running else "running"

    def state(self, now: float) -> State:
        """How far it is; of several columns of answers together, the longest time left."""
        states = [eta.state(now) for eta in self._etas.values()]
        totals = [state.total_rows for state in states]
        etas = [state.eta for state in states]
        shares = [state.share for state in states if state.share is not None]
        return State(
            rows=sum(state.rows for state in states),
            total_rows=None if not totals or None in totals else sum(t for t in totals if t is not None),
            errors=self.counts["errors"],
            remembered=self.counts["remembered"],
            prompt_tokens=sum(state.prompt_tokens for state in states),
            output_tokens=sum(state.output_tokens for state in states),
            tokens_per_second=sum(state.tokens_per_second for state in states),
            seconds=max((state.seconds for state in states), default=0.0),
            share=sum(shares) / len(states) if shares else None,
            eta=None if not etas or None in etas else max(eta for eta in etas if eta is not None),
        )


_COUNTED = ("rows", "errors", "remembered", "prompt_tokens", "output_tokens")


def _params(new: Increment) -> SamplingParams | None:
    if new.asks is None:
        return None
    tokens, samples, fixed = new.asks
    return SamplingParams(max_tokens=tokens, n=samples, ignore_eos=fixed)


class Board:
    """The figures of one cluster.

    Attributes:
        workers: by address, those that are there.
        jobs: by label, the latest last.
        history: `Moment` after `Moment`.
        steals: tasks of rows that went from one worker to another before they began.
        lost: (seconds of the epoch, name) of workers that left while they held a model, the latest last.
        losses: how many there were.
    """

    def __init__(self) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.jobs: dict[str, Job] = {}
        self.history: deque[Moment] = deque(maxlen=HISTORY_SECONDS)
        self.steals = self.losses = 0
        self.lost: deque[tuple[float, str]] = deque(maxlen=_LOST)
        self._gone: dict[str, float] = {}

    def take_worker(self, address: str, name: str, engines: Sequence[EngineFigures], time: float) -> None:
        """What a worker told."""
        view = self.workers.get(address)
        if view is None:
            view = self.workers[address] = WorkerView(address, name)
        view.take(engines, time)

    def drop_worker(self, address: str, time: float) -> None:
        """A worker is gone."""
        view = self.workers.pop(address, None)
        if view is not None:
            self._gone = {n: self._gone.get(n, 0) + view.sums.get(n, 0) for n in {*self._gone, *view.sums}}
            if view.engines:
                self.losses += 1
                self.lost.append((time, view.name))

    def take(self, new: Increment, parts: Parts, now: float) -> None:
        """What a task told; ``parts`` as for `Job.take`."""
        label = new.label
        job = self.jobs.get(label)
        if job is None:
            job = self.jobs[label] = Job(label)
            while len(self.jobs) > _JOBS:
                idle = (name for name, one in self.jobs.items() if one.status(now) == "done")
                del self.jobs[next(idle, next(iter(self.jobs)))]
        job.take(new, parts, now)

    def queue(self, tasks: Mapping[str, tuple[int, int]], now: float) -> None:
        """The tasks of jobs by their labels, (running, waiting)."""
        for label, job in list(self.jobs.items()):
            job.queue(*tasks.get(label, (0, 0)), now)
            if not job.sums and label not in tasks:
                del self.jobs[label]  # it waited under a name that was not yet known to be another's
        for label, (running, waiting) in tasks.items():
            if label not in self.jobs:
                self.jobs[label] = Job(label, running=running, waiting=waiting, seen=now)

    def sample(self, now: float) -> None:
        """Add this moment to the history."""
        views = self.workers.values()
        self.history.append(
            Moment(
                now,
                sum(view.prompt_rate for view in views),
                sum(view.output_rate for view in views),
                sum(view.of_all("running") for view in views),
                len(views),
            )
        )

    def total(self, name: str) -> float:
        """A sum of `WorkerView.sums` over all workers that are or were here."""
        return self._gone.get(name, 0) + sum(view.sums.get(name, 0) for view in self.workers.values())

    def counted(self, name: str) -> int:
        """A sum of `Job.sums` over all jobs."""
        return sum(job.sums[name] for job in self.jobs.values())

    def errors(self) -> dict[str, int]:
        """Rows that failed, by kind, the most frequent first."""
        kinds: Counter[str] = Counter()
        for job in self.jobs.values():
            kinds.update({n.partition(":")[2]: c for n, c in job.sums.items() if n.startswith("error:")})
        return dict(kinds.most_common())

    def engines(self) -> Iterator[tuple[WorkerView, EngineFigures]]:
        """Every engine or stage with its worker, by worker."""
        for view in sorted(self.workers.values(), key=lambda one: one.name):
            for engine in sorted(view.engines, key=lambda one: (one.model, one.stage)):
                yield view, engine
