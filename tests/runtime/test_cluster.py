from __future__ import annotations

import dask
import numpy as np
import pytest
from distributed import Client

from daskllm.runtime.call import Call
from daskllm.runtime.cluster import batches, client_for, over_rows
from daskllm.runtime.tasks import answer_rows
from tests.fake_session import FakeLLM


@pytest.mark.parametrize(("rows", "workers"), [(0, 1), (1, 4), (100, 2), (5000, 3), (100_000, 4)])
def test_batches_cover_the_rows_and_fill_the_workers(rows: int, workers: int) -> None:
    dealt = batches(np.ones(rows), workers)
    assert sorted(row for batch in dealt for row in batch) == list(range(rows))
    sizes = [len(batch) for batch in dealt]
    assert max(sizes, default=0) <= 256
    if rows >= 64 * workers:
        assert min(sizes) >= 32
        assert len(sizes) >= 2 * workers


def test_batches_cost_the_same_and_few_long_rows_are_spread() -> None:
    assert [len(batch) for batch in batches(np.full(8, 10_000.0), 2)] == [1] * 8
    costs = np.where(np.arange(200) % 50 == 0, 500.0, 5.0)
    spent = [costs[batch].sum() for batch in batches(costs, 2)]
    assert max(spent) - min(spent) <= 500
    assert sum(cost >= 500 for cost in spent) == 4


def test_without_a_client_rows_stay_here() -> None:
    assert client_for(None) is None


@pytest.mark.cluster
def test_the_current_client_is_used_unless_dask_is_told_otherwise(two_processes: Client) -> None:
    assert client_for(None) is two_processes
    assert client_for(two_processes) is two_processes
    with dask.config.set(scheduler="threads"):
        assert client_for(None) is None
        assert client_for(two_processes) is two_processes
    assert two_processes.submit(_client_in_a_task).result() is None


def _client_in_a_task() -> object:
    return client_for(None)


@pytest.mark.cluster
def test_rows_over_a_cluster_come_back_in_order_with_their_places(
    fake: FakeLLM, two_processes: Client
) -> None:
    call = Call(spec=fake.spec, kind="generate", job_seed=3)  # type: ignore[arg-type]
    call_sampled = Call(
        spec=fake.spec, kind="generate", job_seed=3, params=call.params.with_(temperature=1.0)
    )  # type: ignore[arg-type]
    rows = [(f"row {i}",) for i in range(200)]
    for one in (call, call_sampled):
        there = over_rows(two_processes, answer_rows, rows, one)
        assert there == over_rows(None, answer_rows, rows, one)
    assert len(set(fake.processes)) >= 2
