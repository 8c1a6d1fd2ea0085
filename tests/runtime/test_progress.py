from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client

from daskllm.runtime import worker
from daskllm.runtime.progress import Increment, Reporter, follow
from tests.fake_session import Counts, FakeLLM

TABLE = pd.DataFrame({"text": ["a", "b", None, "c"]})


def total(heard: list[Increment]) -> tuple[int, int, int]:
    return sum(i.rows for i in heard), sum(i.output_tokens for i in heard), sum(i.errors for i in heard)


def test_those_who_follow_hear_of_rows_in_this_process(fake: FakeLLM) -> None:
    heard: list[Increment] = []
    also: list[Increment] = []
    with follow(None, heard.append), follow(None, also.append):
        TABLE.llm.generate(fake, "text")
        dd.from_pandas(TABLE, npartitions=2).llm.generate(fake, "text").compute(scheduler="threads")
    TABLE.llm.generate(fake, "text")
    assert total(heard) == (8, 18, 2)
    assert total(also) == (8, 18, 2)


def test_increments_between_two_events_are_put_together() -> None:
    heard: list[Increment] = []
    report = Reporter(None)
    with follow(None, heard.append):
        for _ in range(1000):
            report(Counts(1, 2, 3, 0))
        report.flush()
        report.flush()
    assert total(heard) == (1000, 3000, 0)
    assert len(heard) < 10


def test_what_rows_failed_of_is_told_and_whose_they_are() -> None:
    heard: list[Increment] = []
    report = Reporter(None, "generate-cut-0123456789", asks=(8, 1, False))
    with follow(None, heard.append):
        report(Counts(3, 1, 1, 2, kinds=(("null", 1), ("empty", 1))))
        report.add(rows=1, errors=1, kinds={"null": 1})
        report.flush()
        report.add(rows=1)
        report.flush()
    assert [dict(one.kinds) for one in heard] == [{"null": 2, "empty": 1}, {}]
    assert (heard[0].label, heard[0].asks) == ("generate 01234567", (8, 1, False))


def test_a_callback_is_called_one_at_a_time() -> None:
    inside, most = 0, 0

    def callback(increment: Increment) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)  # others get the interpreter
        inside -= 1

    def report_rows(_: int) -> None:
        report = Reporter(None)
        report(Counts(1, 1, 1, 0))
        report.flush()

    with follow(None, callback), ThreadPoolExecutor(8) as pool:
        list(pool.map(report_rows, range(40)))
    assert most == 1


@pytest.mark.cluster
def test_a_task_is_done_though_its_last_report_fails(
    fake: FakeLLM, one_thread: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reporter, "flush", _failing)
    monkeypatch.setattr(worker.WorkerTask, "done", lambda task: done.append(task.key))
    done: list[Any] = []
    future = one_thread.compute(dd.from_pandas(TABLE, npartitions=1).llm.generate(fake, "text"))
    with pytest.raises(OSError, match="no way out"):
        future.result(timeout=30)
    assert len(done) == 1


def _failing(report: Reporter) -> None:
    raise OSError("no way out")


@pytest.mark.cluster
def test_those_who_follow_a_client_hear_of_its_workers(fake: FakeLLM, two_processes: Client) -> None:
    heard: list[Increment] = []
    also: list[Increment] = []
    frame = dd.from_pandas(TABLE, npartitions=4)
    # Three different calls, since a cluster may still hold the answers to an earlier one.
    first, second, third = (frame.llm.generate(fake, "text", max_tokens=n) for n in (1, 2, 3))
    with follow(two_processes, heard.append):
        with follow(two_processes, also.append):
            first.compute()
        second.compute()
    third.compute()
    assert total(also) == (4, 9, 1)
    assert total(heard) == (8, 18, 2)
    assert all(increment.worker for increment in heard)
