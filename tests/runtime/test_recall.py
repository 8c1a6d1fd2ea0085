"""Rows that need no model: they are the same answers, and the model is not asked for them."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import daskllm
from daskllm.answers import Answers
from daskllm.llm import LLM
from daskllm.runtime.call import Call
from daskllm.runtime.process import session_for
from daskllm.runtime.progress import Increment, Reporter, follow
from daskllm.runtime.recall import _facts, generated, place_for
from daskllm.runtime.tasks import answer_rows
from daskllm.session import Progress
from daskllm.types import Completion, ModelSpec, RowError, SamplingParams
from tests import tiny
from tests.fake_session import FakeLLM, FakeSpec

TEXTS = ["a", "b", None, "c", "a", "a"]
TABLE = pd.DataFrame({"text": TEXTS})


@pytest.fixture
def kept(tmp_path: Path) -> str:
    return str(tmp_path / "answers")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    llm = daskllm.load(tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model")))
    yield llm
    llm.close()


# --- a fake model: which rows are asked ---------------------------------------------------------------


def test_a_second_run_asks_nothing_but_what_failed(fake: FakeLLM, kept: str) -> None:
    fake.answers = kept
    first = TABLE.llm.generate(fake, "text")
    assert fake.rows == 4
    heard: list[Increment] = []
    with follow(None, heard.append):
        again = TABLE.llm.generate(fake, "text")
    pd.testing.assert_frame_equal(first, again)
    assert fake.rows == 5
    assert sum(i.rows for i in heard) == 6
    assert sum(i.remembered for i in heard) == 5
    assert sum(i.errors for i in heard) == 1
    assert fake.session().metrics.remembered == 2 + 5


def test_equal_rows_are_asked_once(fake: FakeLLM) -> None:
    heard: list[Increment] = []
    with follow(None, heard.append):
        answers = TABLE.llm.generate(fake, "text", temperature=1.0, seed=3)["generated"]
    assert fake.rows == 4
    assert answers[0] == answers[4] == answers[5]
    assert (sum(i.rows for i in heard), sum(i.remembered for i in heard)) == (6, 2)
    # By place each draws for itself.
    answers = TABLE.llm.generate(fake, "text", temperature=1.0)["generated"]
    assert fake.rows == 4 + 6
    assert len({answers[0], answers[4], answers[5]}) == 3


@pytest.mark.parametrize("kind", ["list", "dask", "bag"])
def test_every_way_to_ask_uses_them(llm: LLM, kept: str, kind: str) -> None:
    ask = {
        "list": lambda model: model.generate(["q", "r"], max_tokens=3),
        "dask": lambda model: (
            dd.from_pandas(pd.DataFrame({"t": ["q", "r"]}), npartitions=2)
            .llm.generate(model, "t", max_tokens=3)["generated"]
            .compute()
            .tolist()
        ),
        "bag": lambda model: model.generate(
            dask.bag.from_sequence(["q", "r"], npartitions=2), max_tokens=3
        ).compute(scheduler="threads"),
    }[kind]
    with_answers = LLM(llm.spec, answers=kept)
    assert ask(with_answers) == ask(llm)
    before = llm.session().metrics.sequences
    assert ask(with_answers) == ask(with_answers)
    assert llm.session().metrics.sequences == before


def test_where_they_are_kept_changes_no_key(fake: FakeLLM) -> None:
    frame = dd.from_pandas(TABLE, npartitions=2)
    keys = [
        frame.llm.generate(replace(fake, answers=place), "text").__dask_keys__() for place in (None, "/a")
    ]
    assert keys[0] == keys[1]
    assert keys[0] != frame.llm.generate(fake, "text", max_tokens=7).__dask_keys__()


def test_what_has_finished_outlives_an_interrupt(tmp_path: Path, kept: str) -> None:
    spec = FakeSpec(log=str(tmp_path / "log"), gate=str(tmp_path / "gate"), free=2)
    session: Any = session_for(spec)  # type: ignore[arg-type]
    call = Call(spec=spec, kind="generate", answers=kept)  # type: ignore[arg-type]
    prompts, places = ["a", "b", "c", "d"], [(0, row) for row in range(4)]
    with pytest.raises(InterruptedError):
        generated(session, prompts, call, places, Reporter(None), lambda: True)
    Path(str(spec.gate)).touch()
    asked = len(Path(spec.log).read_text().splitlines())
    answers = generated(session, prompts, call, places, Reporter(None), lambda: False)
    assert [row[0].text for row in answers] == ["<a>", "<b>", "<c>", "<d>"]
    assert len(Path(spec.log).read_text().splitlines()) - asked == 2


@pytest.mark.cluster
def test_what_has_finished_outlives_its_worker(tmp_path: Path, kept: str) -> None:
    llm = FakeLLM(FakeSpec(log=str(tmp_path / "log"), gate=str(tmp_path / "gate"), free=3), kept)
    frame = dd.from_pandas(pd.DataFrame({"text": list("abcdef")}), npartitions=1)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        ((_, pid),) = client.run(os.getpid).items()
        future = client.compute(frame.llm.generate(llm, "text", temperature=1.0))
        end = time.monotonic() + 30
        while not list(Path(kept).rglob("*.arrow")):
            assert time.monotonic() < end, "nothing was kept"
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        Path(str(llm.spec.gate)).touch()
        answers = future.result(timeout=60)["generated"]
    assert [text.split()[0] for text in answers] == [f"<{letter}>" for letter in "abcdef"]
    assert llm.rows == 6 + 3
    assert len(set(llm.processes)) == 2


# --- a tiny model: the answers are those of an undisturbed run --------------------------------------

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 8, "logprobs": 2},
    "seeded": {"max_tokens": 8, "temperature": 1.0, "seed": 5, "stop": ["e"]},
    "by place": {"max_tokens": 8, "temperature": 1.0, "n": 2, "logprobs": 0},
}


@pytest.mark.parametrize("sampling", SAMPLING)
def test_half_of_the_rows_remembered(llm: LLM, kept: str, sampling: str) -> None:
    params = SamplingParams.of(SAMPLING[sampling])
    call = Call(spec=llm.spec, kind="generate", params=params, job_seed=77)
    rows: list[tuple[Any, ...]] = [(text,) for text in ["one", "two", "three", "", "two", "x" * 400, "four"]]
    places = [(0, row) for row in range(len(rows))]
    expected = answer_rows(rows, call, places)
    remembering = replace(call, answers=kept)
    assert answer_rows(rows[::2], remembering, places[::2]) == expected[::2]
    metrics = llm.session().metrics
    before, remembered = metrics.sequences, metrics.remembered
    assert answer_rows(rows, remembering, places) == expected
    # Remembered: "one", "three", "two" and "four"; the other "two" is the same row unless it draws by place.
    assert metrics.sequences - before == (2 if call.by_place else 0) * params.n / 2
    assert metrics.remembered - remembered == (4 if call.by_place else 5)
    before = metrics.sequences
    assert answer_rows(rows, remembering, places) == expected
    assert metrics.sequences == before


def test_what_tells_answers_apart(llm: LLM) -> None:
    spec, params = llm.spec, SamplingParams(max_tokens=3)

    def facts(model: ModelSpec = spec, **changes: Any) -> dict[str, Any]:
        return _facts(params.with_(**changes), model)

    same = [facts(replace(spec, path="/copy", kv_memory=5, copy=1)), facts(seed=4), facts(truncate="left")]
    assert same == [facts()] * len(same)
    other = [
        *(
            facts(replace(spec, **{name: "x"}))
            for name in ("identity", "dtype", "device", "quantize", "kv_dtype")
        ),
        facts(replace(spec, version=1)),
        facts(max_tokens=4),
        facts(n=2),
        facts(logprobs=0),
        facts(stop="."),
        facts(temperature=0.5),
        facts(ignore_eos=True),
    ]
    assert all(one != facts() for one in other)
    assert len({repr(one) for one in other}) == len(other)


def test_the_seed_tells_rows_apart(llm: LLM, kept: str) -> None:
    remembering = LLM(llm.spec, answers=kept)
    sampling: dict[str, Any] = {"max_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    ids = {remembering.generate("again", seed=seed, **sampling).token_ids for seed in (1, 2, 1, 2)}
    assert len(ids) == 2


def test_a_model_without_an_identity_is_not_remembered(llm: LLM, kept: str) -> None:
    call = Call(spec=replace(llm.spec, identity=""), kind="generate", answers=kept)
    session = session_for(call.spec)
    generated(session, ["a"], call, [(0, 0)], Reporter(None), lambda: False)
    session.close()
    assert not Path(kept).exists()


def test_rows_go_on_where_nothing_can_be_kept(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("in the way")
    assert LLM(llm.spec, answers=str(tmp_path / "answers")).generate(["q"]) == llm.generate(["q"])
    assert LLM(llm.spec, answers="nosuch://place").generate(["q"]) == llm.generate(["q"])


# --- a session hands out what has finished ----------------------------------------------------------


def test_rows_are_handed_out_once(llm: LLM) -> None:
    prompts = ["a", RowError("no cell"), "b", "x" * 400, [1, 2, 3]]
    rows: list[tuple[int, list[Completion]]] = []
    counted: list[Progress] = []

    def progress(counts: Progress) -> None:
        counted.append(counts)
        assert sum(c.rows for c in counted) == len(rows)  # they were handed out before

    answers = llm.session().generate(
        prompts, SamplingParams(max_tokens=4, n=2), progress=progress, finished=rows.extend
    )
    assert sorted(row for row, _ in rows) == list(range(len(prompts)))
    assert all(answers[row] is samples for row, samples in rows)


def test_what_is_encoded_is_answered_alike(llm: LLM) -> None:
    session = llm.session()
    prompts = ["a", "", RowError("no cell"), "x" * 400, [1, 2, 3], [{"role": "user", "content": "hello"}]]
    for changes in ({}, {"truncate": "left"}):
        params = SamplingParams(max_tokens=3, **changes)
        encoded = session.encode(prompts, params)
        assert session.generate(encoded, params) == session.generate(prompts, params)


def test_cancelled_rows_hand_out_what_has_finished(llm: LLM) -> None:
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=240, ignore_eos=True)
    rows: list[tuple[int, list[Completion]]] = []
    one_is_done = threading.Event()

    def finished(done: Any) -> None:
        rows.extend(done)
        one_is_done.set()

    with pytest.raises(InterruptedError):
        llm.session().generate(
            ["a", *["b"] * 60], [short, *[long] * 60], finished=finished, cancelled=one_is_done.is_set
        )
    assert rows[0][0] == 0
    assert len(rows) < 61


# --- where answers are kept -------------------------------------------------------------------------


def test_the_place_comes_from_the_user_or_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert [place_for(None), place_for(False), place_for("auto")] == [None, None, None]
    with dask.config.set({"daskllm.answers": True}):
        assert place_for("auto") == "/caches/daskllm/answers"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert place_for("auto") == "~/.cache/daskllm/answers"
    with dask.config.set({"daskllm.answers": "/somewhere"}):
        assert place_for("auto") == "/somewhere"
    assert place_for("here") == place_for(Path("here")) == str(tmp_path / "here")
    assert place_for("memory://answers") == "memory://answers"
    for wrong in (True, 3, ""):
        with pytest.raises(TypeError, match="answers must be"):
            place_for(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nosuch"):
        place_for("nosuch://bucket")


def test_home_is_that_of_whoever_opens_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    one = Answers("~/answers", "s")
    one.put({b"k" * 16: [Completion("x", (1,), "stop", 1, 1)]})
    one.flush()
    assert len(list((tmp_path / "answers" / "s").iterdir())) == 1


def test_a_handle_keeps_its_place(tmp_path: Path) -> None:
    path = tiny.make_model("gpt2", tmp_path / "model")
    llm = daskllm.load(path, answers=tmp_path / "answers")
    assert pickle.loads(pickle.dumps(llm)).answers == llm.answers == str(tmp_path / "answers")
    assert daskllm.load(path).answers is None
    with pytest.raises(TypeError, match="answers"):
        daskllm.load(path, answers=3)  # type: ignore[arg-type]
    llm.close()
