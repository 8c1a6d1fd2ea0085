"""How far a job is and when it will be done, from what its tasks tell while it runs.

Rows differ in cost, and what is done first is no fair sample of them. So work is counted in an engine's
seconds: prompt tokens and output tokens, weighted by what the steps of this run took. Prompt tokens whose
keys and values were found took nothing. What is done counts the rows under way; what is left counts prompts
as far as they are known (exactly where rows have begun, by their size where a partition was cut, else by
`Partitions`, which also tells what will be found), and answers by `Lengths` and, as far as they go with
prompts, by `Trend`. The speed is that of the last three quarters of the time, and of some seconds at least.
Nothing here is a constant of some machine or model.

It refuses to know where the events come from and how they are shown.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from daskllm import markup
from daskllm.jobs.explanation import duration
from daskllm.jobs.lengths import Lengths, Trend
from daskllm.jobs.partitions import Partitions
from daskllm.runtime.progress import Increment
from daskllm.types import SamplingParams

__all__ = ["Eta", "State"]

_LOOK_SECONDS = 0.2
_LOOKS = 512
_FORGOTTEN = 0.25
"""Part of the time that no longer counts for the speed: workers come and go."""
_LEAST_SECONDS = 5.0
"""Of the time, count in any case: rows end slice by slice, and a machine's speed changes."""
_SILENCE_SECONDS = 15.0
"""A task with rows under way tells of them a few times a second: one that is silent so long is gone."""
_AHEAD_SECONDS = 1.0
"""For so long stands what was told of partitions that are to come: that goes over all of them."""


@dataclass(frozen=True)
class State:
    """How far a job is.

    Attributes:
        rows: answered, failed ones included.
        total_rows: of the job; None where that is not known yet.
        errors, remembered: of the rows answered.
        prompt_tokens, output_tokens: read and generated, for rows under way too.
        tokens_per_second: generated, over the last three quarters of the time; 0.0 before that can be told.
        seconds: since its first event.
        share: of the work that is done, 0 to 1; None before that can be told.
        eta: seconds that are left; None before that can be told.

    Example:
        >>> print(State(50, 100, 1, 0, 10, 20, 30.0, 2.0, 0.5, 75.0))
        50 of 100 rows (50%), 20 tokens, 30 tokens/s, 1 errors, 1 min 15 s left
    """

    rows: int = 0
    total_rows: int | None = None
    errors: int = 0
    remembered: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    share: float | None = None
    eta: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same by name, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        of = "" if self.total_rows is None else f" of {self.total_rows:,}"
        left = "" if self.eta is None else f", {duration(self.eta)} left"
        share = "" if self.share is None else f" ({self.share:.0%})"
        return (
            f"{self.rows:,}{of} rows{share}, {self.output_tokens:,} tokens, {self.speed}"
            f"{self.errors:,} errors{left}"
        )

    @property
    def speed(self) -> str:
        """``"30 tokens/s, "``, and nothing where it cannot be told."""
        return f"{self.tokens_per_second:,.0f} tokens/s, " if self.tokens_per_second else ""

    def _repr_html_(self) -> str:
        return markup.progress(self.share, self)


@dataclass
class _Task:
    """A task with rows under way."""

    seen: float
    under_way: tuple[tuple[int, int], ...] = ()
    begun: Counter[str] = field(default_factory=Counter)
    rows: int = 0


_SUMMED = ("rows", "errors", "remembered", "prompt_tokens", "reused_tokens", "output_tokens")
_BEGUN = ("begun_rows", "begun_tokens", "begun_estimate")


