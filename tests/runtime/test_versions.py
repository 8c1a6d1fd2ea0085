"""Updates of an open model: every row is one version's, and a broken update changes nothing."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster, Worker
from safetensors.torch import load_file, save_file

import daskllm
from daskllm.blocks.store import STORE
from daskllm.llm import LLM
from daskllm.runtime import process, resident, versions
from daskllm.runtime.call import Call
from daskllm.runtime.process import using
from daskllm.runtime.stages import host_of
from daskllm.types import Completion, ModelError
from tests import tiny
from tests.waiting import eventually

PROMPTS = [f"row {i} " * (1 + i * 7 % 5) for i in range(8)]
SAMPLING: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def broken(path: Path, source: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("versions")
    old, new = (tiny.make_model("llama-gqa", home / str(seed), seed=seed) for seed in (0, 1))
    norm, down = "model.norm.weight", "model.layers.2.mlp.down_proj.weight"
    return {
        "old": old,
        "new": new,
        "missing": broken(home / "missing", new, lambda tensors: tensors.pop(norm)),
        "shape": broken(home / "shape", new, lambda t: t.update({down: t[down][:, :-1].contiguous()})),
        "family": tiny.make_model("gpt2", home / "gpt2"),
        "sizes": tiny.make_model("llama-mqa", home / "mqa"),
        "nothing": home / "nothing",
    }


BROKEN = {
    "missing": r"model\.norm\.weight",
    "shape": r"model\.safetensors: tensor 'model\.layers\.2\.mlp\.down_proj\.weight' has shape",
    "family": r"gpt2/config\.json: family is 'gpt2', and 'llama'",
    "sizes": r"mqa/config\.json: num_layers is 2, and 3",
    "nothing": "there is no directory",
}


@pytest.fixture(scope="module")
def texts(paths: dict[str, Path]) -> list[list[str]]:
    """What the old and the new weights answer to `PROMPTS`; no answer of the one is the other's."""
    found = []
    with dask.config.set(scheduler="threads"):
        for name in ("old", "new"):
            llm = daskllm.load(paths[name])
            found.append([answer.text for answer in llm.generate(PROMPTS, **SAMPLING)])
            llm.close()
    assert all(one != other for one, other in zip(*found, strict=True))
    return found


@pytest.fixture
def llm(paths: dict[str, Path]) -> Iterator[LLM]:
    with dask.config.set(scheduler="threads"):
        llm = daskllm.load(paths["old"])
        yield llm
        llm.close()


def held(llm: LLM) -> list[int]:
    """The versions that this process has a session or layers of."""
    mine = versions.known(llm.spec)
    return sorted({spec.version for spec in (*process._sessions, *resident.open_models()) if spec in mine})


def all_of(answers: list[Completion], texts: list[list[str]], version: int, weights: int) -> bool:
    return [(a.text, a.model_version) for a in answers] == [(text, version) for text in texts[weights]]


# --- in this process ------------------------------------------------------------------------------------


def test_rows_under_way_finish_on_the_old_weights(
    llm: LLM, paths: dict[str, Path], texts: list[list[str]]
) -> None:
    before = STORE.nbytes()
    stream = llm.stream(PROMPTS[3], **SAMPLING)
    begun = next(stream)
    old = llm.session()
    with ThreadPoolExecutor(1) as pool, using(llm.spec):
        steps = old.metrics.steps
        batch = pool.submit(llm.generate, PROMPTS, max_tokens=200, ignore_eos=True)
        eventually(lambda: old.metrics.steps > steps + 3)
        llm.update(paths["new"])
        assert not batch.done()
        assert (llm.version, held(llm)) == (1, [0, 1])
        assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 1, 1)
        answers = batch.result()
    assert all(a.model_version == 0 and a.completion_tokens == 200 for a in answers)
    for answer, text in zip(answers, texts[0], strict=True):
        assert str(answer.text)[:8] == text[:8]
    assert held(llm) == [0, 1]  # the stream is still there
    assert begun + "".join(stream) == texts[0][3]
    assert held(llm) == [1]
    assert STORE.nbytes() == before
    assert old.engine.batcher.pool.used == 0


