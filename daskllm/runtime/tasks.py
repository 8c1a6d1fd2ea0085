"""What runs inside a Dask task, or in this process when there is no cluster: rows in, answers out.

Every function here is found by its name and takes a `Call`, so that graphs hold neither closures nor models.
It refuses to know how a graph is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from daskllm.runtime.call import Call, Place
from daskllm.runtime.columns import attach, cells, columns_of, labels_of
from daskllm.runtime.local import abandonment
from daskllm.runtime.process import session_for
from daskllm.runtime.progress import Reporter
from daskllm.runtime.worker import current_task
from daskllm.types import Prompt

if TYPE_CHECKING:
    from daskllm.session import Session

__all__ = ["PLACE", "answer_bag", "answer_rows", "answer_table", "number_rows", "plain"]

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
    return attach(rest, columns_of(answer_rows(cells(rest, call.labels), call, places), call))


def answer_bag(items: Iterable[Any], numbers: Iterable[int], call: Call) -> list[Any]:
    """The answers to one partition of a Bag, in order; ``numbers`` holds the partition's number alone."""
    (number,) = numbers
    rows = [(item,) for item in items]
    answers = answer_rows(rows, call, [(number, row) for row in range(len(rows))])
    return [plain(answer, call) for answer in answers]


def plain(answer: Any, call: Call) -> Any:
    """What a user sees of one row's answer: a score's number, one sample's `Completion`, or n of them."""
    if call.kind == "score":
        return answer.logprob if answer.error is None else float("nan")
    return answer[0] if call.params.n == 1 else answer


def answer_rows(rows: Sequence[Sequence[Any]], call: Call, places: Sequence[Place]) -> Sequence[Any]:
    """For each row its `Score`, or the list of its samples, in order.

    Args:
        rows: for each row the cells of ``call.labels``.
        places: for each row where its draws start, if ``call.by_place``.

    Raises:
        InterruptedError: the Dask task that waits for the rows was cancelled, or its run given up.
    """
    if not rows:
        return ()
    with _watched(call) as run:
        prompts = call.prompts(rows, run.session.tokenizer)
        while True:
            try:
                return _answers(run, prompts, call, places)
            except InterruptedError:
                # A task that is cancelled and asked for again stays the same task: it is still to be done.
                if run.cancelled():
                    raise


def _answers(run: _Run, prompts: list[Prompt], call: Call, places: Sequence[Place]) -> Sequence[Any]:
    if call.kind == "score":
        return run.session.score(prompts, progress=run.report, cancelled=run.cancelled)
    return run.session.generate(
        prompts,
        call.params,
        job_seed=call.job_seed,
        places=places,
        progress=run.report,
        cancelled=run.cancelled,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    session: Session
    report: Reporter
    cancelled: Callable[[], bool]


@contextmanager
def _watched(call: Call) -> Iterator[_Run]:
    """This process's session, with the callbacks that tie a batch to the task that waits for it."""
    given_up = abandonment(call)
    session = session_for(call.spec)
    task = current_task()
    report = Reporter(task)

    def cancelled() -> bool:
        if task is None:
            return given_up()
        task.make_room()
        return task.cancelled()

    try:
        yield _Run(session, report, cancelled)
    finally:
        try:
            report.flush()
        finally:
            if task is not None:
                task.done()


def _take_places(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Place]]:
    (label,) = labels_of([PLACE], table.columns)
    if label not in table.columns:
        return table, [(0, row) for row in range(len(table))]
    mask = (1 << _ROW_BITS) - 1
    places: list[Place] = [(place >> _ROW_BITS, place & mask) for place in table[label].tolist()]
    return table.drop(columns=[label]), places
