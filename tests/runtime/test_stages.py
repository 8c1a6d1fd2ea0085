"""A model cut over workers: the same answers, layers in one place only, and a clear end when one is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster, Worker

import daskllm
from daskllm.graph import Cluster, LayerGraph, Plan, PlanError
from daskllm.llm import LLM
from daskllm.models import layer_names
from daskllm.runtime import heirs
from daskllm.runtime.placing import live_cluster
from daskllm.runtime.progress import Increment, follow
from daskllm.runtime.stages import host_of
from daskllm.types import ModelError, RowError
from tests import tiny
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

FAMILIES = ["gpt2", "llama-gqa", "qwen2", "qwen3-yarn", "mistral-window"]
PROMPTS = [f"row {i} " * (1 + i * 7 % 11) for i in range(24)] + ["", None, "x" * 400]
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 12, "logprobs": 1},
    "seeded": {"max_tokens": 12, "logprobs": 0, "temperature": 0.9, "top_p": 0.95, "seed": 3},
    "samples": {"max_tokens": 9, "n": 3, "temperature": 1.0, "seed": 3, "stop": ["e", "q"]},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in FAMILIES:
        dtype = "bfloat16" if name == "qwen2" else "float32"
        made[name] = tiny.make_model(name, tmp_path_factory.mktemp(name), dtype)
    return made


def in_this_process(path: Path) -> LLM:
    """The same model whole, for what the stages must equal."""
    with dask.config.set(scheduler="threads"):
        return daskllm.load(path)


@pytest.fixture
def staged(two_processes: Client, paths: dict[str, Path]) -> Iterator[LLM]:
    llm = daskllm.load(paths["llama-gqa"], client=two_processes, stages=2)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def whole(paths: dict[str, Path]) -> Iterator[LLM]:
    llm = in_this_process(paths["llama-gqa"])
    yield llm
    llm.close()


def asked_here(llm: LLM, call: Any) -> Any:
    with dask.config.set(scheduler="threads"):
        return call(llm)


async def engine_state(dask_worker: Worker) -> list[tuple[int, int, int, int]]:
    """For each engine on a worker: blocks in use, sequences held, sequences finished, steps."""
    found = []
    for part in host_of(dask_worker)._parts.values():
        if part.session is not None:
            engine = part.session.engine
            held = len(engine.batcher.running) + len(engine.batcher.waiting)
            found.append((engine.batcher.pool.used, held, engine.metrics.sequences, engine.metrics.steps))
    return found


def state(client: Client, llm: LLM) -> tuple[int, int, int, int]:
    worker = llm.spec.stages[-1].worker
    ((found,),) = client.run(engine_state, workers=[worker]).values()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_one_process(two_processes: Client, paths: dict[str, Path], family: str) -> None:
    whole = in_this_process(paths[family])
    llm = daskllm.load(paths[family], client=two_processes, stages=2)
    assert [len(stage.layers) > 0 for stage in llm.spec.stages] == [True, True]
    for sampling in SAMPLING.values():
        expected = asked_here(whole, lambda m, s=sampling: m.generate(PROMPTS, **s))
        assert llm.generate(PROMPTS, **sampling) == expected
    scored = [p for p in PROMPTS if p]
    assert llm.score(scored, tokens=True) == asked_here(whole, lambda m: m.score(scored, tokens=True))
    for pooling in ("mean", "last"):
        expected = asked_here(whole, lambda m, p=pooling: m.embed(PROMPTS, pooling=p))
        np.testing.assert_array_equal(llm.embed(PROMPTS, pooling=pooling), expected)
    llm.close()
    whole.close()


def test_every_call_works_unchanged(staged: LLM, whole: LLM) -> None:
    texts = [p for p in PROMPTS if p and len(p) < 250]
    expected = [whole_answer.text for whole_answer in asked_here(whole, lambda m: m.generate(texts))]
    table = pd.DataFrame({"text": texts}, index=range(100, 100 + len(texts)))
    frame = dd.from_pandas(table, npartitions=5)
    assert table.llm.generate(staged, "text")["generated"].tolist() == expected
    assert frame.llm.generate(staged, "text").compute()["generated"].tolist() == expected
    # Rows in this process's threads find the stages too.
    assert frame.llm.generate(staged, "text").compute(scheduler="threads")["generated"].tolist() == expected
    bag = staged.generate(db.from_sequence(texts, npartitions=3))
    assert [answer.text for answer in bag.compute()] == expected
    chats = asked_here(whole, lambda m: m.chat(texts[:3], max_tokens=5))
    assert staged.chat(texts[:3], max_tokens=5) == chats
    for text, answer in zip(texts[:2], expected, strict=False):
        assert "".join(staged.stream(text)) == answer
    with pytest.raises(RowError, match="empty"):
        list(staged.stream(""))


def test_each_layer_is_on_its_worker_and_nowhere_else(staged: LLM, two_processes: Client) -> None:
    staged.generate(PROMPTS, max_tokens=4)
    held = staged.residency()
    assert set(held) == set(two_processes.nthreads())
    assert {worker: tuple(layers) for worker, layers in held.items()} == {
        stage.worker: stage.layers for stage in staged.spec.stages
    }
    graph = LayerGraph.of(staged.config, "float32")
    weights = {node.name: node.weight_bytes for node in graph.nodes}
    assert {name: size for layers in held.values() for name, size in layers.items()} == weights
    staged.close()
    assert not any(staged.residency().values())


def test_a_plan_by_hand_moves_the_layers(staged: LLM, two_processes: Client, paths: dict[str, Path]) -> None:
    names = layer_names(staged.config)
    first, second = sorted(two_processes.nthreads(), reverse=True)
    cluster = live_cluster(two_processes)
    plan = Plan.of([[(first, names[:1]), (second, names[1:])]], staged.graph, cluster)
    moved = daskllm.load(paths["llama-gqa"], client=two_processes, plan=Plan.from_json(plan.to_json()))
    assert {worker: tuple(layers) for worker, layers in moved.residency().items()} == {
        first: names[:1],
        second: names[1:],
    }
    assert moved.generate(PROMPTS[:5]) == staged.generate(PROMPTS[:5])
    assert moved.plan.placement == plan.placement
    moved.close()


def test_the_plan_tells_what_the_stages_did(staged: LLM) -> None:
    staged.generate(PROMPTS, max_tokens=6)
    measured = {m.stage: m for m in staged.plan.measured}
    assert sorted(measured) == [0, 1]
    assert measured[0].passes == measured[1].passes > 6
    assert all(m.busy > 0 for m in measured.values())
    assert staged.plan.placement == {s.worker: s.layers for s in staged.spec.stages}


def test_several_steps_are_under_way(staged: LLM, two_processes: Client) -> None:
    staged.generate(PROMPTS * 2, max_tokens=20, ignore_eos=True)

    async def widest(dask_worker: Worker) -> list[int]:
        parts = host_of(dask_worker)._parts.values()
        return [max(s.running for s in p.session.metrics.history) for p in parts if p.session is not None]

    (sizes,) = two_processes.run(widest, workers=[staged.spec.stages[-1].worker]).values()
    rows = sum(bool(p) and len(p) < 250 for p in PROMPTS) * 2
    assert max(sizes) <= -(-rows // 2)


async def byte_count(dask_worker: Worker) -> int:
    return int(dask_worker.batched_stream.byte_count)


def test_what_passes_through_the_scheduler_is_small(
    staged: LLM, two_processes: Client, two_processes_cluster: LocalCluster
) -> None:
    prompts = [[5, 6, 7]] * 8
    scheduler = two_processes_cluster.scheduler

    def passed() -> int:
        sent = sum(stream.byte_count for stream in scheduler.stream_comms.values())
        return sent + sum(two_processes.run(byte_count).values())

    staged.generate(prompts, max_tokens=2)
    before, steps = passed(), state(two_processes, staged)[3]
    answers = staged.generate(prompts, max_tokens=200, ignore_eos=True)
    assert all(answer.completion_tokens == 200 for answer in answers)
    steps = state(two_processes, staged)[3] - steps
    residuals = 8 * 200 * staged.config.hidden_size * 4
    assert steps >= 2 * 199
    assert residuals > 400_000
    assert passed() - before < 40_000  # the heartbeats of two workers are most of it


def test_a_cancelled_table_frees_its_blocks(staged: LLM, two_processes: Client) -> None:
    frame = dd.from_pandas(pd.DataFrame({"text": ["a long way"] * 400}), npartitions=8)
    answered = frame.llm.generate(staged, "text", max_tokens=240, ignore_eos=True)
    future = two_processes.compute(answered)
    eventually(lambda: state(two_processes, staged)[0] > 0)
    future.cancel()
    eventually(lambda: state(two_processes, staged)[:2] == (0, 0))
    assert state(two_processes, staged)[2] < 400
    assert len(staged.generate(["again"], max_tokens=3)[0].token_ids) <= 3


def test_a_stream_that_is_left_stops(staged: LLM, two_processes: Client) -> None:
    pieces = staged.stream("on and on", max_tokens=200, ignore_eos=True)
    next(pieces)
    pieces.close()
    eventually(lambda: state(two_processes, staged)[:2] == (0, 0))


def test_progress_is_heard_from_wherever_the_rows_ran(staged: LLM, two_processes: Client) -> None:
    heard: list[Increment] = []
    with follow(two_processes, heard.append):
        staged.generate(PROMPTS, max_tokens=5, ignore_eos=True)
        eventually(lambda: sum(i.rows for i in heard) == len(PROMPTS))
    assert sum(i.output_tokens for i in heard) == 24 * 5
    assert sum(i.errors for i in heard) == 3


def test_a_broken_stage_is_the_models_error_and_leaves_nothing(two_processes: Client, tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path, max_shard_size="200KB")
    for file in sorted(path.glob("model-*.safetensors"))[-1:]:
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        daskllm.load(path, client=two_processes, stages=2)
    assert two_processes.run(held_parts) == dict.fromkeys(two_processes.nthreads(), 0)


async def held_parts(dask_worker: Worker) -> int:
    return len(host_of(dask_worker)._parts)


def test_three_stages_in_one_process(paths: dict[str, Path], whole: LLM) -> None:
    expected = asked_here(whole, lambda m: m.generate(PROMPTS, max_tokens=12))
    with (
        LocalCluster(
            n_workers=3, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        llm = daskllm.load(paths["llama-gqa"], client=client, stages=3)
        assert len({stage.worker for stage in llm.spec.stages}) == 3
        assert llm.generate(PROMPTS, max_tokens=12) == expected
        assert "".join(llm.stream(PROMPTS[1], max_tokens=12)) == expected[1].text
        llm.close()


@pytest.mark.parametrize("stage", [0, 1])
def test_rows_of_a_lost_stage_are_done_again_on_the_workers_left(
    paths: dict[str, Path], whole: LLM, stage: int
) -> None:
    prompts = [f"over and over {i}" for i in range(60)]
    sampling = {"max_tokens": 200, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    expected = asked_here(whole, lambda m: m.generate(prompts, **sampling))
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        llm = daskllm.load(paths["llama-gqa"], client=client, stages=2)
        lost = llm.spec.stages[stage].worker
        pids = client.run(os.getpid)
        seen: list[tuple[int, int, int, int]] = []

        def kill() -> None:
            eventually(lambda: state(client, llm)[3] > 20)
            seen.append(state(client, llm))
            os.kill(pids[lost], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        assert llm.generate(prompts, **sampling) == expected
        killer.join()
        assert seen[0][1] > 0  # it was in the middle
        held = llm.residency()
        assert lost not in held
        assert sorted(name for layers in held.values() for name in layers) == sorted(layer_names(llm.config))
        assert llm.plan.placement == {worker: tuple(layers) for worker, layers in held.items() if layers}
        assert "".join(llm.stream(prompts[0], **sampling)) == expected[0].text
        llm.close()
        assert not any(llm.residency().values())


def test_what_fits_nowhere_any_more_is_a_clear_error(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heirs, "JOIN_SECONDS", 0.0)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        llm = daskllm.load(paths["llama-gqa"], client=client, stages=2)
        monkeypatch.setattr(
            heirs, "cluster_of", lambda *_, **__: Cluster.of(1, memory=1000, name="tcp://left")
        )
        client.retire_workers([llm.spec.stages[0].worker], close_workers=True, remove=True)
        with pytest.raises(PlanError, match="embed"):
            llm.generate(["again"])
