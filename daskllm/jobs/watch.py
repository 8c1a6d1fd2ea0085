"""Following a job while it runs: a bar in a terminal or a notebook, lines in a log.

It owns which events are a job's. How far that is, is `eta`'s business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dask._expr import Expr

from daskllm.jobs.eta import Eta, State
from daskllm.jobs.explanation import duration
from daskllm.runtime.call import Call
from daskllm.runtime.progress import Increment, follow
from daskllm.runtime.slices import answer_table, cut_table

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["eta_of", "jobs_in", "progress_bar", "watching"]

logger = logging.getLogger(__name__)

_NAMED = (cut_table, answer_table)
LOG_SECONDS = 30.0
"""Between two lines of a log."""


def jobs_in(expr: Expr) -> dict[str, Call]:
    """What the increments of a table with answers will be named, with their calls."""
    plan = expr.optimize(fuse=False)
    cuts = (node for node in plan.walk() if getattr(node, "operation", None) in _NAMED)
    return {node._name: next(o for o in node.operands if isinstance(o, Call)) for node in cuts}


def eta_of(expr: Expr, rows: int | None = None, parts: Collection[int] | None = None) -> tuple[set[str], Eta]:
    """Whose increments are a table's, and what takes them.

    Where a table has several columns of answers, answers are counted that are of any of them.

    Args:
        rows: that are to be answered, where that is known.
        parts: the numbers of the partitions that are to be answered; None: all of the table's.
    """
    calls = jobs_in(expr)
    last = next(iter(calls.values()), None)
    params = last.params if last is not None and last.generates else None
    total = None if rows is None else rows * len(calls)
    parts = range(expr.npartitions) if parts is None else parts
    return set(calls), Eta(params, total, parts, len(calls))


@contextmanager
def watching(
    expr: Expr, client: Client | None, rows: int | None = None, parts: Collection[int] | None = None
) -> Iterator[Eta]:
    """How far a table's rows are, while the block computes it; a line goes to the log now and then.

    Args:
        expr: a table with answers.
        client: whose workers answer; None for this process.
        rows, parts: as for `eta_of`.

    Example:
        >>> import daskllm
        >>> from daskllm import demo
        >>> llm = daskllm.load(demo.model_path())
        >>> import dask.dataframe as dd
        >>> table = dd.from_pandas(demo.table().head(4), npartitions=1)
        >>> out = table.llm.chat(llm, "prompt", max_tokens=64)
        >>> with watching(out.expr, None) as eta:
        ...     rows = len(out.compute())
        >>> rows, eta.state().rows
        (4, 4)
    """
    jobs, eta = eta_of(expr, rows, parts)
    last = time.monotonic()

    def take(new: Increment) -> None:
        nonlocal last
        eta.take(new)
        if time.monotonic() - last > LOG_SECONDS:
            last = time.monotonic()
            logger.info("%s", eta.state())

    with follow(client, take, jobs):
        yield eta


@contextmanager
def progress_bar(eta: Eta, done: int = 0) -> Iterator[None]:
    """A bar of what ``eta`` says, in a terminal or a notebook, while the block runs.

    Args:
        done: rows that were there before.

    Example:
        >>> from daskllm.jobs.eta import Eta
        >>> with progress_bar(Eta(None, rows=10)):  # the block is what is watched
        ...     print("working")
        working
    """
    # In a notebook it looks for widgets, and complains where there are none; not for the import of daskllm.
    from tqdm.auto import tqdm

    over = threading.Event()
    with tqdm(unit="row", dynamic_ncols=True, bar_format=_FORMAT) as bar:

        def show() -> None:
            while not over.wait(0.5):
                _show(bar, eta.state(), done)

        shower = threading.Thread(target=show, name="daskllm-progress", daemon=True)
        shower.start()
        try:
            yield
        finally:
            over.set()
            shower.join()
            _show(bar, eta.state(), done)


_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def _show(bar: Any, state: State, done: int) -> None:
    bar.total = None if state.total_rows is None else done + state.total_rows
    bar.n = done + state.rows
    left = "" if not state.eta else f", {duration(state.eta)} left"
    bar.set_postfix_str(f"{state.speed}{state.errors:,} errors{left}")
