"""Workers that come and go in the middle of a table: the same table as undisturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster, Worker

import daskllm
from daskllm.llm import LLM
from daskllm.runtime.process import session_for
from daskllm.runtime.progress import Increment, follow
from daskllm.types import ModelSpec
from tests import tiny
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

SAMPLING: dict[str, Any] = {"max_tokens": 96, "ignore_eos": True, "temperature": 1.0, "seed": 5}
TABLE = pd.DataFrame({"text": [f"row {i} " * (1 + i * 7 % 11) for i in range(480)]})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(path: Path) -> pd.DataFrame:
    """What one process answers."""
    with dask.config.set(scheduler="threads"):
        whole = daskllm.load(path)
        table = dd.from_pandas(TABLE, npartitions=1).llm.generate(whole, "text", **SAMPLING).compute()
    whole.close()
    return table


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


def process_of(client: Client, worker: str) -> int:
    pid: int = client.run(os.getpid, workers=[worker])[worker]
    return pid


def begun(client: Client, llm: LLM) -> Any:
    """The table's future, with several partitions for each worker."""
    frame = dd.from_pandas(TABLE, npartitions=8)
    return client.compute(frame.llm.generate(llm, "text", **SAMPLING))


async def under_way(spec: ModelSpec, dask_worker: Worker) -> int:
    """KV blocks in use on a worker: above 0 while rows are being decoded."""
    return session_for(spec).engine.batcher.pool.used


def test_a_worker_that_joins_in_the_middle_takes_its_part(
    cluster: LocalCluster, path: Path, undisturbed: pd.DataFrame
) -> None:
    with Client(cluster, set_as_default=False) as client:
        llm = daskllm.load(path, client=client)
        (first,) = client.nthreads()
        pid, reports = process_of(client, first), list[Increment]()
        with follow(client, reports.append):
            job = begun(client, llm)
            eventually(lambda: any(one.rows for one in reports))
            os.kill(pid, signal.SIGSTOP)  # so that there is something left, however fast it is
            try:
                cluster.scale(2)
                eventually(lambda: any(one.worker not in ("", first) for one in reports))
            finally:
                os.kill(pid, signal.SIGCONT)
            pd.testing.assert_frame_equal(job.result(timeout=60), undisturbed)
        assert len({one.worker for one in reports}) == 2


def test_a_worker_killed_while_it_decodes_costs_no_row(
    cluster: LocalCluster, path: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    with Client(cluster, set_as_default=False) as client:
        cluster.scale(2)
        client.wait_for_workers(2)
        llm = daskllm.load(path, client=client, answers=str(tmp_path))
        reports: list[Increment] = []
        with follow(client, reports.append):
            pids = client.run(os.getpid)
            job = begun(client, llm)
            eventually(lambda: any(one.rows for one in reports))
            used: dict[str, int] = {}
            eventually(lambda: used.update(client.run(under_way, llm.spec)) or any(used.values()))
            os.kill(pids[max(used, key=lambda worker: used[worker])], signal.SIGKILL)
            assert not job.done()
            pd.testing.assert_frame_equal(job.result(timeout=90), undisturbed)
        again = sum(one.rows - one.remembered for one in reports) - len(TABLE)
        assert again < len(TABLE)  # unfinished rows alone are done again