def test_threads_that_ask_meanwhile_get_one_version_for_a_row(
    llm: LLM, paths: dict[str, Path], texts: list[list[str]]
) -> None:
    seen: list[list[Completion]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            seen.append(llm.generate(PROMPTS, **SAMPLING))

    weights = [0, 1, 0]
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for number, name in enumerate(["new", "old"]):
                eventually(lambda n=number: any(answers[0].model_version == n for answers in seen))
                llm.update(paths[name])
            eventually(lambda: any(answers[0].model_version == 2 for answers in seen))
        finally:
            stop.set()
        for one in asking:
            one.result()
    for answers in seen:
        version = answers[0].model_version
        assert all_of(answers, texts, version, weights[version])
    assert {answers[0].model_version for answers in seen} == {0, 1, 2}
    assert held(llm) == [2]


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_update_changes_nothing(
    llm: LLM, paths: dict[str, Path], texts: list[list[str]], what: str
) -> None:
    before = STORE.nbytes()
    stream = llm.stream(PROMPTS[0], **SAMPLING)
    begun = next(stream)
    session, tokenizer = llm.session(), llm.tokenizer
    with pytest.raises(ModelError, match=BROKEN[what]):
        llm.update(paths[what])
    assert begun + "".join(stream) == texts[0][0]
    assert (llm.session(), llm.tokenizer, llm.version) == (session, tokenizer, 0)
    assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 0, 0)
    assert (held(llm), STORE.nbytes()) == ([0], before)
    llm.update(paths["new"])
    assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 1, 1)


def test_what_the_files_say_is_the_present_versions(llm: LLM, paths: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(paths["new"], tmp_path / "chat")
    settings = tmp_path / "chat" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("assistant", "someone"))
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": 260}')
    talk = [{"role": "user", "content": "hi"}]
    handle, before = llm.spec, llm.tokenizer.encode_chat(talk)
    assert llm.session().eos_token_ids == (tiny.EOS,)
    llm.update(tmp_path / "chat")
    assert llm.spec == handle
    assert llm.tokenizer.encode_chat(talk) != before
    assert llm.session().eos_token_ids == (260,)
    assert llm.session().eos_token_ids == (260,)


def test_handles_of_one_model_are_updated_together_and_a_new_load_is_another_model(
    llm: LLM, paths: dict[str, Path], texts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = daskllm.load(paths["old"])
    assert other.spec == llm.spec
    llm.update(paths["new"])
    assert other.version == 1
    assert all_of(other.generate(PROMPTS, **SAMPLING), texts, 1, 1)
    fresh = daskllm.load(paths["old"])
    assert all_of(fresh.generate(PROMPTS, **SAMPLING), texts, 0, 0)
    fresh.close()
    # What is sent to a process tells it of the update.
    for sent in (llm, Call(spec=llm.spec, kind="generate")):
        written = pickle.dumps(sent)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(versions, "_history", {})
            assert versions.present(llm.spec).version == 0
            assert pickle.loads(written).spec == llm.spec
            assert versions.present(llm.spec).version == 1


def test_an_older_version_is_not_learnt_after_a_newer_one(llm: LLM, paths: dict[str, Path]) -> None:
    llm.update(paths["new"])
    first = versions.present(llm.spec)
    llm.update(paths["old"])
    versions.learn(llm.spec, first)
    assert (llm.version, held(llm)) == (2, [2])
    assert versions.superseded(first)


def test_layer_tasks_stay_with_the_version_they_were_made_for(llm: LLM, paths: dict[str, Path]) -> None:
    ids = [5, 6, 7]
    logits, tokens = llm.delayed(ids), llm.delayed(ids, max_tokens=4, ignore_eos=True)
    before = dask.compute(logits, tokens)
    llm.update(paths["new"])
    after = dask.compute(logits, tokens)
    np.testing.assert_array_equal(after[0], before[0])
    assert after[1] == before[1]
    assert held(llm) == [1]
    assert not np.array_equal(llm.delayed(ids).compute(), before[0])


def test_a_table_tells_the_version_when_asked_to(
    llm: LLM, paths: dict[str, Path], texts: list[list[str]]
) -> None:
    table = pd.DataFrame({"text": [*PROMPTS, None]})
    frame = dd.from_pandas(table, npartitions=3)
    lazy = frame.llm.generate(llm, "text", model_version=True, **SAMPLING)
    plain = frame.llm.generate(llm, "text", **SAMPLING)
    assert "generated_model_version" not in plain.columns
    assert lazy.columns[-1] == "generated_model_version"
    assert lazy["generated_model_version"].dtype == np.dtype("int64")
    llm.update(paths["new"])
    again = frame.llm.generate(llm, "text", model_version=True, **SAMPLING)
    assert again._name != lazy._name  # a persisted answer of the old weights is not the new ones' answer
    for answered in (lazy.compute(), again.compute(), table.llm.generate(llm, "text", model_version=True)):
        assert answered["generated_model_version"].tolist() == [1] * 9
    assert again.compute()["generated"].tolist()[:8] == texts[1]
    chat = table.llm.chat(llm, "text", "said", model_version=True, max_tokens=2)
    assert chat["said_model_version"].tolist() == [1] * 9
    with pytest.raises(TypeError, match="model_version"):
        table.llm.generate(llm, "text", model_version=1)


def test_closing_closes_every_version(llm: LLM, paths: dict[str, Path], texts: list[list[str]]) -> None:
    stream = llm.stream(PROMPTS[0], **SAMPLING)
    next(stream)
    llm.update(paths["new"])
    assert held(llm) == [0, 1]
    llm.close()
    assert held(llm) == []
    stream.close()
    assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 1, 1)


