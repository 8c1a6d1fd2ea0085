from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
import dask.bag as db
import dask.dataframe as dd
import pandas as pd
import pytest

from daskllm.llm import LLM
from daskllm.runtime.process import session_for
from tests.fake_session import FakeLLM
from tests.waiting import eventually


def _broken(part: pd.DataFrame, spec: Any) -> pd.DataFrame:
    eventually(lambda: session_for(spec).running)  # type: ignore[attr-defined]
    raise OSError("the disk is gone")


def test_an_error_elsewhere_in_a_run_stops_the_rows(gated: FakeLLM) -> None:
    table = pd.DataFrame({"text": ["a", "b"]})
    answered = dd.from_pandas(table, npartitions=1).llm.generate(gated, "text")
    broken = dd.from_pandas(table, npartitions=1).map_partitions(_broken, gated.spec, meta=table)
    with pytest.raises(OSError, match="disk"):
        dd.concat([answered, broken]).compute(scheduler="threads", num_workers=2)
    assert gated.session().interrupted.wait(30)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where these tests were begun in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_stops_the_rows(gated: FakeLLM, interrupts: None) -> None:
    out = dd.from_pandas(pd.DataFrame({"text": list("abcd")}), npartitions=2).llm.generate(gated, "text")
    session = gated.session()

    def interrupt() -> None:
        eventually(lambda: session.running == 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        out.compute(scheduler="threads", num_workers=2)
    assert session.interrupted.wait(30)


@dask.delayed
def _waiting(until: threading.Event, entered: threading.Event) -> None:
    entered.set()
    assert until.wait(30)


def _interrupted(gated: FakeLLM, max_tokens: int) -> None:
    """A run of rows that fails elsewhere stops its rows."""
    table = pd.DataFrame({"text": ["a", "b"]})
    frame = dd.from_pandas(table, npartitions=1)
    answered = frame.llm.generate(gated, "text", max_tokens=max_tokens)
    broken = frame.map_partitions(_broken, gated.spec, meta=table)
    session = gated.session()
    session.interrupted.clear()
    with pytest.raises(OSError, match="disk"):
        dd.concat([answered, broken]).compute(scheduler="threads", num_workers=2)
    assert session.interrupted.wait(30)
    eventually(lambda: session.running == 0)


def test_rows_stop_in_and_after_runs_that_overlap(gated: FakeLLM) -> None:
    first, second = (threading.Event(), threading.Event()), (threading.Event(), threading.Event())
    with ThreadPoolExecutor(2) as pool:
        runs = []
        for until, entered in (first, second):
            runs.append(pool.submit(_waiting(until, entered).compute, scheduler="threads"))
            assert entered.wait(30)
        # Dask's own doing: the second run found no callbacks, and would leave none behind.
        _interrupted(gated, 1)
        for (until, _), run in zip((first, second), runs, strict=True):
            until.set()
            run.result(30)
    _interrupted(gated, 2)


def test_a_bag_of_rows_stops_though_another_run_is_under_way(gated: FakeLLM) -> None:
    until, entered = threading.Event(), threading.Event()
    llm = LLM(gated.spec)  # type: ignore[arg-type]
    session = gated.session()

    @dask.delayed
    def broken() -> None:
        eventually(lambda: session.running)
        raise OSError("the disk is gone")

    bag = llm.generate(db.from_sequence(["a"], npartitions=1))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_waiting(until, entered).compute, scheduler="threads")
        assert entered.wait(30)
        with pytest.raises(OSError, match="disk"):
            dask.compute(bag, broken(), scheduler="threads", num_workers=2)
        assert session.interrupted.wait(30)
        until.set()
        other.result(30)


def test_a_run_that_cannot_begin_says_why() -> None:
    with pytest.raises(RuntimeError, match="Cycle"):
        dask.threaded.get({"a": (abs, "b"), "b": (abs, "a")}, "a")
