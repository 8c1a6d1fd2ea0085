"""Several models and clients on one cluster: who wants what, and what goes when nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask.config
import pytest
from distributed import Client, LocalCluster

import daskllm
from daskllm import demo
from daskllm.runtime.leases import grace
from tests.tiny import make_model
from tests.waiting import eventually


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with daskllm.local_cluster(2, threads=1) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def short() -> Iterator[None]:
    with dask.config.set({"daskllm.lease": "300ms"}):
        yield


def test_a_minute_unless_told_otherwise() -> None:
    assert grace() == 0.3
    with dask.config.set({"daskllm.lease": "60s"}):
        assert grace() == 60


@pytest.mark.cluster
def test_a_model_stays_until_the_last_of_its_clients_is_gone(cluster: LocalCluster, tmp_path: Path) -> None:
    other = make_model("mistral-full-head-dim", tmp_path / "other")
    with Client(cluster, set_as_default=False) as watcher:
        first, second = (Client(cluster, set_as_default=False) for _ in range(2))
        one, same = (daskllm.load(demo.model_path(), client=client) for client in (first, second))
        daskllm.load(other, client=first)

        def there() -> dict[str, int]:
            table = daskllm.loaded(watcher)
            return dict(zip(table["model"], table["clients"], strict=True))

        listed = daskllm.loaded(watcher)
        assert sorted(listed["worker"]) == sorted([*watcher.nthreads()] * 2)
        assert (listed["bytes"] > 0).all()
        assert there() == {str(demo.model_path()): 2, str(other): 1}
        sizes = {w: sum(layers.values()) for w, layers in one.residency().items()}
        mine = listed[listed["model"] == str(demo.model_path())]
        assert dict(zip(mine["worker"], mine["bytes"], strict=True)) == sizes

        one.close()  # the other client has it still
        assert there() == {str(demo.model_path()): 1, str(other): 1}
        first.close()
        eventually(lambda: there() == {str(demo.model_path()): 1})
        assert same.generate("A", max_tokens=2).finish_reason in ("length", "stop")
        second.close()
        eventually(lambda: there() == {})


@pytest.mark.cluster
def test_a_model_in_stages_goes_too_and_keeps_its_workers_while_it_is_wanted(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as watcher:
        client = Client(cluster, set_as_default=False)
        llm = daskllm.load(demo.model_path(), client=client, stages=2)
        assert len(set(daskllm.loaded(watcher)["worker"])) == 2
        assert watcher.run_on_scheduler(lambda dask_scheduler: dask_scheduler.workers_to_close(n=1)) == []
        assert llm.generate("A", max_tokens=2).completion_tokens >= 1
        client.close()
        eventually(lambda: daskllm.loaded(watcher).empty)
        close = watcher.run_on_scheduler(lambda dask_scheduler: dask_scheduler.workers_to_close(n=1))
        assert len(close) == 1


@pytest.mark.cluster
def test_close_lets_go_at_once_where_nobody_else_wants_it(cluster: LocalCluster) -> None:
    with Client(cluster, set_as_default=False) as client:
        llm = daskllm.load(demo.model_path(), client=client)
        llm.close()
        assert daskllm.loaded(client).empty