# --- on workers -----------------------------------------------------------------------------------------


async def held_on(handle: Any, dask_worker: Worker) -> tuple[list[int], int]:
    """The versions that a worker holds anything of, and the bytes of all its blocks."""
    parts = host_of(dask_worker)._parts
    mine = {one for known in versions.known(handle) for one in (known, *known.chains)}
    open_ = {*process._sessions, *resident.open_models(), *parts} & (mine | set(parts))
    return sorted({spec.version for spec in open_ if spec.path.startswith("/")}), STORE.nbytes()


def on_workers(client: Client, llm: LLM) -> tuple[set[tuple[int, ...]], dict[str, int]]:
    found = client.run(held_on, llm.spec)
    return {tuple(open_) for open_, _ in found.values()}, {w: size for w, (_, size) in found.items()}


def check_rows(table: pd.DataFrame, texts: list[list[str]], weights: list[int]) -> set[int]:
    """Every row is wholly of the version that its column tells; the versions there are."""
    for place, text, version in zip(
        table["place"], table["generated"], table["generated_model_version"], strict=True
    ):
        assert text == texts[weights[version]][place]
    return set(table["generated_model_version"])


def asked_meanwhile(llm: LLM, change: Callable[[], None]) -> list[pd.DataFrame]:
    """Tables of `PROMPTS` on the cluster, asked for before, during and after a change.

    The graphs of the first and the last are made before it.
    """
    rows = pd.DataFrame({"text": PROMPTS, "place": range(len(PROMPTS))})

    def made(number: int) -> dd.DataFrame:
        # Dask would give a table of the same keys the result of one that is just done.
        numbered = pd.concat([rows.assign(number=number)] * 3, ignore_index=True)
        frame = dd.from_pandas(numbered, npartitions=6)
        return frame.llm.generate(llm, "text", model_version=True, **SAMPLING)

    first, last = made(0), made(-1)
    tables: list[pd.DataFrame] = []
    changed = threading.Event()

    def ask() -> None:
        tables.append(first.compute())
        while not changed.is_set():
            tables.append(made(len(tables)).compute())
        tables.append(last.compute())

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            eventually(lambda: bool(tables) or asking.done())
            change()
        finally:
            changed.set()
        asking.result()
    return tables


@pytest.fixture(params=[1, 2], ids=["whole", "stages"])
def on_cluster(
    two_processes: Client, paths: dict[str, Path], request: pytest.FixtureRequest
) -> Iterator[LLM]:
    llm = daskllm.load(paths["old"], client=two_processes, stages=request.param)
    yield llm
    llm.close()


@pytest.mark.cluster
def test_a_cluster_goes_over_under_load(
    on_cluster: LLM, two_processes: Client, paths: dict[str, Path], texts: list[list[str]]
) -> None:
    llm = on_cluster
    _, before = on_workers(two_processes, llm)
    stream = llm.stream(PROMPTS[2], **SAMPLING)
    begun = next(stream)
    weights = [0, 1, 0]
    for number, name in enumerate(["new", "old"]):
        tables = asked_meanwhile(llm, lambda n=name: llm.update(paths[n]))
        assert check_rows(tables[0], texts, weights) == {number}
        assert set().union(*(check_rows(t, texts, weights) for t in tables)) == {number, number + 1}
        assert check_rows(tables[-1], texts, weights) == {number + 1}
        assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, number + 1, weights[number + 1])
    assert begun + "".join(stream) == texts[0][2]
    eventually(lambda: on_workers(two_processes, llm)[0] == {(2,)})
    assert on_workers(two_processes, llm)[1] == before
    assert "".join(llm.stream(PROMPTS[2], **SAMPLING)) == texts[0][2]
    assert llm.plan.placement.keys() == two_processes.nthreads().keys()
    assert all(llm.residency().values())


