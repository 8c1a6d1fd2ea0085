"""What runs inside a Dask task, or in this process when there is no cluster: rows in, answers out.

Every function here is found by its name and takes a `Call`, so that graphs hold neither closures nor models.
It refuses to know how a graph is built.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from daskllm.runtime.call import Call, Place
from daskllm.runtime.columns import attach, completion_columns, labels_of, score_columns
from daskllm.runtime.process import session_for
from daskllm.runtime.progress import Reporter
from daskllm.runtime.worker import current_task
from daskllm.types import Completion

if TYPE_CHECKING:
    from daskllm.session import ModelSpec, Score, Session

__all__ = [
    "PLACE",
    "answer_bag",
    "answer_table",
    "complete",
    "number_rows",
    "score",
]

PLACE = "__daskllm_place__"
"""The column that carries each row's place past a filter: partition << 32 | row, int64."""
_ROW_BITS = 32


def number_rows(table: pd.DataFrame, number: int) -> pd.DataFrame:
    """``table`` with the column `PLACE`, for the partition of that number."""
    start = number << _ROW_BITS
    return attach(table, {PLACE: range(start, start + len(table))})


def answer_table(table: pd.DataFrame, call: Call) -> pd.DataFrame:
    """``table`` with the call's columns added; its places come from the column `PLACE` where it has one."""
    rest, places = _take_places(table)
    if not len(rest):
        return attach(rest, _columns((), call, None))
    return attach(rest, _columns(_cells(rest, call.labels), call, places))


def answer_bag(rows: Sequence[Any], numbers: Sequence[int], call: Call) -> list[Any]:
    """The answers of one partition of a Bag, in order; ``numbers`` holds the partition's number alone."""
    rows = list(rows)
    (number,) = numbers
    places = [(number, row) for row in range(len(rows))]
    if call.kind == "score":
        return [one.logprob if one.error is None else float("nan") for one in score(rows, call)]
    answers = complete(rows, call, places)
    return [samples[0] for samples in answers] if call.params.n == 1 else answers


def complete(cells: Sequence[Any], call: Call, places: Sequence[Place] | None) -> list[list[Completion]]:
    """Each cell's samples, in order."""
    return _complete([(cell,) for cell in cells], call, places)


def score(cells: Sequence[Any], call: Call) -> list[Score]:
    """Each cell's score, in order."""
    return _score([(cell,) for cell in cells], call)


def _columns(rows: Sequence[Sequence[Any]], call: Call, places: Sequence[Place] | None) -> dict[str, Any]:
    if call.kind == "score":
        return score_columns(_score(rows, call), call)
    return completion_columns(_complete(rows, call, places), call)


def _complete(
    rows: Sequence[Sequence[Any]], call: Call, places: Sequence[Place] | None
) -> list[list[Completion]]:
    if not rows:
        return []
    with _watched(call.spec) as run:
        return run.session.generate(
            call.prompts(rows, run.session.tokenizer),
            call.params,
            job_seed=call.job_seed,
            places=places,
            progress=run.report,
            cancelled=run.cancelled,
        )


def _score(rows: Sequence[Sequence[Any]], call: Call) -> list[Score]:
    if not rows:
        return []
    with _watched(call.spec) as run:
        prompts = call.prompts(rows, run.session.tokenizer)
        return run.session.score(prompts, cancelled=run.cancelled, progress=run.report)


@dataclass(frozen=True, slots=True)
class _Run:
    session: Session
    report: Reporter
    cancelled: Callable[[], bool]


@contextmanager
def _watched(spec: ModelSpec) -> Iterator[_Run]:
    """This process's session, with the callbacks that tie a batch to the task that waits for it."""
    session = session_for(spec)
    task = current_task()
    report = Reporter(task)

    def cancelled() -> bool:
        if task is None:
            return False
        task.make_room()
        return task.cancelled()

    try:
        yield _Run(session, report, cancelled)
    finally:
        report.flush()
        if task is not None:
            task.done()


def _take_places(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Place]]:
    (label,) = labels_of([PLACE], table.columns)
    if label not in table.columns:
        return table, [(0, row) for row in range(len(table))]
    mask = (1 << _ROW_BITS) - 1
    places = [(place >> _ROW_BITS, place & mask) for place in table[label].tolist()]
    return table.drop(columns=[label]), places


def _cells(table: pd.DataFrame, labels: Sequence[Hashable]) -> list[tuple[Any, ...]]:
    if not labels:
        return [()] * len(table)
    return list(zip(*(table[label].tolist() for label in labels), strict=True))
