"""Counters of what an engine has done; plain numbers that any front end may read while it runs."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

__all__ = ["EngineMetrics", "Progress", "StepCosts", "StepRecord", "error_kind"]

_HISTORY = 4096
_FORGET = 0.998
"""What an earlier step still counts against the next in `EngineMetrics.costs`: some 500 steps matter."""
_WARM_UP = 8
"""Steps that do not count: those that touch memory and code for the first time take ten times as long."""
_RATIO_STEPS = 64
"""After so many steps it is told anew what a prompt token takes beside one that is decoded."""
_KINDS = (
    ("chat template", "chat template"),
    ("null", "null"),
    ("empty", "empty"),
    ("the model's context", "too long"),
    ("KV block", "too long"),
    ("token id", "token ids"),
    ("message", "messages"),
    ("column", "type"),
    ("a prompt is", "type"),
    ("surrogate", "not text"),
    ("no content", "empty"),
    ("was not run", "lost"),
)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds that a step takes: for itself, for each prompt token, for each token that is generated.

    Attributes:
        decoding: how many tokens were generated in a step on average.
        row: for each token that a step runs to generate one, drafts included.
    """

    step: float
    prefill_token: float
    decode_token: float
    decoding: float = 0.0
    row: float = 0.0

    @property
    def output_token(self) -> float:
        """Seconds for each token generated, its part of the step included."""
        return self.decode_token + self.step / max(1.0, self.decoding)


@dataclass(frozen=True, slots=True)
class Progress:
    """What was done for a caller since the last report, and what is under way for it.

    Attributes:
        rows: that came to an end, failed ones included.
        prompt_tokens, output_tokens: theirs.
        errors: of the rows, those that failed.
        ended: how many tokens each of their samples generated.
        under_way: of each sample in the batch how many of its prompt's tokens were read, and how many it has
            generated.
        costs: what the engine's steps took so far.
        kinds: (`error_kind`, rows) of the errors.
        reused_tokens: of the rows' prompt tokens, those whose keys and values were found instead of computed.
    """

    rows: int
    prompt_tokens: int
    output_tokens: int
    errors: int
    ended: tuple[int, ...] = ()
    under_way: tuple[tuple[int, int], ...] = ()
    costs: StepCosts | None = None
    kinds: tuple[tuple[str, int], ...] = ()
    reused_tokens: int = 0