def refuse_second_version() -> None:
    """Have this process open no version but the first: a disk that fails, say."""
    from daskllm.engine.layers import ResidentModel

    load = ResidentModel._prepare

    def fails(self: ResidentModel, name: str) -> Any:
        if self.version:
            raise ModelError(f"this worker cannot read {name}")
        return load(self, name)

    ResidentModel._prepare = fails  # type: ignore[method-assign]
    ResidentModel._whole = load  # type: ignore[attr-defined]


def refuse_no_more() -> None:
    from daskllm.engine.layers import ResidentModel

    ResidentModel._prepare = ResidentModel._whole  # type: ignore[method-assign, attr-defined]


@pytest.mark.cluster
def test_a_broken_update_leaves_all_workers_as_they_were(
    on_cluster: LLM, two_processes: Client, paths: dict[str, Path], texts: list[list[str]]
) -> None:
    llm = on_cluster
    llm.generate(PROMPTS * 4, max_tokens=2)
    before = on_workers(two_processes, llm)
    one = max(two_processes.nthreads())

    def fail() -> None:
        for what in ("missing", "shape"):
            with pytest.raises(ModelError, match=BROKEN[what]):
                llm.update(paths[what])
        two_processes.run(refuse_second_version, workers=[one])
        try:
            with pytest.raises(ModelError, match="this worker cannot read"):
                llm.update(paths["new"])
        finally:
            two_processes.run(refuse_no_more, workers=[one])

    for table in asked_meanwhile(llm, fail):
        assert check_rows(table, texts, [0]) == {0}
    assert (llm.version, on_workers(two_processes, llm)) == (0, before)
    llm.update(paths["new"])
    assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 1, 1)


@pytest.mark.cluster
def test_another_client_hears_of_it(
    on_cluster: LLM, paths: dict[str, Path], texts: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cluster.update(paths["new"])
    monkeypatch.setattr(versions, "_history", {})  # as it is in another client's process
    assert on_cluster.version == 1
    monkeypatch.setattr(versions, "_history", {})
    assert "".join(on_cluster.stream(PROMPTS[0], **SAMPLING)) == texts[1][0]


@pytest.mark.cluster
def test_who_joins_later_has_the_new_version(paths: dict[str, Path], texts: list[list[str]]) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        llm = daskllm.load(paths["old"], client=client)
        (first,) = client.nthreads()
        llm.update(paths["new"])
        llm.update(paths["old"])
        llm.update(paths["new"])
        cluster.scale(2)
        client.wait_for_workers(2)
        (joined,) = set(client.nthreads()) - {first}
        assert client.run(versions.present, llm.spec, workers=[joined])[joined].version == 3
        client.retire_workers([first], close_workers=True, remove=True)
        assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 3, 1)
        llm.close()


@pytest.mark.cluster
def test_a_lost_stage_of_the_new_version_has_heirs(paths: dict[str, Path], texts: list[list[str]]) -> None:
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        llm = daskllm.load(paths["old"], client=client, stages=2)
        stream = llm.stream(PROMPTS[0], max_tokens=60, ignore_eos=True)
        begun = next(stream)
        llm.update(paths["new"])
        lost = llm.spec.stages[0].worker
        os.kill(client.run(os.getpid, workers=[lost])[lost], signal.SIGKILL)
        # The rows of both versions are done again, each on its own weights.
        assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 1, 1)
        assert (begun + "".join(stream))[:8] == texts[0][0][:8]
        eventually(lambda: on_workers(client, llm)[0] <= {(), (1,)})
        llm.update(paths["old"])  # from where the stages are now
        assert all_of(llm.generate(PROMPTS, **SAMPLING), texts, 2, 0)
        eventually(lambda: on_workers(client, llm)[0] <= {(), (2,)})
        llm.close()
        assert on_workers(client, llm)[0] == {()}
