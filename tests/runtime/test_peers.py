"""Blocks from other workers: those that are needed and no more, from all that have them, whoever dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch
from distributed import Client, LocalCluster, Worker
from distributed.protocol import to_serialize

import daskllm
from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.graph import LayerGraph, Plan
from daskllm.models import describe, layer_names, sources
from daskllm.runtime import blockserver, peers
from daskllm.runtime.blockserver import BlockServer, block_server_of, block_traffic_on
from daskllm.runtime.peers import PulledCheckpoint, borrowed
from daskllm.runtime.placing import live_cluster
from daskllm.runtime.process import open_session_on
from daskllm.runtime.resident import open_files
from daskllm.runtime.shelf import checksum
from daskllm.runtime.stages import StagePlugin
from daskllm.text.tokenizer import Tokenizer
from daskllm.types import ModelError, ModelSpec
from tests import tiny
from tests.waiting import eventually

pytestmark = pytest.mark.cluster

RANGE = 16 << 10
PROMPTS = [f"row {i} " * (1 + i % 5) for i in range(12)]


def spec_of(path: Path) -> ModelSpec:
    checkpoint = open_checkpoint(path)
    return ModelSpec(path=str(path), identity=checkpoint.identity, content=checkpoint.content())


def head_bytes(checkpoint: Checkpoint) -> int:
    return sum(head for _, head in checkpoint.files().values())


def layer_bytes(checkpoint: Checkpoint, layers: tuple[str, ...]) -> int:
    found = sources(describe(checkpoint.config), checkpoint.names)
    spans = {checkpoint.span(one.name) for layer in layers for one in found[layer].values()}
    return sum(stop - start for _, start, stop in spans)


# --- two workers in this process, so that their files can be looked at ------------------------------------


@pytest.fixture(scope="module")
def here() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.register_plugin(StagePlugin())
        yield client


@pytest.fixture
def servers(here: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BlockServer]]:
    monkeypatch.setattr(peers, "RANGE_BYTES", RANGE)
    monkeypatch.setattr(peers, "FRESH_SECONDS", 0.0)
    found = [block_server_of(worker) for worker in here.cluster.workers.values()]
    for server in found:
        server.served, server.pulled = 0, type(server.pulled)()
    yield found
    for server in found:
        for identity in [*server._whole, *server._copies]:
            server.release(identity)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tiny.make_model("llama-gqa", tmp_path / "model", max_shard_size="200KB")
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    return made


def test_a_directory_that_is_gone_lives_on_in_a_copy(
    servers: list[BlockServer], here: Client, path: Path
) -> None:
    spec, (first, second) = spec_of(path), servers
    whole = first.open(spec)
    tensors = {name: whole.tensor(name).clone() for name in whole.names}
    files = {name: file.read_bytes() for name, (file, _) in whole.files().items()}
    needed = head_bytes(whole)
    path.rename(path.parent / "moved")
    copy = second.open(spec)
    assert isinstance(copy, PulledCheckpoint)
    assert copy.descriptor("lm_head.weight") is None
    assert copy.path != path
    assert copy.identity == spec.identity
    assert second.pulled == {first.worker.address: needed}
    small = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    assert {name: (copy.path / name).read_bytes() for name in small} == small
    Tokenizer.from_directory(copy.path)

    names = sorted(copy.names)
    copy.fetch(names[:3])
    some = sum(stop - start for _, start, stop in map(copy.span, names[:3]))
    copy.fetch(names[:3])
    assert second.pulled.total() == needed + some == first.served
    # What was not asked for comes when it is read; it never reads as zeros.
    assert all(torch.equal(copy.tensor(name), tensors[name]) for name in names)
    assert {name: (copy.path / name).read_bytes() for name in files} == files
    assert copy.content() == spec.content

    client_copy = borrowed(here, spec, "it is elsewhere")
    assert client_copy.config == whole.config
    folder = client_copy.path
    assert folder.is_dir()
    del client_copy
    assert not folder.exists()
    second.release(spec.identity)
    assert not copy.path.exists()


def test_who_is_being_filled_gives_what_it_has(servers: list[BlockServer], path: Path) -> None:
    spec, (first, second) = spec_of(path), servers
    first.open(spec)
    shutil.rmtree(path)
    copy = second.open(spec)
    names = sorted(copy.names)
    copy.fetch(names[:4])
    first.release(spec.identity)  # what it had is only in the copy now
    again = first.open(spec)
    again.fetch(names[:4])
    assert first.pulled.keys() == {second.worker.address}
    assert torch.equal(again.tensor(names[0]), copy.tensor(names[0]))
    with pytest.raises(ModelError) as error:
        again.fetch(names[-1:])
    said = str(error.value)
    assert f"tensor {names[-1]!r}" in said
    assert "there is no directory" in said
    assert all(f"{server.worker.address} has it not" in said for server in servers)


def test_a_copy_with_other_times_is_the_same_model_and_other_weights_are_not(
    servers: list[BlockServer], path: Path
) -> None:
    spec, (first, _) = spec_of(path), servers
    for file in path.glob("*.safetensors"):
        os.utime(file, ns=(1, 1))
    first.open(spec).close()
    first.release(spec.identity)
    tiny.make_model("llama-gqa", path, seed=1, max_shard_size="200KB")
    for _ in range(2):
        with pytest.raises(ModelError, match="is not the model that was loaded") as error:
            first.open(spec)
    assert str(path) in str(error.value)
    assert "has it not" in str(error.value)


def test_a_file_written_over_is_not_mixed_in(servers: list[BlockServer], path: Path) -> None:
    spec, (first, second) = spec_of(path), servers
    first.open(spec)
    shard = min(path.glob("*.safetensors"))
    size = shard.stat().st_size
    with shard.open("r+b") as stream:  # in place, as nobody should
        stream.seek(-4000, os.SEEK_END)
        stream.write(bytes(4000))
    os.utime(shard, ns=(1, 1))
    assert shard.stat().st_size == size
    with pytest.raises(ModelError, match="is not the model that was loaded"):
        second.open(spec)


def _answering(
    server: BlockServer, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[int]:
    """Let a worker's answers be changed; the list grows by one for each."""
    calls: list[int] = []

    async def read(comm: Any, identity: str, file: str, start: int, stop: int) -> Any:
        calls.append(start)
        content, number = server._range(identity, file, start, stop)
        await comm.write(
            change({"content": to_serialize(np.frombuffer(content, np.uint8)), "checksum": number})
        )
        return blockserver.Status.dont_reply

    monkeypatch.setitem(server.worker.handlers, "daskllm_read", read)
    return calls


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: reply | {"checksum": reply["checksum"] ^ 1},
        lambda reply: {"content": to_serialize(np.zeros(3, np.uint8)), "checksum": checksum(bytes(3))},
        lambda reply: {},
        lambda reply: None,
        lambda reply: {"busy": True},
    ],
    ids=["checksum", "length", "has it no more", "nonsense", "busy"],
)
def test_wrong_answers_cost_a_retry_elsewhere(
    servers: list[BlockServer], path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    spec, (first, second) = spec_of(path), servers
    calls = _answering(first, monkeypatch, change)
    first.open(spec)
    second.open(spec)  # both have all of it, and now neither can read it anew
    expected = {name: Checkpoint(path).tensor(name).clone() for name in Checkpoint(path).names}
    shutil.rmtree(path)
    copy = borrowed(second.worker, spec, "it is gone")
    assert all(torch.equal(copy.tensor(name), tensor) for name, tensor in expected.items())
    assert calls
    assert second.served == sum(file.stat().st_size for file in copy.path.rglob("*") if file.is_file())


def test_who_only_answers_wrongly_is_given_up(
    servers: list[BlockServer], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, (first, second) = spec_of(path), servers
    first.open(spec)
    shutil.rmtree(path)
    copy = second.open(spec)
    calls = _answering(first, monkeypatch, lambda reply: reply | {"checksum": reply["checksum"] ^ 1})
    name = min(copy.names, key=lambda one: copy.span(one)[2] - copy.span(one)[1])
    with pytest.raises(ModelError, match=f"tensor '{name}'.*{first.worker.address} sent other bytes"):
        copy.fetch([name])
    assert len(calls) == 2


def test_who_closes_does_not_wait_for_bytes(
    servers: list[BlockServer], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, (first, second) = spec_of(path), servers
    first.open(spec)
    shutil.rmtree(path)
    copy = second.open(spec)
    asked = asyncio.Event()

    async def never(comm: Any, identity: str, file: str, start: int, stop: int) -> Any:
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setitem(first.worker.handlers, "daskllm_read", never)

    async def close_when_asked() -> None:
        await asked.wait()
        copy.close()

    second.worker.loop.add_callback(close_when_asked)
    with pytest.raises(ModelError, match="was closed while its files were being copied"):
        copy.fetch(sorted(copy.names))


# --- processes --------------------------------------------------------------------------------------------


def set_range(size: int) -> None:
    peers.RANGE_BYTES = size


def go_blind(path: str) -> None:
    """As if this worker could not reach a directory."""
    reach = blockserver.open_checkpoint

    def open_checkpoint(model: Any, revision: str | None = None) -> Checkpoint:
        if str(model) == path:
            raise ModelError(f"there is no directory {model!r} (for this test)")
        return reach(model, revision)

    blockserver.open_checkpoint = open_checkpoint  # type: ignore[attr-defined]


async def hang_after(count: int, dask_worker: Worker) -> None:
    """Let a worker serve so many ranges, and be silent from then on."""
    server, left = block_server_of(dask_worker), count

    async def read(comm: Any, identity: str, file: str, start: int, stop: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            await asyncio.Event().wait()
        return await server.read(comm, identity, file, start, stop)

    dask_worker.handlers["daskllm_read"] = read


def join(client: Client, cluster: LocalCluster) -> str:
    """The address of one worker more."""
    before = set(client.nthreads())
    cluster.scale(len(cluster.worker_spec) + 1)
    (joined,) = eventually(lambda: set(client.nthreads()) - before)
    return str(joined)


async def fetch_all(spec: ModelSpec, dask_worker: Worker) -> None:
    """Bring all tensors to a worker, and nothing else, so that what passes meanwhile can be told."""
    checkpoint = await asyncio.to_thread(open_files, spec)
    await asyncio.to_thread(checkpoint.fetch, checkpoint.names)


async def byte_count(dask_worker: Worker) -> int:
    return int(dask_worker.batched_stream.byte_count)


def traffic(client: Client) -> dict[str, Any]:
    return client.run(block_traffic_on)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with dask.config.set(scheduler="threads"):
        llm = daskllm.load(tiny.make_model("llama-gqa", tmp_path_factory.mktemp("whole")))
        answers = llm.generate(PROMPTS, max_tokens=8)
        llm.close()
    return answers


def answered_by(client: Client, llm: Any, worker: str) -> list[str]:
    frame = dd.from_pandas(pd.DataFrame({"text": PROMPTS}), npartitions=2)
    out = client.compute(frame.llm.generate(llm, "text", max_tokens=8), workers=[worker])
    return out.result(timeout=60)["generated"].tolist()


def test_a_joiner_pulls_what_is_no_file_any_more(
    client: Client, cluster: LocalCluster, tmp_path: Path, expected: Any
) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    checkpoint = open_checkpoint(path)
    names = layer_names(describe(checkpoint.config))
    size = head_bytes(checkpoint) + layer_bytes(checkpoint, names)
    llm = daskllm.load(path, client=client)
    holders = set(client.nthreads())
    (path / "model.safetensors").unlink()
    joiner = join(client, cluster)
    client.run(set_range, RANGE)
    scheduler = cluster.scheduler

    def passed() -> int:
        sent = sum(stream.byte_count for stream in scheduler.stream_comms.values())
        return sent + sum(client.run(byte_count).values())

    before = passed()
    client.run(fetch_all, llm.spec, workers=[joiner])
    through_scheduler = passed() - before
    assert answered_by(client, llm, joiner) == [answer.text for answer in expected]
    moved = traffic(client)
    assert moved[joiner]["pulled"].keys() == holders
    assert sum(moved[joiner]["pulled"].values()) == size > 400_000
    assert {worker: moved[worker]["served"] for worker in holders} == moved[joiner]["pulled"]
    assert through_scheduler < 60_000
    assert llm.generate(PROMPTS, max_tokens=8) == expected
    llm.close()


def test_a_stage_pulls_its_own_layers(
    client: Client, cluster: LocalCluster, tmp_path: Path, expected: Any
) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    checkpoint = open_checkpoint(path)
    names = layer_names(describe(checkpoint.config))
    first, blind, spare = sorted(client.nthreads())
    client.run(go_blind, str(path), workers=[blind])
    before = traffic(client)[blind]["pulled"]
    graph = LayerGraph.of(describe(checkpoint.config), "float32")
    plan = Plan.of([[(first, names[:3]), (blind, names[3:])]], graph, live_cluster(client))
    llm = daskllm.load(path, client=client, plan=plan)
    assert llm.generate(PROMPTS, max_tokens=8) == expected
    pulled = sum(traffic(client)[blind]["pulled"].values()) - sum(before.values())
    assert pulled == head_bytes(checkpoint) + layer_bytes(checkpoint, names[3:])

    # The other stage's worker goes: its layers come to those that are left, be one of them blind.
    client.retire_workers([first], close_workers=True, remove=True)
    assert llm.generate(PROMPTS, max_tokens=8) == expected
    held = {worker: layers for worker, layers in llm.residency().items() if layers}
    assert held.keys() == {blind, spare}
    llm.close()


def test_a_holder_that_dies_while_it_serves_costs_a_retry(
    client: Client, cluster: LocalCluster, tmp_path: Path, expected: Any
) -> None:
    while len(client.nthreads()) < 3:
        join(client, cluster)
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    spec = spec_of(path)
    lost, kept, joiner = sorted(client.nthreads())
    pids = client.run(os.getpid)
    client.run(set_range, RANGE)
    client.run(go_blind, str(path), workers=[joiner])
    llm = daskllm.LLM(spec, client)
    client.run(open_session_on, spec, workers=[lost, kept])
    client.run(hang_after, 12, workers=[lost])
    before = traffic(client)
    frame = dd.from_pandas(pd.DataFrame({"text": PROMPTS}), npartitions=2)
    out = client.compute(frame.llm.generate(llm, "text", max_tokens=8), workers=[joiner])

    def given() -> int:
        return traffic(client)[lost]["served"] - before[lost]["served"]

    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    eventually(lambda: given() > 0)
    assert 0 < given() < size
    assert not out.done()
    os.kill(pids[lost], signal.SIGKILL)
    assert out.result(timeout=60)["generated"].tolist() == [answer.text for answer in expected]
    pulled = traffic(client)[joiner]["pulled"]
    assert {lost, kept} <= pulled.keys()
    llm.close()


def test_nobody_has_it(client: Client, tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    spec = spec_of(path)
    shutil.rmtree(path)
    workers = sorted(client.nthreads())
    with pytest.raises(ModelError) as error:
        client.run(open_session_on, spec, workers=workers[:1])
    assert "there is no directory" in str(error.value)
    assert all(f"{worker} has it not" in str(error.value) for worker in workers)
