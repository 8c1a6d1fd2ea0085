"""Several copies of a model on a cluster: as many as asked for, the same answers, one lost in the middle."""

from __future__ import annotations

import os
import signal
import threading
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
from daskllm.models import layer_names
from daskllm.runtime import host
from daskllm.runtime.resident import model_for
from daskllm.runtime.stages import host_of
from daskllm.types import ModelError, ModelSpec
from tests import tiny
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

PROMPTS = [f"row {i} " * (1 + i * 7 % 11) for i in range(40)]
SAMPLING: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Any]:
    """What one process answers."""
    with dask.config.set(scheduler="threads"):
        whole = daskllm.load(path)
        answers = whole.generate(PROMPTS, **SAMPLING)
    whole.close()
    return answers


@pytest.fixture(scope="module")
def four() -> Iterator[Client]:
    """Four workers of one thread each."""
    with (
        LocalCluster(
            n_workers=4, threads_per_worker=1, memory_limit=0, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def holding(llm: LLM) -> dict[str, tuple[str, ...]]:
    """The layers of each worker that holds any."""
    return {worker: tuple(layers) for worker, layers in llm.residency().items() if layers}


async def steps_on(dask_worker: Worker) -> tuple[int, int]:
    """Blocks in use and steps of the engines on a worker."""
    sessions = [p.session for p in host_of(dask_worker)._parts.values() if p.session is not None]
    used = sum(s.engine.batcher.pool.used for s in sessions)
    return used, sum(s.metrics.steps for s in sessions)


def test_two_hold_the_model_and_the_others_answer_through_them(
    four: Client, path: Path, expected: list[Any]
) -> None:
    llm = daskllm.load(path, client=four, replicas=2)
    names = layer_names(llm.config)
    engines = [chain.stages[-1].worker for chain in llm.spec.chains]
    assert holding(llm) == dict.fromkeys(engines, names)
    frame = dd.from_pandas(pd.DataFrame({"text": PROMPTS}), npartitions=8)
    answered = frame.llm.generate(llm, "text", **SAMPLING)
    others = [worker for worker in four.nthreads() if worker not in engines]
    table = four.compute(answered, workers=others, allow_other_workers=False).result()
    assert table["generated"].tolist() == [answer.text for answer in expected]
    assert holding(llm) == dict.fromkeys(engines, names)
    assert all(steps > 0 for _, steps in four.run(steps_on, workers=engines).values())
    assert llm.generate(PROMPTS, **SAMPLING) == expected
    llm.close()
    assert not holding(llm)


def test_nothing_stays_where_one_copy_cannot_be_opened(four: Client, path: Path) -> None:
    llm = daskllm.load(path, client=four, replicas=2)
    bad = llm.spec.chains[1].stages[-1].worker
    llm.close()
    four.run(break_loading, True, workers=[bad])
    try:
        with pytest.raises(ModelError, match="broken here"):
            daskllm.load(path, client=four, replicas=2)
        assert four.run(held_parts) == dict.fromkeys(four.nthreads(), 0)
    finally:
        four.run(break_loading, False, workers=[bad])


def test_a_copy_that_is_lost_costs_no_answer(four: Client, path: Path, expected: list[Any]) -> None:
    llm = daskllm.load(path, client=four, replicas=2)
    lost, other = (chain.stages[-1].worker for chain in llm.spec.chains)
    pids = four.run(os.getpid)
    seen: list[int] = []

    def kill() -> None:
        eventually(lambda: four.run(steps_on, workers=[lost])[lost][0] > 0)
        seen.append(four.run(steps_on, workers=[lost])[lost][0])
        os.kill(pids[lost], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    prompts, long = PROMPTS * 3, SAMPLING | {"max_tokens": 120}
    first = llm.generate(prompts, **long)
    killer.join()
    assert seen[0] > 0  # it was in the middle
    assert [answer.token_ids[:40] for answer in first] == [a.token_ids for a in expected] * 3
    # It is on another worker by and by, and the copy that lived has not moved.
    eventually(lambda: len(holding(llm)) == 2)
    held = holding(llm)
    assert other in held
    assert lost not in held
    assert set(held.values()) == {layer_names(llm.config)}
    assert llm.generate(PROMPTS, **SAMPLING) == expected
    assert set(llm.plan.placement) == set(held)
    llm.close()
    assert not holding(llm)


def test_two_chains_of_two_stages(four: Client, path: Path, expected: list[Any]) -> None:
    eventually(lambda: len(four.nthreads()) == 4)
    llm = daskllm.load(path, client=four, stages=2)
    assert [len(chain) for chain in llm.spec.replicas] == [2, 2]
    assert llm.generate(PROMPTS * 2, **SAMPLING) == expected * 2
    held = holding(llm)
    assert len(held) == 4
    assert sorted(name for layers in held.values() for name in layers) == sorted(layer_names(llm.config) * 2)
    plan = llm.plan
    assert [len(replica.stages) for replica in plan.replicas] == [2, 2]
    measured = {(m.replica, m.stage): m for m in plan.measured}
    assert sorted(measured) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(m.busy > 0 and m.passes > 1 for m in measured.values())
    assert "in replica 1, predicted" in plan.explain()
    again = daskllm.load(path, client=four, plan=plan)
    assert again.spec == llm.spec
    llm.close()


def test_whole_copies_in_every_process_are_measured_too(four: Client, path: Path) -> None:
    llm = daskllm.load(path, client=four)
    assert llm.spec.chains == ()
    frame = dd.from_pandas(pd.DataFrame({"text": PROMPTS}), npartitions=8)
    four.compute(frame.llm.generate(llm, "text", max_tokens=4)).result()
    plan = llm.plan
    busy = {plan.replicas[m.replica].stages[0].device: m for m in plan.measured}
    assert set(busy) == set(four.nthreads())
    assert sum(m.passes for m in busy.values()) > 4
    assert "passes" in plan.explain()
    llm.close()
    assert llm.plan.measured == ()


def break_loading(broken: bool) -> None:
    """Let no model be opened in a worker's process, or let it be again."""
    host.model_for = broken_model if broken else model_for  # type: ignore[assignment]


def broken_model(spec: ModelSpec) -> Any:
    raise ModelError("broken here")


async def held_parts(dask_worker: Worker) -> int:
    return len(host_of(dask_worker)._parts)
