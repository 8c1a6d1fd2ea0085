"""A row on its way through the engine, what became of it, and the news of many of them.

A row knows its ids or its error, and the ticket of what was asked of the engine; nothing here asks the engine
for anything but how far it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from daskllm.engine.engine import Engine, Ticket
from daskllm.engine.sequence import Sample
from daskllm.metrics import Progress, error_kind
from daskllm.results import Embedding, Score
from daskllm.text.watch import TextWatcher
from daskllm.types import Completion, SamplingParams

__all__ = ["Follower", "Row", "embedding_of", "score_of"]


@dataclass(slots=True)
class Row:
    """A prompt on its way: its ids or its error, and the ticket of what was asked of the engine."""

    ids: Sequence[int] = ()
    error: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    ticket: Ticket | None = None
    watchers: list[TextWatcher] = field(default_factory=list)
    answer: list[Completion] | None = None

    @property
    def over(self) -> bool:
        """Whether it has come to its own end, which a step that broke is not."""
        return self.ticket is None or (self.ticket.done and self.ticket.failure is None)

    @property
    def samples(self) -> list[Sample]:
        """Those that are done."""
        return [] if self.ticket is None else [s for s in self.ticket.samples if s is not None]


class Follower:
    """Counts rows as they come to an end and reports the difference, and hands them out."""

    def __init__(
        self,
        rows: Sequence[Row],
        engine: Engine,
        progress: Callable[[Progress], None] | None,
        finished: Callable[[Sequence[tuple[int, Row]]], None] | None,
    ) -> None:
        self._open, self._progress, self._finished = list(enumerate(rows)), progress, finished
        self._engine = engine
        self._caller = next((row.ticket.request.caller for row in rows if row.ticket is not None), None)

    def report(self) -> None:
        """Report and hand out the rows that have ended since the last time."""
        if self._progress is None and self._finished is None:
            return
        over = [numbered for numbered in self._open if numbered[1].over]
        if over:
            gone = {number for number, _ in over}
            self._open = [numbered for numbered in self._open if numbered[0] not in gone]
            if self._finished is not None:
                self._finished(over)
        under_way = self._engine.under_way(self._caller) if self._open else ()
        if self._progress is None or not (over or under_way):
            return
        done = [row for _, row in over]
        samples = [s for row in done for s in row.samples]
        why = [row.error or next((s.error for s in row.samples if s.error), None) for row in done]
        self._progress(
            Progress(
                rows=len(done),
                prompt_tokens=sum(len(row.ids) for row in done),
                output_tokens=sum(len(s.token_ids) for s in samples),
                errors=sum(message is not None for message in why),
                ended=tuple(len(s.token_ids) for s in samples if s.error is None),
                under_way=under_way,
                costs=self._engine.metrics.costs(),
                kinds=tuple(Counter(map(error_kind, filter(None, why))).items()),
                # A row's other samples begin on the first one's prompt.
                reused_tokens=sum(row.samples[0].reused for row in done if row.samples),
            )
        )


def score_of(row: Row) -> Score:
    """The score of a row that has ended; NaN with its error where it failed."""
    sample, error = _outcome(row)
    if sample is None or sample.scores is None:
        return Score(float("nan"), (), len(row.ids), error)
    return Score(float(np.sum(sample.scores)), sample.scores, len(row.ids))


def embedding_of(row: Row, hidden: int, normalize: bool) -> Embedding:
    """The embedding of a row that has ended, ``[hidden]``; NaN with its error where it failed."""
    sample, error = _outcome(row)
    if sample is None or sample.pooled is None:
        return Embedding.failed(error or "the row was not run", hidden, len(row.ids))
    return Embedding.of(sample.pooled, len(row.ids), normalize)


def _outcome(row: Row) -> tuple[Sample | None, str | None]:
    """The one sample of a row that is done, or why it failed."""
    sample = None if row.ticket is None else row.ticket.samples[0]
    error = row.error if sample is None else sample.error
    return (sample if error is None else None), error
