"""A worker that is retired, or told to end, hands its rows in flight back; what has finished is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from daskllm.runtime.stages import StagePlugin
from tests.fake_session import FakeLLM, FakeSpec
from tests.waiting import eventually

ROWS, FINISHED = 5 * 128, 4


@pytest.fixture
def client() -> Iterator[Client]:
    """A client of two worker processes of one thread, set up as a load would."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        client.register_plugin(StagePlugin())
        yield client


def retired(client: Client, worker: str) -> None:
    client.retire_workers([worker])


def told_to_end(client: Client, worker: str) -> None:
    """What SIGTERM has ``dask worker --nanny`` do."""
    nanny = client.scheduler_info(n_workers=-1)["workers"][worker]["nanny"]

    async def close(dask_scheduler: object = None) -> None:
        from distributed.core import rpc

        with suppress(OSError):  # it is gone before it has answered
            async with rpc(nanny) as there:
                await there.terminate(reason="test")

    client.run_on_scheduler(close)


@pytest.mark.cluster
@pytest.mark.parametrize("leave", [retired, told_to_end])
def test_rows_in_flight_go_to_another_worker(
    client: Client, tmp_path: Path, leave: Callable[[Client, str], None]
) -> None:
    """The worker that leaves waits for a gate after its first rows; the gate never opens."""
    worker, pid = next(iter(client.run(os.getpid).items()))
    (tmp_path / "held").write_text(str(pid))
    spec = FakeSpec(
        log=str(tmp_path / "rows.log"),
        gate=str(tmp_path / "gate"),
        held=str(tmp_path / "held"),
        free=FINISHED,
    )
    llm = FakeLLM(spec, answers=str(tmp_path / "answers"))
    table = pd.DataFrame({"text": [f"row {i}" for i in range(ROWS)]})
    future = client.compute(dd.from_pandas(table, npartitions=5).llm.generate(llm, "text"))
    try:
        eventually(lambda: llm.processes.count(str(pid)) >= 32)
        taken = llm.processes.count(str(pid))
        leave(client, worker)
        out = future.result(timeout=60)
    finally:
        Path(str(spec.gate)).touch()
    assert out["generated"].tolist() == [f"<row {i}>" for i in range(ROWS)]
    # Each call that was in flight there had finished some rows, which nobody was asked again.
    assert llm.processes.count(str(pid)) == taken
    kept = ROWS + taken - len(llm.processes)
    assert kept >= 2 * FINISHED
    assert kept % FINISHED == 0
    eventually(lambda: worker not in client.scheduler_info(n_workers=-1)["workers"])
