"""What runs inside a Dask task, or in this process when there is no cluster: rows in, answers out.

Every function here is found by its name and takes a `Call`, so that graphs hold neither closures nor models.
It refuses to know how a graph is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask.utils import key_split

from daskllm.runtime.call import Call, Place
from daskllm.runtime.costs import prompt_estimates
from daskllm.runtime.local import abandonment
from daskllm.runtime.process import using
from daskllm.runtime.progress import Reporter
from daskllm.runtime.recall import generated
from daskllm.runtime.worker import current_task
from daskllm.types import Prompt

if TYPE_CHECKING:
    from daskllm.session import Session

__all__ = ["Run", "answer_bag", "answer_rows", "plain", "watched"]


def answer_bag(items: Iterable[Any], numbers: Iterable[int], call: Call) -> list[Any]:
    """The answers to one partition of a Bag, in order; ``numbers`` holds the partition's number alone."""
    (number,) = numbers
    rows = [(item,) for item in items]
    answers = answer_rows(rows, call, [(number, row) for row in range(len(rows))])
    return [plain(answer, call) for answer in answers]


def plain(answer: Any, call: Call) -> Any:
    """What a user sees of one row's answer: a score's number or an embedding's vector (NaN where the row
    failed), one sample's `Completion`, or n of them."""
    if call.kind == "embed":
        return answer.vector
    if call.kind == "score":
        return answer.logprob if answer.error is None else float("nan")
    return answer[0] if call.params.n == 1 else answer


def answer_rows(
    rows: Sequence[Sequence[Any]], call: Call, places: Sequence[Place], job: str = "", part: int = 0
) -> Sequence[Any]:
    """For each row its `Score`, its `Embedding`, or the list of its samples, in order.

    Args:
        rows: for each row the cells of ``call.labels``.
        places: for each row where its draws start, if ``call.by_place``.
        job: whose rows they are, for those who follow.
        part: the number of the partition that they are of, likewise.

    Raises:
        InterruptedError: the Dask task that waits for the rows was cancelled, or its run given up.
        Reschedule: the Dask worker is about to close; what has finished is kept.
    """
    if not rows:
        return ()
    with watched(call, len(rows), job, part) as run:
        prompts = call.prompts(rows, run.session.tokenizer)
        estimate = int(prompt_estimates(rows, call).sum())
        run.report.add(begun_rows=len(rows), begun_estimate=estimate)
        while True:
            try:
                return _answers(run, prompts, call, places)
            except InterruptedError:
                run.hand_back()
                # A task that is cancelled and asked for again stays the same task: it is still to be done.
                if run.cancelled():
                    raise


def _answers(run: Run, prompts: list[Prompt], call: Call, places: Sequence[Place]) -> Sequence[Any]:
    if call.kind == "score":
        return run.session.score(
            prompts, priority=call.priority, progress=run.report, cancelled=run.cancelled
        )
    if call.kind == "embed":
        return run.session.embed(
            prompts,
            pooling=call.pooling,
            normalize=call.normalize,
            priority=call.priority,
            progress=run.report,
            cancelled=run.cancelled,
        )
    return generated(run.session, prompts, call, places, run.report, run.cancelled)


@dataclass(frozen=True, slots=True)
class Run:
    """Where a task's rows run; ``report`` and ``cancelled`` go to the session with them.

    ``hand_back`` raises where interrupted rows are for another worker.
    """

    session: Session
    report: Reporter
    cancelled: Callable[[], bool]
    hand_back: Callable[[], None]


@contextmanager
def watched(call: Call, rows: int, job: str = "", part: int = 0) -> Iterator[Run]:
    """This process's session, with the callbacks that tie so many rows to the task that waits for them."""
    given_up = abandonment(call)
    task = current_task()
    report = Reporter(task, job, part)

    def cancelled() -> bool:
        if task is None:
            return given_up()
        task.together = session.rows_together
        task.make_room()
        return task.cancelled() or task.leaving()

    def hand_back() -> None:
        if task is not None:
            task.hand_back()

    if task is not None:
        task.begin(rows, call.params.n, key_split(task.key).partition("-")[0] == call.kind)
    try:
        with using(call.spec) as session:
            yield Run(session, report, cancelled, hand_back)
    finally:
        try:
            report.flush()
        finally:
            if task is not None:
                task.done()
