"""Counters of what an engine has done; plain numbers that any front end may read while it runs."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, fields

__all__ = ["EngineMetrics", "StepRecord"]

_HISTORY = 4096


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
    """

    time: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    callers: int
    blocks_used: int


@dataclass(slots=True)
class EngineMetrics:
    """Totals since the engine began, and its latest steps.

    Attributes:
        busy_seconds: in steps.
        remembered: rows that were answered without the engine.
        waiting_seconds: between two steps; before the first, nothing has to be waited for.

    Example:
        >>> metrics = EngineMetrics()
        >>> metrics.totals()["steps"]
        0
    """

    steps: int = 0
    busy_seconds: float = 0.0
    waiting_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    output_tokens: int = 0
    sequences: int = 0
    preemptions: int = 0
    aborted: int = 0
    remembered: int = 0
    history: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=_HISTORY))

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

    def totals(self) -> dict[str, float]:
        """Everything but the history, as one flat dict."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "history"}

    def fill(self, seconds: float = float("inf")) -> float:
        """Mean number of sequences in the batch over the last ``seconds`` (0 without a step)."""
        since = time.monotonic() - seconds
        sizes = [step.running for step in list(self.history) if step.time >= since]
        return sum(sizes) / len(sizes) if sizes else 0.0