class Eta:
    """Takes a job's increments from any thread; `state` may be asked at any time.

    Args:
        params: of its call; None where nothing is generated.
        rows: that it has, where that is known beforehand.
        parts: the numbers of its partitions, from which the rows are told otherwise.
        calls: that it makes on each row.

    Example:
        >>> eta = Eta(SamplingParams(max_tokens=10), rows=100)
        >>> eta.take(Increment(rows=25, prompt_tokens=250, output_tokens=250, task="first"))
        >>> eta.state().rows, eta.state().total_rows
        (25, 100)
    """

    def __init__(
        self,
        params: SamplingParams | None,
        rows: int | None = None,
        parts: Collection[int] | None = None,
        calls: int = 1,
    ) -> None:
        self._params, self._known_rows = params, rows
        self._total_parts, self._parts = calls * len(parts or ()), Partitions(parts or ())
        self._lock = threading.Lock()
        self._sum: Counter[str] = Counter()
        self._ended: Counter[int] = Counter()
        self._prompts, self._answers = Trend(), Trend()
        self._tasks: dict[str, _Task] = {}
        self._costs: dict[str, tuple[float, float, float]] = {}
        self._worked = (0, 0)
        self._ahead = (-math.inf, 0.0, 1.0)
        self._looks: deque[tuple[float, int, int]] = deque()
        self._first: float | None = None
        self._warm: tuple[float, int, int] | None = None

    def take(self, new: Increment, now: float | None = None) -> None:
        """Take one event.

        Args:
            now: seconds of some clock; the monotonic one unless given.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            if self._first is None and not new.cut_rows:
                self._first = now  # opening the model is no work of the rows
            for name in (*_SUMMED, *_BEGUN):
                self._sum[name] += getattr(new, name)
            self._parts.take(new)
            self._ended.update(dict(new.ended))
            generated = new.rows - new.errors - new.remembered
            self._answers.add(generated, new.prompt_tokens, new.output_tokens)
            joined = new.costs is not None and new.worker not in self._costs
            if new.costs is not None:
                self._costs[new.worker] = new.costs
            if not new.cut_rows:
                self._note(new, now)
            if joined:
                # What is slow once, in a worker's process, will not be so again; and now they are one more.
                self._warm = (now, *self._work())
            if not self._looks or now - self._looks[-1][0] >= _LOOK_SECONDS:
                self._looks.append((now, *self._work()))
                if len(self._looks) > _LOOKS:
                    self._looks = deque(list(self._looks)[::2])

    def _note(self, new: Increment, now: float) -> None:
        task = self._tasks.setdefault(new.task, _Task(now))
        task.seen, task.under_way = now, new.under_way
        task.rows += new.rows
        for name in _BEGUN:
            task.begun[name] += getattr(new, name)
        if new.begun_tokens:
            self._prompts.add(
                *(task.begun[name] for name in ("begun_rows", "begun_estimate", "begun_tokens"))
            )
        if not new.under_way and task.rows >= task.begun["begun_rows"]:
            del self._tasks[new.task]
        for name, other in list(self._tasks.items()):
            if now - other.seen > _SILENCE_SECONDS:
                # Its rows begin anew with another worker, or wait in a queue; both are as not begun.
                left = 1 - other.rows / max(1, other.begun["begun_rows"])
                for counted in _BEGUN:
                    self._sum[counted] -= round(max(0.0, left) * other.begun[counted])
                del self._tasks[name]

    def state(self, now: float | None = None) -> State:
        """How far the job is."""
        now = time.monotonic() if now is None else now
        with self._lock:
            rows, total = self._parts.answered, self._total_rows()
            if self._first is None:
                return State(total_rows=total)
            _, read, made = self._done()
            since, _, first_made = self._window(now)
            generated = self._work()[1] - first_made
            done_rows = rows if total is None else min(rows, total)
            share, eta = self._left(now) if total is not None else (None, None)
            if total is not None and rows >= total:
                share, eta = 1.0, 0.0
            return State(
                rows=done_rows,
                total_rows=total,
                errors=self._sum["errors"],
                remembered=self._sum["remembered"],
                prompt_tokens=read,
                output_tokens=made,
                tokens_per_second=generated / max(1e-9, now - since),
                seconds=now - self._first,
                share=share,
                eta=eta,
            )

    # --- what is known, under the lock ----------------------------------------------------------------------

    def _total_rows(self) -> int | None:
        if self._known_rows is not None:
            return self._known_rows
        if not self._total_parts or not self._parts.cuts:
            return None
        return round(self._parts.cut_rows * max(1.0, self._total_parts / self._parts.cuts))

    def _done(self) -> tuple[int, int, int]:
        """Rows answered by the model, tokens read and generated, rows under way included."""
        under_way = [one for task in self._tasks.values() for one in task.under_way]
        return (
            self._sum["rows"] - self._sum["remembered"],
            self._sum["prompt_tokens"] + sum(read for read, _ in under_way),
            self._sum["output_tokens"] + sum(made for _, made in under_way),
        )

    def _work(self) -> tuple[int, int]:
        """Tokens of prompts that were computed, and tokens generated; never less than before.

        What was found of a prompt is told when its row ends, and what a lost task had under way is gone.
        """
        _, read, made = self._done()
        self._worked = max(self._worked[0], read - self._sum["reused_tokens"]), max(self._worked[1], made)
        return self._worked

    def _window(self, now: float) -> tuple[float, int, int]:
        """When the time began that the speed is told from, and the work that had been done by then."""
        found = self._warm or (self._first or 0.0, 0, 0)
        first = found[0]
        begin = first + min(_FORGOTTEN * (now - first), max(0.0, now - first - _LEAST_SECONDS))
        for look in self._looks:
            if look[0] > begin:
                break
            found = look if look[0] >= first else found
        return found

    def _weights(self) -> tuple[float, float]:
        """Seconds of a prompt token and of an output token; both 1 before an engine has told."""
        if not self._costs:
            return 1.0, 1.0
        reading, making = (sum(costs[i] for costs in self._costs.values()) / len(self._costs) for i in (0, 1))
        return reading, making

    def _left(self, now: float) -> tuple[float | None, float | None]:
        """The share that is done, and the seconds that are left."""
        if now - self._ahead[0] >= _AHEAD_SECONDS:
            self._ahead = now, self._parts.size, self._parts.computed
        _, size, computed = self._ahead
        to_read, to_make, longest = self._to_do(size)
        if to_make is None:
            return None, None
        reading, making = self._weights()
        since, first_read, first_made = self._window(now)
        read, made = self._work()
        left = reading * computed * to_read + making * to_make
        done = reading * read + making * made
        latest = reading * (read - first_read) + making * (made - first_made)
        if latest <= 0 or now <= since:
            return (done / (done + left) if done + left else None), None
        eta = left * (now - since) / latest
        if self._costs and longest:
            # A row's tokens come one after the other, however few rows are left beside it.
            eta = max(eta, longest * min(costs[2] for costs in self._costs.values()))
        return done / (done + left), eta

    def _to_do(self, size: float) -> tuple[float, float | None, float]:
        """Tokens to be read, tokens to be generated (None: nobody knows yet), and of those one row's most.

        Args:
            size: estimated tokens of a prompt of a partition that was not cut.
        """
        total, known = self._total_rows() or 0, self._sum
        samples, mean, lengths, most = 0, 0.0, None, 0.0
        if self._params is not None:
            params = self._params
            samples = params.n
            fixed = params.ignore_eos and not params.stop
            under_way = [made for task in self._tasks.values() for _, made in task.under_way]
            if not self._ended and not fixed:
                return 0.0, None, 0.0
            ended: Counter[int] = Counter({params.max_tokens: 1}) if fixed else self._ended
            lengths = Lengths(ended, () if fixed else under_way, params.max_tokens)
            mean, most = lengths.mean, float(params.max_tokens)
        begun = known["begun_rows"]
        free = min(1.0, known["remembered"] / begun) if begun else 0.0
        asked = 1.0 - free
        answered, read, _ = self._done()
        running = [one for task in self._tasks.values() for one in task.under_way]
        rests = [] if lengths is None else [lengths.rest(made) for _, made in running]
        waiting = max(0.0, asked * begun - answered - len(running) / max(1, samples))
        unread = max(0.0, asked * known["begun_tokens"] - read)
        cut = max(0, self._parts.cut_rows - begun)
        uncut = max(0, total - max(self._parts.cut_rows, begun))
        estimate = uncut * size + max(0, self._parts.cut_tokens - known["begun_estimate"])
        prompts = (cut + uncut) * self._prompts.found(estimate / (cut + uncut)) if cut + uncut else 0.0
        to_read, rows = unread + asked * prompts, waiting + asked * (cut + uncut)
        if rows:
            mean = min(most, mean * self._answers.factor(to_read / rows))
        return to_read, sum(rests) + mean * samples * rows, max(rests, default=mean)
