"""A few of a table's rows really run, so that what the rest takes can be told.

It owns how seconds are told from tokens. It refuses to know where the rows come from, and keeps no answer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from daskllm.metrics import EngineMetrics, Progress, StepCosts
from daskllm.runtime.call import Call, Place
from daskllm.runtime.process import using

if TYPE_CHECKING:
    from daskllm.session import Session

__all__ = ["Trial", "trial_of"]

_STEP_TOKENS = 512
"""Prompt tokens of a step, at most, as the engine has it: a table of prompts alone takes steps too."""


@dataclass(frozen=True)
class Trial:
    """What came of some rows on one engine.

    Attributes:
        rows: that ended.
        seconds: that they were given, or took.
        prompt_tokens: of those that ended.
        ended: length -> how many samples ended with so many tokens.
        under_way: tokens of those that the clock stopped.
        costs: of the engine's steps; None where it does not say.
        batch: how many sequences ran together at most.
    """

    rows: int
    seconds: float
    prompt_tokens: int
    ended: Counter[int]
    under_way: tuple[int, ...]
    costs: StepCosts | None
    batch: int

    def expected_seconds(self, rows: float, prompt_tokens: float, output_tokens: float) -> float | None:
        """How long so many rows with so many tokens would take this engine; None where nothing ended."""
        if self.costs is not None:
            batch = max(1.0, min(float(self.batch), rows))
            steps = max(output_tokens / batch, prompt_tokens / _STEP_TOKENS)
            costs = self.costs
            return (
                costs.step * steps + costs.prefill_token * prompt_tokens + costs.decode_token * output_tokens
            )
        return self.seconds * rows / self.rows if self.rows else None


def trial_of(rows: Sequence[tuple[tuple[Any, ...], Place]], call: Call, seconds: float) -> Trial:
    """Run rows on this process's engine, stopped by the clock where they take longer.

    Args:
        rows: (cells, place) of each.
        seconds: after which they are stopped; what was done until then counts.
    """
    with using(call.spec) as session:
        return _Run(session, call, seconds).trial(rows)


class _Run:
    def __init__(self, session: Session, call: Call, seconds: float) -> None:
        self._session, self._call, self._limit = session, call, seconds
        self._ended: Counter[int] = Counter()
        self._last = Progress(0, 0, 0, 0)
        self._rows = self._prompt_tokens = 0
        self._begun = 0.0

    def trial(self, rows: Sequence[tuple[tuple[Any, ...], Place]]) -> Trial:
        call = self._call
        prompts = call.prompts([cells for cells, _ in rows], self._session.tokenizer)
        self._warm_up(prompts[:1])
        first = self._session.metrics.steps
        self._begun = time.perf_counter()
        told: dict[str, Any] = {"progress": self._take, "cancelled": self._late}
        try:
            if call.kind == "score":
                self._session.score(prompts, **told)
            elif call.kind == "embed":
                self._session.embed(prompts, pooling=call.pooling, **told)
            else:
                places = [place for _, place in rows]
                self._session.generate(prompts, call.params, job_seed=call.job_seed, places=places, **told)
        except InterruptedError:
            pass
        seconds = time.perf_counter() - self._begun
        costs, batch = self._costs(first)
        return Trial(
            rows=self._rows,
            seconds=seconds,
            prompt_tokens=self._prompt_tokens,
            ended=self._ended,
            under_way=tuple(generated for _, generated in self._last.under_way),
            costs=costs,
            batch=batch,
        )

    def _warm_up(self, prompts: Sequence[Any]) -> None:
        """What is slow once shall not count."""
        if self._call.generates:
            params = self._call.params
            few = params.with_(max_tokens=2, min_tokens=min(params.min_tokens, 2))
            self._session.generate(prompts, few)

    def _costs(self, first: int) -> tuple[StepCosts | None, int]:
        """Of the steps since; those of an engine elsewhere as it told of them last."""
        metrics = self._session.metrics
        steps = list(metrics.history)[-(metrics.steps - first) :] if metrics.steps > first else []
        if not steps:
            return self._last.costs, max(len(self._last.under_way), 64)
        fit = EngineMetrics()
        for step in steps:
            fit.record(step)
        return fit.costs(), max(step.running for step in steps)

    def _take(self, progress: Progress) -> None:
        self._ended.update(progress.ended)
        self._rows += progress.rows
        self._prompt_tokens += progress.prompt_tokens
        self._last = progress

    def _late(self) -> bool:
        late = time.perf_counter() - self._begun > self._limit
        return late and (self._rows > 0 or self._session.metrics.steps > 0)