def error_kind(message: str) -> str:
    """In a word or two what a row failed of, for counting; "other" where the message is none that is known.

    >>> error_kind("column 'text' is null"), error_kind("out of luck")
    ('null', 'other')
    """
    return next((kind for words, kind in _KINDS if words in message), "other")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of an engine.

    Attributes:
        time: when it ended, seconds of `time.monotonic`.
        seconds: how long it took.
        prefill_tokens, decode_tokens: tokens run.
        running, waiting: sequences in the batch, and behind it.
        callers: how many different callers had rows in the step.
        blocks_used: KV blocks in use.
        drafted, accepted: tokens that were guessed and run besides, and those of them that were right.
    """

    time: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    callers: int
    blocks_used: int
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class EngineMetrics:
    """Totals since the engine began, and its latest steps.

    Attributes:
        busy_seconds: in steps.
        prompt_tokens: of the prompts that came.
        reused_tokens: whose keys and values were found instead of computed, for rows taken up again too.
        remembered: rows that were answered without the engine.
        drafted_tokens, accepted_tokens: guessed, and of those the right ones, which were generated so.
        waiting_seconds: between two steps; before the first, nothing has to be waited for.
        prefill_seconds, decode_seconds: the busy ones, by what was computed in them; a step that did both
            counts for both, in the proportion of what the tokens cost.
        generated_tokens: chosen so far, those of rows under way or dropped too.

    Example:
        >>> metrics = EngineMetrics()
        >>> metrics.totals()["steps"]
        0
    """

    steps: int = 0
    busy_seconds: float = 0.0
    waiting_seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    sequences: int = 0
    preemptions: int = 0
    aborted: int = 0
    remembered: int = 0
    history: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    _sums: list[float] = field(default_factory=lambda: [0.0] * 10)
    _ratio: float = 1.0

    def record(self, step: StepRecord) -> None:
        """Add one step."""
        if self.history:
            # Steps that overlap begin before the last one ended: what one seems to wait too long, another
            # makes up for.
            self.waiting_seconds += step.time - step.seconds - self.history[-1].time
        self.steps += 1
        self.busy_seconds += step.seconds
        self.prefill_tokens += step.prefill_tokens
        self.decode_tokens += step.decode_tokens
        self.history.append(step)
        self._divide(step)
        if self.steps <= _WARM_UP:
            return
        x, y, t = step.prefill_tokens, step.decode_tokens + step.drafted, step.seconds
        new = (1.0, x, y, x * x, x * y, y * y, t, x * t, y * t, step.decode_tokens + step.accepted)
        self._sums = [_FORGET * a + b for a, b in zip(self._sums, new, strict=True)]

    def _divide(self, step: StepRecord) -> None:
        """Count a step's time for what it was spent on."""
        if step.prefill_tokens and step.decode_tokens and self.steps % _RATIO_STEPS == 0:
            costs = self.costs()
            if costs is not None and costs.prefill_token > 0 and costs.row > 0:
                self._ratio = costs.row / costs.prefill_token
        decode = self._ratio * (step.decode_tokens + step.drafted)
        share = step.prefill_tokens / (step.prefill_tokens + decode) if step.prefill_tokens else 0.0
        self.prefill_seconds += share * step.seconds
        self.decode_seconds += (1.0 - share) * step.seconds

    def costs(self) -> StepCosts | None:
        """What steps take, by least squares over those of late, none of it negative; None before the ninth.

        Example:
            >>> metrics = EngineMetrics()
            >>> for prefill, decode in [(100, 0), (0, 8), (50, 4), (0, 1)] * 4:
            ...     seconds = 0.01 + 0.001 * prefill + 0.002 * decode
            ...     metrics.record(StepRecord(0.0, seconds, prefill, decode, 1, 0, 1, 1))
            >>> costs = metrics.costs()
            >>> round(costs.step, 4), round(costs.prefill_token, 4), round(costs.decode_token, 4)
            (0.01, 0.001, 0.002)
        """
        n, x, y, xx, xy, yy, t, xt, yt, generated = self._sums
        if not t:
            return None
        step, prefill, row = _least_squares([[n, x, y], [x, xx, xy], [y, xy, yy]], [t, xt, yt])
        return StepCosts(step, prefill, row * y / generated if generated else row, generated / n, row)

    def totals(self) -> dict[str, float]:
        """Everything but the history, as one flat dict."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name != "history" and f.name[0] != "_"
        }

    def fill(self, seconds: float = float("inf")) -> float:
        """Mean number of sequences in the batch over the last ``seconds`` (0 without a step)."""
        since = time.monotonic() - seconds
        sizes = [step.running for step in list(self.history) if step.time >= since]
        return sum(sizes) / len(sizes) if sizes else 0.0


def _least_squares(a: Sequence[Sequence[float]], b: Sequence[float]) -> list[float]:
    """Factors of at least 0 that fit best, from the sums of products; tried with any of them being 0."""
    best, least = [0.0] * len(b), 0.0
    for size in range(1, len(b) + 1):
        for kept in itertools.combinations(range(len(b)), size):
            found = _solved([[a[i][j] for j in kept] for i in kept], [b[i] for i in kept])
            if found is None or min(found) < 0:
                continue
            # Of all residuals, the part that depends on the factors.
            error = -sum(value * b[i] for value, i in zip(found, kept, strict=True))
            if error < least - 1e-12 * abs(least):
                best, least = [0.0] * len(b), error
                for value, i in zip(found, kept, strict=True):
                    best[i] = value
    return best


def _solved(a: list[list[float]], b: list[float]) -> list[float] | None:
    """The solution of a small symmetric system by elimination; None where it has no certain one."""
    rows = [[*row, right] for row, right in zip(a, b, strict=True)]
    for i in range(len(rows)):
        if rows[i][i] <= 1e-9 * a[i][i]:
            return None
        for j in range(i + 1, len(rows)):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [x - factor * y for x, y in zip(rows[j], rows[i], strict=True)]
    out = [0.0] * len(rows)
    for i in reversed(range(len(rows))):
        known = sum(rows[i][j] * out[j] for j in range(i + 1, len(rows)))
        out[i] = (rows[i][-1] - known) / rows[i][i]
    return out
