"""How long a scheduler takes slices to last: it learns from those that had rows, not from empty ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import dask
import pytest
from distributed import Client
from distributed.stealing import WorkStealing

from daskllm.runtime.durations import Durations, learn_durations
from daskllm.runtime.slices import is_slice, slice_key

pytestmark = pytest.mark.cluster

NAME = f"generate-{'0f' * 16}"


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        client.run_on_scheduler(learn_durations)
        client.run_on_scheduler(learn_durations)  # by another client: once is enough
        yield client


def slept(seconds: float) -> int | None:
    """What a slice does: nothing, or something that takes a while."""
    time.sleep(seconds)
    return None if not seconds else 1


def average(client: Client, key: Any, seconds: float) -> float:
    """What the scheduler takes such a task to last, after one that took so long."""
    future = client.submit(slept, seconds, key=key, pure=False)
    future.result()
    prefix = client.cluster.scheduler.tasks[key].prefix  # type: ignore[union-attr]
    return float(prefix.duration_average)


def test_empty_slices_teach_nothing(client: Client) -> None:
    assert average(client, slice_key(NAME, 0, 4), 0) == -1  # as before any
    first = average(client, slice_key(NAME, 1, 5), 0.2)
    assert first >= 0.2
    assert average(client, slice_key(NAME, 2, 6), 0) == first
    assert average(client, slice_key(NAME, 0, 0), 0) == -1  # slices that a lesser cut fills have their own


def test_other_tasks_are_learned_of_as_ever(client: Client) -> None:
    assert 0 <= average(client, ("sum-0f", 0, 1), 0) < 0.1
    assert 0 <= average(client, f"clean-{'0f' * 16}", 0) < 0.1


def test_it_hears_of_an_end_before_stealing_does(client: Client) -> None:
    kinds = [type(plugin) for plugin in client.cluster.scheduler.plugins.values()]  # type: ignore[union-attr]
    assert kinds.count(Durations) == 1
    assert kinds.index(Durations) < kinds.index(WorkStealing)


def test_a_worker_without_tasks_gets_some_at_once() -> None:
    """Not only when Dask looks again, which is never here."""
    with (
        dask.config.set({"distributed.scheduler.work-stealing-interval": "1h"}),
        Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client,
    ):
        client.run_on_scheduler(learn_durations)
        busy, idle = client.nthreads()
        keys = [slice_key(NAME, part, 0) for part in range(6)]
        waiting = [
            client.submit(slept, 0.5, key=key, workers=[busy], allow_other_workers=True, pure=False)
            for key in keys
        ]
        end = time.monotonic() + 30
        while len(client.processing()[busy]) < len(keys):  # a scheduler takes a graph in its own time
            assert time.monotonic() < end, "they never came to the worker"
            time.sleep(0.01)
        client.submit(slept, 0.01, workers=[idle], pure=False).result()
        client.gather(waiting)
        moved = [key for key, workers in client.who_has(waiting).items() if list(workers) == [idle]]
        assert moved


@pytest.mark.parametrize("key", ["generate", ("generate", 0, 1), ("a-b-0f", 0, 1), ("generate-0f", 1), 7])
def test_what_is_no_slice(key: Any) -> None:
    assert not is_slice(key)
