"""`LLM` and `load`: what is given back for what is given, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client

import daskllm
from daskllm.llm import LLM
from daskllm.runtime import process
from daskllm.runtime.loading import open_on
from daskllm.runtime.process import open_session
from daskllm.types import Completion, ModelError, RowError
from tests.fake_session import FakeLLM, FakeSession, FakeSpec, FakeTokenizer

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"


class Fake(LLM):
    """An `LLM` over a fake session."""

    tokenizer = FakeTokenizer()  # type: ignore[assignment]


@pytest.fixture
def llm(fake: FakeLLM) -> LLM:
    return Fake(fake.spec)  # type: ignore[arg-type]


def test_generate_gives_the_like_of_what_it_is_given(llm: LLM) -> None:
    one = llm.generate("a", max_tokens=3)
    assert isinstance(one, Completion)
    assert one.text == "<a>"
    assert llm.generate(["a", [1, 2], ("b"), np.array([3])]) == [
        llm.generate("a"),
        *llm.generate([[1, 2]]),
        llm.generate("b"),
        *llm.generate([[3]]),
    ]
    assert [c.text for c in llm.generate(np.array(["a", "b"]))] == ["<a>", "<b>"]
    assert llm.generate([]) == []
    series = pd.Series(["a", None], index=[5, 3], name="q")
    out = llm.generate(series)
    assert list(out.index) == [5, 3]
    assert list(out.columns)[:2] == ["generated", "generated_finish_reason"]
    assert out["generated"].iloc[0] == "<a>"
    lazy = llm.generate(dd.from_pandas(series, sort=False, npartitions=2))
    pd.testing.assert_frame_equal(lazy.compute(), out)
    bag = llm.generate(db.from_sequence(["a", "b", "c"], npartitions=2))
    assert [c.text for c in bag.compute(scheduler="sync")] == ["<a>", "<b>", "<c>"]


def test_several_samples_are_a_list(llm: LLM) -> None:
    one = llm.generate("a", n=2)
    assert [c.text for c in one] == ["<a>", "<a>"]
    many = llm.generate(["a", "b"], n=2)
    assert [[c.text for c in samples] for samples in many] == [["<a>", "<a>"], ["<b>", "<b>"]]


def test_a_bad_row_of_a_list_is_that_rows_error(llm: LLM) -> None:
    answers = llm.generate(["a", None, float("nan"), pd.NA, {"b": 1}, [1.5], 7])
    assert [c.finish_reason == "error" for c in answers] == [False, True, True, True, True, True, False]
    assert answers[6].text == "<7>"
    assert all(c.error and c.text is None for c in answers[1:6])


@pytest.mark.parametrize("prompts", [None, 3, b"a", {"a": 1}, {"a"}, iter("ab"), [1, 2]])
def test_what_is_no_prompt_is_a_type_error(llm: LLM, fake: FakeLLM, prompts: Any) -> None:
    with pytest.raises(TypeError):
        llm.generate(prompts)
    assert fake.rows == 0


def test_tables_are_sent_to_their_accessor(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"df\.llm\.generate"):
        llm.generate(pd.DataFrame({"text": ["a"]}))


def test_arguments_are_checked_before_any_work(llm: LLM, fake: FakeLLM) -> None:
    with pytest.raises(ValueError, match="temperature"):
        llm.generate("a", temperature=-1)
    with pytest.raises(TypeError, match="maxtokens"):
        llm.chat("a", maxtokens=3)
    with pytest.raises(ValueError, match="n must be 1"):
        llm.stream("a", n=2)
    with pytest.raises(TypeError, match="tokens"):
        llm.score(["a"], tokens=1)
    assert fake.rows == 0


def test_chat_takes_one_conversation_or_many(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    assert llm.chat(talk).text == f"<{talk}>"
    assert llm.chat("hi").text == f"<{talk}>"
    assert [c.text for c in llm.chat([talk, "hi"])] == [f"<{talk}>"] * 2
    assert llm.chat(pd.Series([talk, "hi"]))["generated"].nunique() == 1


def test_score_gives_numbers(llm: LLM) -> None:
    scores = llm.score(["ab", None, [1, 2, 3]])
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [-2.0, np.nan, -3.0])
    assert llm.score("ab") == -2.0
    assert llm.score(["ab", None], tokens=True) == [[-1.0, -1.0], None]
    assert llm.score("ab", tokens=True) == [-1.0, -1.0]
    assert list(llm.score(pd.Series(["ab"])).columns) == ["score", "score_tokens", "score_error"]
    assert llm.score(db.from_sequence(["ab", "abc"])).compute(scheduler="sync") == [-2.0, -3.0]
    assert llm.score([]).shape == (0,)


def test_unseeded_draws_differ_between_rows_and_calls(llm: LLM) -> None:
    texts = [c.text for c in llm.generate(["a"] * 20, temperature=1.0)]
    texts += [c.text for c in llm.generate(["a"] * 20, temperature=1.0)]
    bag = llm.generate(db.from_sequence(["a"] * 20, npartitions=4), temperature=1.0)
    texts += [c.text for c in bag.compute(scheduler="sync")]
    assert len(set(texts)) == 60
    assert len({"".join(llm.stream("a", temperature=1.0)) for _ in range(5)}) == 5
    assert len({c.text for c in llm.generate(["a"] * 20, temperature=1.0, seed=1)}) == 1


def test_stream_joins_to_the_text(llm: LLM) -> None:
    assert "".join(llm.stream("abc")) == "<abc>"
    with pytest.raises(RowError):
        list(llm.stream(None))  # type: ignore[arg-type]


def test_an_llm_travels_as_its_specification(llm: LLM) -> None:
    data = pickle.dumps(LLM(llm.spec, client="a client would not pickle"))  # type: ignore[arg-type]
    assert len(data) < 1000
    back = pickle.loads(data)
    assert back.spec == llm.spec
    assert back.client is None
    assert "fake" in repr(back)


def test_the_seeds_functions_give_continuations_in_order(llm: LLM, fake: FakeLLM) -> None:
    prompts = [f"p{i}" for i in range(10)]
    for workers in (1, 3, 20):
        assert daskllm.parallel_generate_text(prompts, llm, workers) == [f"<{p}>" for p in prompts]
    assert daskllm.generate_text("深度", llm, max_length=5) == "<深度>"
    assert daskllm.parallel_generate_text([], llm) == []
    with pytest.raises(RowError, match="null"):
        daskllm.parallel_generate_text(["a", None], llm)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="num_workers"):
        daskllm.parallel_generate_text(["a"], llm, 0)
    with pytest.raises(ValueError, match="max_tokens"):
        daskllm.generate_text("a", llm, max_length=0)
    with pytest.raises(TypeError, match="prompt"):
        daskllm.generate_text(["a"], llm)  # type: ignore[arg-type]


@pytest.mark.cluster
def test_lists_and_bags_go_over_the_current_client(llm: LLM, fake: FakeLLM, two_processes: Client) -> None:
    prompts = [f"p{i}" for i in range(100)]
    assert [c.text for c in llm.generate(prompts)] == [f"<{p}>" for p in prompts]
    there = set(fake.processes)
    assert len(there) == 2
    bag = llm.generate(db.from_sequence(prompts, npartitions=4))
    assert [c.text for c in bag.compute()] == [f"<{p}>" for p in prompts]
    assert daskllm.parallel_generate_text(prompts, llm) == [f"<{p}>" for p in prompts]
    assert set(fake.processes) == there
    llm.close()


def test_a_bag_is_not_computed_by_the_call(llm: LLM, fake: FakeLLM) -> None:
    bag = db.from_sequence(["a"], npartitions=1)
    assert llm.generate(bag).name == llm.generate(bag).name
    assert fake.rows == 0


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"dtype": "int8"}, ValueError),
        ({"device": "tpu"}, ValueError),
        ({"quantize": "int4"}, ValueError),
        ({"kv_dtype": "int4"}, ValueError),
        ({"kv_dtype": None}, ValueError),
        ({"plan": "greedy"}, ValueError),
        ({"stages": 2}, ValueError),
        ({"replicas": 2}, ValueError),
        ({"kv_memory": "much"}, ValueError),
        ({"kv_memory": 0}, ValueError),
        ({"kv_memory": 1.5}, TypeError),
        ({"client": "tcp://127.0.0.1:8786"}, TypeError),
    ],
)
def test_load_checks_its_arguments_first(
    tmp_path: Path, argument: dict[str, Any], error: type[Exception]
) -> None:
    (name,) = argument
    with pytest.raises(error, match=name):
        daskllm.load(tmp_path, **argument)


def test_load_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        daskllm.load(tmp_path)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the trained model is not here")
@pytest.mark.cluster
def test_a_real_model_answers_alike_here_and_on_a_cluster(two_processes: Client) -> None:
    prompts = ["Once upon a time", "Lily and", None, [1]]
    llm = daskllm.load(STORIES, kv_memory="64 MiB")
    there = llm.generate(prompts, max_tokens=20)
    assert llm.spec.kv_memory == 64 << 20
    with dask.config.set(scheduler="threads"):
        here = daskllm.load(str(STORIES), kv_memory=64 << 20).generate(prompts, max_tokens=20)
    assert there == here
    assert here[2].finish_reason == "error"
    assert llm.config.vocab_size == llm.tokenizer.vocab_size
    llm.close()


@pytest.mark.cluster
def test_load_on_a_cluster_raises_what_its_workers_raise(tmp_path: Path, two_processes: Client) -> None:
    with pytest.raises(ModelError):
        daskllm.load(tmp_path, client=two_processes)


@pytest.mark.cluster
def test_nothing_stays_open_where_one_worker_cannot_open(
    tmp_path: Path, fake: FakeLLM, two_processes: Client
) -> None:
    broken, *_ = two_processes.run(os.getpid).values()
    spec = FailsOn(log=fake.spec.log, process=broken)
    with pytest.raises(ModelError, match="is broken"):
        open_on(two_processes, spec)  # type: ignore[arg-type]
    assert set(two_processes.run(_is_open, spec).values()) == {False}


@dataclass(frozen=True)
class FailsOn(FakeSpec):
    """A fake model that one process cannot open."""

    process: int = 0
    stages: tuple[Any, ...] = ()


@open_session.register
def _open_but(spec: FailsOn) -> FakeSession:
    if os.getpid() == spec.process:
        raise ModelError(f"{spec.path} is broken")
    return FakeSession(spec)


def _is_open(spec: Any) -> bool:
    return spec in process._sessions


@pytest.mark.cluster
def test_a_model_outlives_its_client_and_closes(fake: FakeLLM, two_processes_cluster: Any) -> None:
    client = Client(two_processes_cluster)
    llm = Fake(fake.spec, client)  # type: ignore[arg-type]
    assert llm.generate("a").text == "<a>"
    client.close()
    llm.close()


@pytest.mark.cluster
def test_prompts_go_over_the_model_s_own_client(fake: FakeLLM, two_processes_cluster: Any) -> None:
    with Client(two_processes_cluster, set_as_default=False) as client:
        llm = Fake(fake.spec, client)  # type: ignore[arg-type]
        assert daskllm.parallel_generate_text(["a", "b"], llm) == ["<a>", "<b>"]
        assert set(fake.processes) <= {str(pid) for pid in client.run(os.getpid).values()}
        llm.close()


def test_a_series_of_token_ids_and_of_bad_cells(llm: LLM) -> None:
    series = pd.Series([[1, 2], np.array([3]), "a", 7, None, b"a"], dtype=object)
    out = llm.generate(series)
    assert list(out["generated"][:4]) == ["<[1, 2]>", "<[3]>", "<a>", "<7>"]
    assert list(out["generated_finish_reason"] == "error") == [False] * 4 + [True] * 2
    assert not out["generated_error"].str.contains("prompt text").any()
    assert list(llm.score(series)["score"][:3]) == [-2.0, -1.0, -1.0]


def test_importing_gives_tables_their_accessor_and_no_torch() -> None:
    code = (
        "import sys, json, daskllm, pandas as pd, dask.dataframe as dd\n"
        "assert pd.DataFrame.llm and dd.DataFrame.llm\n"
        "print(json.dumps([m for m in ('torch', 'numba', 'distributed') if m in sys.modules]))\n"
        "assert sorted(set(daskllm.__all__) - set(dir(daskllm))) == []\n"
        "daskllm.load\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    with pytest.raises(AttributeError, match="nothing"):
        daskllm.nothing  # noqa: B018
