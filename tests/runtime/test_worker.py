"""What tasks do on a worker: two in flight, and none that nobody wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.bag as db
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from daskllm import machine
from daskllm.llm import load
from daskllm.runtime.process import open_session_on, session_for
from daskllm.runtime.worker import ROWS_IN_HAND, current_task, current_worker
from tests.fake_session import FakeLLM, FakeSession
from tests.tiny import make_model
from tests.waiting import eventually

pytestmark = pytest.mark.cluster


def frame(npartitions: int, rows: int = 1) -> Any:
    return dd.from_map(_part, range(npartitions), rows=rows)


def _part(number: int, rows: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"part {number}", *(f"part {number} row {i}" for i in range(1, rows))]})


def test_outside_a_worker_there_is_no_task() -> None:
    assert current_worker() is None
    assert current_task() is None


def test_a_one_thread_worker_has_so_many_rows_in_hand_and_no_more(gated: FakeLLM, one_thread: Client) -> None:
    scheduler, half = one_thread.cluster.scheduler, ROWS_IN_HAND // 2
    future = one_thread.compute(frame(6, half).llm.generate(gated, "text", max_tokens=1))
    session = gated.session()
    eventually(lambda: session.running == 2)
    # What is not in flight is not even on the worker, or is there to be stolen.
    (worker,) = scheduler.workers.values()
    eventually(lambda: len(worker.long_running) == 1)
    assert sum(task.state == "queued" for task in scheduler.tasks.values()) >= 3
    Path(str(gated.spec.gate)).touch()
    assert len(future.result()) == 6 * half
    assert session.most_running == 2
    assert gated.rows == 6 * half


def test_more_rows_are_in_hand_where_the_engine_runs_more_together(
    gated: FakeLLM, one_thread: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = ROWS_IN_HAND // 2
    # Of those it should have 1.5 times as many.
    monkeypatch.setattr(FakeSession, "rows_together", ROWS_IN_HAND)
    future = one_thread.compute(frame(6, half).llm.generate(gated, "text", max_tokens=1))
    session = gated.session()
    eventually(lambda: session.running == 3)
    Path(str(gated.spec.gate)).touch()
    assert len(future.result()) == 6 * half
    assert session.most_running == 3


def test_partitions_of_few_rows_are_in_flight_together(gated: FakeLLM, one_thread: Client) -> None:
    future = one_thread.compute(frame(6).llm.generate(gated, "text"))
    session = gated.session()
    eventually(lambda: session.running == 6)
    Path(str(gated.spec.gate)).touch()
    assert len(future.result()) == 6


def test_the_next_task_leaves_the_pool_when_the_first_is_done(gated: FakeLLM, one_thread: Client) -> None:
    half = ROWS_IN_HAND // 2
    frames = [frame(1, half).llm.generate(gated, "text", max_tokens=n) for n in (1, 2, 3)]
    first, second, third = one_thread.compute(frames)
    session = gated.session()
    eventually(lambda: session.running == 2)
    (worker,) = one_thread.cluster.scheduler.workers.values()
    eventually(lambda: len(worker.long_running) == 1)
    # The slice that left the pool is of the future that waits for it.
    waiting = {merge.key for task in worker.long_running for merge in task.dependents}
    (left,) = [future for future in (first, second, third) if future.key in waiting]
    left.cancel()
    eventually(lambda: gated.rows == 3 * half and session.running == 2)
    Path(str(gated.spec.gate)).touch()
    assert session.most_running == 2


def test_a_cancelled_future_stops_its_rows(gated: FakeLLM, one_thread: Client) -> None:
    future = one_thread.compute(frame(1).llm.generate(gated, "text"))
    session = gated.session()
    eventually(lambda: session.running == 1)
    future.cancel()
    assert session.interrupted.wait(30)
    eventually(lambda: session.running == 0)
    Path(str(gated.spec.gate)).touch()
    again = one_thread.compute(frame(1).llm.generate(gated, "text"))
    assert list(again.result()["generated"]) == ["<part 0>"]


def test_rows_over_a_client_are_cancelled_with_their_call(gated: FakeLLM, one_thread: Client) -> None:
    from daskllm.runtime.call import Call
    from daskllm.runtime.cluster import over_rows
    from daskllm.runtime.tasks import answer_rows

    call = Call(spec=gated.spec, kind="generate")  # type: ignore[arg-type]
    session = gated.session()

    class Interrupting(Client):
        """As if the user interrupted while waiting."""

        def gather(self, *args: Any, **kwargs: Any) -> Any:
            eventually(lambda: session.running)
            raise KeyboardInterrupt

    with Interrupting(one_thread.cluster) as client, pytest.raises(KeyboardInterrupt):
        over_rows(client, answer_rows, [("a",), ("b",)], call)
    assert session.interrupted.wait(30)


def test_children_of_the_processes_scheduler_share_the_machine(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_NUM_WORKERS", "1000")  # the configuration that a child starts with
    bag = db.from_sequence([fake.spec], npartitions=1).map(_processes_here)
    assert bag.compute(scheduler="processes", num_workers=1) == [1000]


def _processes_here(spec: Any) -> int:
    session_for(spec)
    return machine._share.processes


def test_a_worker_that_joins_late_answers(fake: FakeLLM) -> None:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(open_session_on, fake.spec)
        (first,) = client.nthreads()
        cluster.scale(2)
        client.wait_for_workers(2, timeout=30)
        (late,) = set(client.nthreads()) - {first}
        out = client.compute(frame(1).llm.generate(fake, "text"), workers=[late])
        assert list(out.result(timeout=30)["generated"]) == ["<part 0>"]
        assert [list(holders) for holders in client.who_has(out).values()] == [[late]]


def test_a_cancelled_future_gives_its_kv_memory_back(tmp_path: Path, one_thread: Client) -> None:
    path = make_model("llama-gqa", tmp_path / "model")
    llm = load(path, client=one_thread, kv_memory="1 MiB")
    try:
        engine = llm.session().engine  # the worker is in this process
        pool = engine.batcher.pool
        # Prompts beyond what the engine can hold at once, so that they are still running when cancelled.
        table = pd.DataFrame({"text": [f"row {i}" for i in range(5000)]})
        future = one_thread.compute(
            dd.from_pandas(table, npartitions=1).llm.generate(llm, "text", max_tokens=200, ignore_eos=True)
        )
        eventually(lambda: pool.used > 0)
        future.cancel()
        eventually(lambda: pool.used == 0)
        assert not engine._tickets
        assert engine.metrics.aborted > 0
        assert llm.generate("row", max_tokens=3, ignore_eos=True).completion_tokens == 3
    finally:
        llm.close()


def test_worker_processes_share_the_cores(fake: FakeLLM, two_processes: Client) -> None:
    two_processes.run(open_session_on, fake.spec)
    cores = two_processes.run(machine.cores)
    assert len(cores) == 2
    assert set(cores.values()) == {max(1, machine.cores() // 2)}
