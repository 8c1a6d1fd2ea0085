"""What all tests share: a model that is none, and clusters that listen on this machine alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster

from daskllm.runtime.process import close_session
from tests.fake_session import FakeLLM, FakeSpec

# No test finds what an earlier run has answered; the variable is for the processes that tests start.
os.environ["DASK_DASKLLM__ANSWERS"] = "False"
dask.config.set({"daskllm.answers": False})


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeLLM]:
    """A fake model of this test's own."""
    llm = FakeLLM(FakeSpec(log=str(tmp_path / "rows.log")))
    yield llm
    close_session(llm.spec)  # type: ignore[arg-type]


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[FakeLLM]:
    """A fake model whose rows wait until the file ``llm.spec.gate`` is there."""
    llm = FakeLLM(FakeSpec(log=str(tmp_path / "rows.log"), gate=str(tmp_path / "gate")))
    yield llm
    Path(str(llm.spec.gate)).touch()
    close_session(llm.spec)  # type: ignore[arg-type]


@pytest.fixture
def one_thread() -> Iterator[Client]:
    """A client of one worker with one thread, in this process, so that its session can be looked at."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def two_processes_cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@pytest.fixture
def two_processes(two_processes_cluster: LocalCluster) -> Iterator[Client]:
    """A client of two worker processes; the current one while the test runs."""
    with Client(two_processes_cluster) as client:
        yield client
