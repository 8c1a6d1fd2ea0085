"""A cluster that has as many workers as there is work for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from dask.dataframe import from_pandas
from distributed import Client, LocalCluster

import daskllm
from daskllm import demo
from tests.fake_session import FakeLLM
from tests.waiting import eventually


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with daskllm.local_cluster(1, threads=2) as cluster:
        cluster.adapt(minimum=0, maximum=2, interval="100ms", wait_count=3, target_duration="1s")
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


def workers(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


def duration(client: Client) -> float:
    """What Dask has learnt that a slice takes; negative: nothing yet."""
    average: float = client.run_on_scheduler(
        lambda dask_scheduler: dask_scheduler.task_prefixes["generate"].duration_average
    )
    return average


@pytest.mark.cluster
def test_workers_come_with_rows_and_go_after_them(client: Client, gated: FakeLLM) -> None:
    table = from_pandas(pd.DataFrame({"text": [f"row {i}" for i in range(640)]}), npartitions=20)
    eventually(lambda: workers(client) == 0)
    future = client.compute(table.llm.generate(gated, "text"))
    eventually(lambda: workers(client) == 2)
    # Tasks have left their pools by now, after some milliseconds, which nothing has been learnt from.
    eventually(lambda: client.run_on_scheduler(_away) > 2)
    began = time.monotonic()
    assert duration(client) < 0
    Path(str(gated.spec.gate)).touch()
    assert future.result()["generated"].tolist() == [f"<row {i}>" for i in range(640)]
    assert gated.rows == 640  # none was done twice because its worker was sent away
    assert duration(client) > 0
    del future
    eventually(lambda: workers(client) == 0)
    assert time.monotonic() > began


def _away(dask_scheduler: object) -> int:
    return sum(len(ws.long_running) for ws in dask_scheduler.workers.values())  # type: ignore[attr-defined]


@pytest.mark.cluster
def test_a_model_is_loaded_where_there_is_no_worker_yet(client: Client) -> None:
    eventually(lambda: workers(client) == 0)
    with pytest.raises(ValueError, match="has no workers.*stages=1"):
        daskllm.load(demo.model_path(), client=client)
    llm = daskllm.load(demo.model_path(), client=client, stages=1)
    answered = demo.table().head(40).llm.chat(llm, "prompt", max_tokens=64)
    assert demo.share_right(answered) >= 0.9
    llm.close()
