"""``df.llm`` on pandas and Dask, over a session without a model."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.distributed import Client
from dask.utils import key_split

from daskllm.runtime.slices import SLICES
from daskllm.types import SamplingParams
from tests.fake_session import FakeLLM

ADDED = [
    "generated",
    "generated_finish_reason",
    "generated_prompt_tokens",
    "generated_completion_tokens",
    "generated_error",
]


@pytest.fixture
def table() -> pd.DataFrame:
    """Forty rows: some null, some empty, an index with gaps, a number and a float beside the text."""
    text: list[Any] = [f"row {i}" for i in range(40)]
    text[3] = None
    text[17] = ""
    return pd.DataFrame(
        {"id": range(40), "text": text, "x": np.linspace(0, 1, 40)}, index=pd.RangeIndex(0, 80, 2, name="key")
    )


def dask_table(table: pd.DataFrame, npartitions: int = 3) -> Any:
    return dd.from_pandas(table, npartitions=npartitions, sort=True)


def test_pandas_gets_five_columns_and_keeps_the_rest(fake: FakeLLM, table: pd.DataFrame) -> None:
    before = table.copy()
    out = table.llm.generate(fake, "Say {text}!")
    assert list(out.columns) == ["id", "text", "x", *ADDED]
    assert out["generated"].iloc[0] == "<Say row 0!>"
    assert out["generated_completion_tokens"].iloc[0] == len("<Say row 0!>")
    pd.testing.assert_frame_equal(out[["id", "text", "x"]], before)
    pd.testing.assert_frame_equal(table, before)


def test_a_bad_row_is_null_and_says_why(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = table.llm.generate(fake, "text")
    bad = out[out["generated_finish_reason"] == "error"]
    assert list(bad["id"]) == [3, 17]
    assert bad["generated"].isna().all()
    assert "null" in bad["generated_error"].iloc[0]
    assert "empty" in bad["generated_error"].iloc[1]
    assert out["generated_error"].isna().sum() == 38


@pytest.mark.parametrize("npartitions", [1, 3, 17])
@pytest.mark.parametrize("scheduler", ["threads", "sync"])
def test_dask_gives_what_pandas_gives(
    fake: FakeLLM, table: pd.DataFrame, npartitions: int, scheduler: str
) -> None:
    frame = dask_table(table, npartitions)
    out = frame.llm.generate(fake, "Say {text}!")
    assert out.divisions == frame.divisions
    assert out.npartitions == frame.npartitions
    with dask.config.set(scheduler=scheduler):
        got = out.compute()
    expected = table.llm.generate(fake, "Say {text}!")
    pd.testing.assert_frame_equal(got, expected.astype({"text": got["text"].dtype}))


def test_dtypes_are_fixed_beforehand(fake: FakeLLM, table: pd.DataFrame) -> None:
    for sampling in ({}, {"n": 2}, {"logprobs": 0}):
        out = dask_table(table).llm.generate(fake, "text", **sampling)
        for partition in out.partitions:
            assert list(partition.compute().dtypes) == list(out.dtypes)
    out = dask_table(table).llm.generate(fake, "text")
    assert [str(out.dtypes[name]) for name in ADDED] == ["str", "str", "int64", "int64", "str"]


def test_building_and_what_needs_no_answers_do_not_run_the_model(fake: FakeLLM, table: pd.DataFrame) -> None:
    for sampling in ({}, {"temperature": 1.0}):
        out = dask_table(table).llm.generate(fake, "text", **sampling)
        assert len(out) == 40
        assert out.shape[0].compute() == 40
        assert list(out.index.compute()) == list(table.index)
        pd.testing.assert_frame_equal(out[["id"]].compute(), table[["id"]])
        assert out.id.sum().compute() == table["id"].sum()
        assert list(out[out.id > 30][["id"]].compute()["id"]) == list(range(31, 40))
        assert len(out[out.id > 30]) == 9
        assert out.drop(columns=ADDED).compute().shape == (40, 3)
    assert fake.rows == 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}])
def test_a_filter_on_the_input_runs_the_model_on_the_rows_that_stay(
    fake: FakeLLM, table: pd.DataFrame, sampling: dict[str, Any]
) -> None:
    out = dask_table(table).llm.generate(fake, "text", **sampling)
    whole = out.compute()
    ran = fake.rows
    kept = out[out.id > 30].compute()
    assert fake.rows - ran == 9
    pd.testing.assert_frame_equal(kept, whole[whole["id"] > 30])


def test_a_filter_on_both_runs_the_model_on_what_the_inputs_leave(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dask_table(table).llm.generate(fake, "text")
    kept = out[(out.id > 30) & (out.generated != "<row 33>")].compute()
    assert list(kept["id"]) == [31, 32, *range(34, 40)]
    assert fake.rows == 9


def test_a_filter_on_the_answers_sees_all_of_them(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dask_table(table).llm.generate(fake, "text")
    longest = out[out.generated_completion_tokens >= out.generated_completion_tokens.max()][["id"]].compute()
    assert list(longest["id"]) == [i for i in range(10, 40) if i != 17]
    mixed = out[(out.id > 30) & (out.id > out.generated_prompt_tokens.sum())].compute()
    assert len(mixed) == 0


def test_a_filter_is_not_pushed_when_the_rest_is_wanted_too(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dask_table(table).llm.generate(fake, "text")
    kept, whole = dask.compute(out[out.id > 30], out)
    assert fake.rows == 40
    pd.testing.assert_frame_equal(kept, whole[whole["id"] > 30])


def test_head_answers_the_rows_that_it_shows(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dask_table(table).llm.generate(fake, "text")
    assert list(out.head(2)["generated"]) == ["<row 0>", "<row 1>"]
    assert fake.rows == 2


def test_columns_that_nobody_wants_are_not_read(fake: FakeLLM, table: pd.DataFrame, tmp_path: Path) -> None:
    dask_table(table).to_parquet(tmp_path / "table")
    out = dd.read_parquet(tmp_path / "table").llm.generate(fake, "text")
    plan = out[["id", "generated"]].optimize(fuse=False).expr
    (read,) = {node._name: node for node in plan.walk() if not node.dependencies()}.values()
    assert sorted(read.columns) == ["id", "text"]


def test_unseeded_draws_are_the_same_however_the_job_is_looked_at(fake: FakeLLM, tmp_path: Path) -> None:
    table = pd.DataFrame({"id": range(40), "text": "the same", "more": 1, "and": 2, "yet": 3})
    dask_table(table, 17).to_parquet(tmp_path / "table")
    for frame in (dask_table(table, 7), dd.read_parquet(tmp_path / "table")):
        out = frame.llm.generate(fake, "text", temperature=1.0)
        whole = out.compute()
        assert whole["generated"].nunique() == 40
        pd.testing.assert_frame_equal(out.compute(), whole)
        pd.testing.assert_frame_equal(out[["generated"]].compute(), whole[["generated"]])
        pd.testing.assert_frame_equal(out.tail(2), whole.tail(2))
        pd.testing.assert_frame_equal(out.head(9, npartitions=-1), whole.head(9))
        pd.testing.assert_frame_equal(dd.concat(list(out.partitions)).compute(), whole)
        pd.testing.assert_frame_equal(out[frame.id > 30].compute(), whole[whole["id"] > 30])
        assert frame.llm.generate(fake, "text", temperature=1.0).compute()["generated"].nunique() == 40
        again = frame.llm.generate(fake, "text", temperature=1.0)["generated"].compute()
        assert (again != whole["generated"]).all()


def test_seeded_draws_do_not_depend_on_the_partitions(fake: FakeLLM, table: pd.DataFrame) -> None:
    answers = [
        list(dask_table(table, n).llm.generate(fake, "text", temperature=1.0, seed=5)["generated"].compute())
        for n in (1, 3, 17)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_names_are_hashes_of_the_question(fake: FakeLLM, table: pd.DataFrame) -> None:
    frame = dask_table(table)
    again = FakeLLM(fake.spec)
    assert frame.llm.generate(fake, "text")._name == frame.llm.generate(again, "text")._name
    assert frame.llm.generate(fake, "text")._name != frame.llm.generate(fake, "text", max_tokens=3)._name
    assert frame.llm.generate(fake, "text")._name != frame.llm.chat(fake, "text")._name
    sampled = frame.llm.generate(fake, "text", temperature=1.0)
    assert sampled._name != frame.llm.generate(fake, "text", temperature=1.0)._name


def test_keys_begin_with_the_kind_of_call(fake: FakeLLM, table: pd.DataFrame) -> None:
    frame = dask_table(table)
    for kind in ("generate", "chat", "score", "embed"):
        assert getattr(frame.llm, kind)(fake, "text")._name.startswith(f"{kind}-")


def test_slices_are_tasks_of_their_own_and_the_rest_is_fused(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dask_table(table).assign(more=1).llm.generate(fake, "text").assign(length=0)
    keys = Counter(key_split(key) for key in out.optimize().__dask_graph__())
    slices = [keys.pop(name) for name in ("generate", "generate-two", "generate-four", "generate-eight")]
    assert sum(slices) == 3 * SLICES
    # The read, the cut, and the merge with what comes after it.
    assert sum(keys.values()) == 4 * 3
    assert keys["generate-cut"] == 3
    pd.testing.assert_frame_equal(
        out.compute()[["id", "generated"]], table.llm.generate(fake, "text")[["id", "generated"]]
    )


def test_parts_of_a_table_are_cut_alone(fake: FakeLLM, table: pd.DataFrame) -> None:
    """Dask takes the head, the tail and a partition of a filter on the answers from below the slices."""
    out = dask_table(table, 4).llm.generate(fake, "text")
    kept = out[out.generated != "<row 0>"]
    assert list(kept.head(2)["id"]) == [1, 2]
    assert list(kept.tail(2)["id"]) == [38, 39]
    assert fake.rows == 20
    assert list(kept.partitions[[1, 2]].compute()["id"]) == list(range(10, 30))
    assert fake.rows == 40


def test_answers_of_answers(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dask_table(table).llm.generate(fake, "text").llm.generate(fake, "generated", output="again")
    answers = out.compute()
    assert list(answers["again"].dropna()) == [f"<<row {i}>>" for i in range(40) if i not in (3, 17)]
    assert out.divisions == dask_table(table).divisions


def test_the_graph_holds_no_model(fake: FakeLLM) -> None:
    frame = dd.from_map(_part, range(17))
    fake.session().weights = np.zeros(10_000_000)
    out = frame.llm.generate(fake, "text")
    assert len(pickle.dumps(out.optimize().__dask_graph__())) < 20_000


def _part(number: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"part {number}"]})


def test_samples_are_lists_and_their_tokens_are_summed(fake: FakeLLM) -> None:
    table = pd.DataFrame({"text": ["a", None]})
    for frame in (table, dask_table(table, 2)):
        out = frame.llm.generate(fake, "text", n=2, logprobs=1, temperature=1.0, seed=1)
        out = out.compute() if isinstance(out, dd.DataFrame) else out
        first, second = out.iloc[0], out.iloc[1]
        assert len(set(first["generated"])) == 2
        assert first["generated_finish_reason"] == ["length", "length"]
        assert first["generated_completion_tokens"] == sum(len(text) for text in first["generated"])
        assert first["generated_prompt_tokens"] == 1
        assert [len(one) for one in first["generated_logprobs"]] == [len(t) for t in first["generated"]]
        assert second["generated"] is None
        assert second["generated_logprobs"] is None
        assert "null" in second["generated_error"]


def test_logprobs_are_those_of_the_chosen_tokens(fake: FakeLLM) -> None:
    out = pd.DataFrame({"text": ["a"]}).llm.generate(fake, "text", logprobs=0)
    assert list(out.columns)[-1] == "generated_logprobs"
    assert out["generated_logprobs"].iloc[0] == [-0.5] * 3


def test_score_adds_three_columns(fake: FakeLLM, table: pd.DataFrame) -> None:
    for frame in (table, dask_table(table)):
        out = frame.llm.score(fake, "text", output="likely")
        assert list(out.columns)[-3:] == ["likely", "likely_tokens", "likely_error"]
        assert [str(dtype) for dtype in out.dtypes[-3:]] == ["float64", "int64", "str"]
        out = out.compute() if isinstance(out, dd.DataFrame) else out
        assert out["likely"].iloc[0] == -5.0
        assert np.isnan(out["likely"].iloc[3])
        assert "null" in out["likely_error"].iloc[3]


def test_chat_takes_message_lists_text_and_templates(fake: FakeLLM) -> None:
    talk = [{"role": "system", "content": "S", "name": None}, {"role": "user", "content": "hi"}]
    table = pd.DataFrame({"m": [talk, "hi", None, [], 5, np.array(talk), {"role": "user"}]})
    out = table.llm.chat(fake, "m")
    said = "<[{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'hi'}]>"
    assert list(out["generated"].iloc[[0, 1, 4, 5]]) == [
        said,
        "<[{'role': 'user', 'content': 'hi'}]>",
        "<[{'role': 'user', 'content': '5'}]>",
        said,
    ]
    assert list(out["generated_finish_reason"] == "error") == [False, False, True, True, False, False, True]
    templated = pd.DataFrame({"m": ["x"]}).llm.chat(fake, "Say {m}", system="S", examples=[("q", "a")])
    assert templated["generated"].iloc[0] == (
        "<[{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'q'}, "
        "{'role': 'assistant', 'content': 'a'}, {'role': 'user', 'content': 'Say x'}]>"
    )


def test_message_lists_that_dask_made_text_are_refused_by_row(fake: FakeLLM) -> None:
    frame = dask_table(pd.DataFrame({"m": [[{"role": "user", "content": "hi"}]]}), 1)
    assert "convert-string" in frame.llm.chat(fake, "m").compute()["generated_error"].iloc[0]
    with dask.config.set({"dataframe.convert-string": False}):
        frame = dask_table(pd.DataFrame({"m": [[{"role": "user", "content": "hi"}]]}), 1)
        out = frame.llm.chat(fake, "m").compute()
    assert out["generated"].iloc[0] == "<[{'role': 'user', 'content': 'hi'}]>"


def test_message_lists_come_back_from_parquet(fake: FakeLLM, tmp_path: Path) -> None:
    pd.DataFrame({"m": [[{"role": "user", "content": "hi"}]]}).to_parquet(tmp_path / "m.parquet")
    out = dd.read_parquet(tmp_path / "m.parquet").llm.chat(fake, "m").compute()
    assert out["generated"].iloc[0] == "<[{'role': 'user', 'content': 'hi'}]>"


def test_system_and_examples_come_before_the_prompt(fake: FakeLLM) -> None:
    out = pd.DataFrame({"text": ["x"]}).llm.generate(fake, "text", system="S", examples=[("q", "a")])
    assert out["generated"].iloc[0].startswith("<[{'role': 'system', 'content': 'S'}, {'role': 'user'")
    twice = pd.DataFrame({"m": [[{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]]})
    assert "system" in twice.llm.chat(fake, "m", system="S")["generated_error"].iloc[0]


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        ({"prompt": "nothing"}, KeyError, "nothing"),
        ({"prompt": "Hi {nothing}"}, KeyError, "nothing"),
        ({"prompt": "Hi {text.upper}"}, ValueError, "text.upper"),
        ({"prompt": 7}, TypeError, "7"),
        ({"prompt": "text", "top_p": 2}, ValueError, "top_p"),
        ({"prompt": "text", "tempreature": 1}, TypeError, "tempreature"),
        ({"prompt": "text", "output": 3}, TypeError, "output"),
        ({"prompt": "text", "output": "text"}, ValueError, "'text'"),
        ({"prompt": "text", "output": "taken"}, ValueError, "taken_error"),
        ({"prompt": "text", "system": 3}, TypeError, "system"),
        ({"prompt": "text", "examples": ["ab"]}, TypeError, "examples"),
        ({"prompt": "text", "llm": "gpt2"}, TypeError, "daskllm.load"),
    ],
)
def test_a_bad_call_is_refused_before_any_work(
    fake: FakeLLM, call: dict[str, Any], error: type[Exception], named: str
) -> None:
    table = pd.DataFrame({"text": ["a"], "taken_error": [1]})
    for frame in (table, dask_table(table, 1)):
        with pytest.raises(error, match=named):
            frame.llm.generate(**{"llm": fake, **call})
    assert fake.rows == 0


def test_chat_is_refused_where_the_model_is_known_not_to_chat(fake: FakeLLM) -> None:
    class Mute(FakeLLM):
        tokenizer = SimpleNamespace(has_chat_template=False)

    with pytest.raises(ValueError, match="no chat template"):
        pd.DataFrame({"text": ["a"]}).llm.chat(Mute(fake.spec), "text")


def test_empty_tables_and_empty_partitions(fake: FakeLLM, table: pd.DataFrame) -> None:
    empty = table.iloc[:0].llm.generate(fake, "text")
    assert list(empty.dtypes[-5:].astype(str)) == ["str", "str", "int64", "int64", "str"]
    frame = dask_table(table, 4)
    frame = frame[frame.id > 33]
    for sampling in ({}, {"temperature": 1.0}):
        out = frame.llm.generate(fake, "text", **sampling)
        assert out.npartitions == 4
        assert [len(part.compute()) for part in out.partitions] == [0, 0, 0, 6]


def test_labels_that_are_no_text(fake: FakeLLM) -> None:
    out = pd.DataFrame({0: ["a"], 1.5: ["b"]}).llm.generate(fake, 0)
    assert out["generated"].iloc[0] == "<a>"
    assert pd.DataFrame({0: ["a"], "x": ["b"]}).llm.generate(fake, "{0}{x}")["generated"].iloc[0] == "<ab>"
    levels = pd.DataFrame([["a", 1]], columns=pd.MultiIndex.from_tuples([("p", "q"), ("r", "s")]))
    out = levels.llm.generate(fake, ("p", "q"))
    assert out[("generated", "")].iloc[0] == "<a>"
    assert list(out.columns[:2]) == [("p", "q"), ("r", "s")]


def test_columns_of_the_same_name(fake: FakeLLM) -> None:
    table = pd.DataFrame([["a", 1, 2]], columns=["text", "x", "x"])
    out = table.llm.generate(fake, "text")
    assert list(out.columns[:3]) == ["text", "x", "x"]
    assert out["generated"].iloc[0] == "<a>"
    with pytest.raises(ValueError, match="more than once"):
        table.llm.generate(fake, "{text}{x}")


def test_rows_of_the_same_index_keep_their_answers(fake: FakeLLM) -> None:
    table = pd.DataFrame({"text": ["a", "b", "c"]}, index=[7, 7, 1])
    out = table.llm.generate(fake, "text")
    assert list(out["generated"]) == ["<a>", "<b>", "<c>"]
    assert list(out.index) == [7, 7, 1]


def test_an_error_that_quotes_a_lone_surrogate_fits_a_text_column(fake: FakeLLM) -> None:
    table = pd.DataFrame({"m": pd.Series([[{"text": "\ud800"}]], dtype=object)})
    assert "\\ud800" in table.llm.chat(fake, "m")["generated_error"].iloc[0]


def test_processes_scheduler(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dask_table(table).llm.generate(fake, "text").compute(scheduler="processes", num_workers=1)
    assert list(out["generated"].dropna()) == [f"<row {i}>" for i in range(40) if i not in (3, 17)]
    assert fake.rows == 40
    assert str(os.getpid()) not in fake.processes


@pytest.mark.cluster
def test_two_processes_give_what_this_one_gives(
    fake: FakeLLM, table: pd.DataFrame, two_processes: Client
) -> None:
    out = dask_table(table, 8).llm.generate(fake, "text").compute()
    there = table.llm.generate(fake, "text")
    ran = set(fake.processes)
    assert ran <= {str(pid) for pid in two_processes.run(os.getpid).values()}
    with dask.config.set(scheduler="sync"):
        here = table.llm.generate(fake, "text")
    assert set(fake.processes) - ran == {str(os.getpid())}
    pd.testing.assert_frame_equal(there, here)
    pd.testing.assert_frame_equal(out, here.astype({"text": out["text"].dtype}))


def test_defaults_are_those_of_sampling_params(fake: FakeLLM) -> None:
    out = dask_table(pd.DataFrame({"text": ["a"]}), 1).llm.generate(fake, "text")
    assert out.expr.call.params == SamplingParams()
