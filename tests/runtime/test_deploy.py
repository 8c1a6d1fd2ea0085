"""Worker processes on this machine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import dask.config
import pytest
from distributed import Client
from distributed.comm import CommClosedError
from distributed.security import Security

import daskllm
from daskllm import demo


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (1, 0)])
def test_there_is_something_to_work(workers: int, threads: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        daskllm.local_cluster(workers, threads)


@pytest.mark.cluster
def test_a_cluster_is_local_and_keeps_a_worker_that_dies_again_and_again(tmp_path: Path) -> None:
    with (
        daskllm.local_cluster(1, threads=1, local_directory=str(tmp_path)) as cluster,
        Client(cluster) as client,
    ):
        assert cluster.dashboard_link.startswith("http://127.0.0.1:")
        assert next(iter(cluster.scheduler.workers.values())).memory_limit == 0
        wait = dask.config.get("distributed.deploy.lost-worker-timeout")
        assert wait == "365 days"
        [nanny] = cluster.workers.values()
        first = nanny.pid
        os.kill(first, signal.SIGKILL)
        assert client.submit(os.getpid).result(timeout=30) != first


@pytest.mark.cluster
def test_workers_leave_an_interrupt_to_who_started_them(tmp_path: Path) -> None:
    with (
        daskllm.local_cluster(1, threads=1, local_directory=str(tmp_path)) as cluster,
        Client(cluster) as client,
    ):
        first = client.submit(os.getpid, pure=False).result(timeout=30)
        os.kill(first, signal.SIGINT)
        time.sleep(0.5)  # a worker that ends does so in a moment
        assert client.submit(os.getpid, pure=False).result(timeout=30) == first


@pytest.mark.cluster
def test_secure_is_tls_for_the_main_job_too_and_others_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    with daskllm.local_cluster(1, secure=True, local_directory=str(tmp_path)) as cluster:
        address, others = cluster.scheduler_address, Security.temporary()
        assert address.startswith("tls://")
        with Client(address, security=cluster.security) as client:
            assert all(worker.startswith("tls://") for worker in client.nthreads())
            llm = daskllm.load(demo.model_path(), client=client)
            answered = demo.table().head(20).llm.chat(llm, "prompt", max_tokens=64)
            assert demo.share_right(answered) >= 0.9
            llm.close()
        with pytest.raises(CommClosedError, match="TLS certificate does not match"):
            Client(address, security=others, timeout="5s")
        with pytest.raises(CommClosedError, match="TCP .closed."):
            Client(address.replace("tls://", "tcp://"), timeout="5s")
