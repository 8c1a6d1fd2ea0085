"""Cells that are no prompt, among rows that are: the row stays and says why, its neighbours do not change."""

from __future__ import annotations

import datetime
import decimal
from dataclasses import dataclass
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import daskllm

GOOD = ["one", "two", "three"]
SAMPLING = {"max_tokens": 4, "ignore_eos": True}


@dataclass(frozen=True)
class Cell:
    """A cell in the middle of a column, and why it fails; None where it is a prompt."""

    name: str
    value: Any
    why: str | None
    prompt: str = "text"
    kind: str = "generate"


CELLS = [
    Cell("None", None, "column 'text' is null"),
    Cell("NaN", float("nan"), "column 'text' is null"),
    Cell("pandas' NA", pd.NA, "column 'text' is null"),
    Cell("NaT", pd.NaT, "column 'text' is null"),
    Cell("NumPy's NaT", np.datetime64("NaT"), "column 'text' is null"),
    Cell("null in a template", None, "column 'text' is null", "Say {text}!"),
    Cell("empty", "", "prompt is empty"),
    Cell("one space", " ", None),
    Cell("empty in a template", "", None, "Say {text}!"),
    Cell("as long as the context", "x" * 255, "prompt has 256 tokens, the model's context is 256"),
    Cell("a token shorter", "x" * 254, None),
    Cell("a megabyte", "x" * 1_000_000, "prompt has 1000001 tokens, the model's context is 256"),
    Cell("too long in a template", "x" * 250, "the model's context is 256", "Say {text}!"),
    Cell("half of a surrogate pair", "a\ud800b", "surrogate"),
    Cell("the other half", "\udc00", "surrogate", "Say {text}!"),
    Cell("NUL and controls", "a\x00\x07\x1bb", None),
    Cell("a mark of the byte order", "\ufeffa", None),
    Cell("both directions", "abc \u202e\u05d0\u05d1 \u0627", None),
    Cell("an emoji of several code points", "👩‍👩‍👧‍👦", None),
    Cell("special tokens spelled", "</s><|im_start|>system\n", None),
    Cell("a template's braces", "{text} {{x}} %s {0}", None, "Say {text}!"),
    Cell("bytes", b"abc", "holds a bytes, where text or a number was expected"),
    Cell("bytearray", bytearray(b"abc"), "holds a bytearray"),
    Cell("dict", {"a": 1}, "holds a dict"),
    Cell("set", {1, 2}, "holds a set"),
    Cell("object", object(), "holds a object"),
    Cell("a function", len, "holds a builtin_function_or_method"),
    Cell("date", datetime.date(2024, 1, 1), "holds a date"),
    Cell("timestamp", pd.Timestamp("2024-01-01"), "holds a Timestamp"),
    Cell("time delta", pd.Timedelta(1, "s"), "holds a Timedelta"),
    Cell("int", 7, None),
    Cell("an int of 400 bits", 1 << 400, None),
    Cell("infinity", float("inf"), None),
    Cell("bool", True, None),
    Cell("NumPy's bool", np.bool_(True), None),
    Cell("NumPy's number", np.float32(0.5), None),
    Cell("decimal", decimal.Decimal("1.10"), None),
    Cell("token ids", [1, 2, 3], None),
    Cell("token ids in an array", np.array([1, 2, 3]), None),
    Cell("no token ids", [], "prompt is empty"),
    Cell("a negative token id", [1, -1], "token id -1 is outside the model's vocabulary of 288"),
    Cell("an unknown token id", [1, 288], "token id 288 is outside the model's vocabulary of 288"),
    Cell("a token id of 80 bits", [1 << 80], "outside the model's vocabulary of 288"),
    Cell("too many token ids", [1] * 256, "prompt has 256 tokens, the model's context is 256"),
    Cell("a bool among token ids", [1, True], "a list as a prompt holds token ids, all of them integers"),
    Cell("a list of text", ["a", "b"], "a list as a prompt holds token ids, all of them integers"),
    Cell("a nested list", [[1, 2], [3]], "a list as a prompt holds token ids, all of them integers"),
    Cell("a list with a null", [1, None], "a list as a prompt holds token ids, all of them integers"),
    Cell("fractions", np.array([1.0, 2.5]), "a list as a prompt holds token ids, all of them integers"),
    Cell("a matrix", np.array([[1, 2], [3, 4]]), "a list as a prompt holds token ids, all of them integers"),
    Cell(
        "token ids in a template", [1, 2], "holds a list, where text or a number was expected", "Say {text}!"
    ),
    Cell("no messages", [], "prompt is empty: a list of no messages", kind="chat"),
    Cell("token ids for messages", [1, 2], "a message is a mapping with 'role' and 'content'", kind="chat"),
    Cell("a message without a role", [{"content": "a"}], "a message is a mapping with 'role'", kind="chat"),
    Cell("a message that is null", [None], "a message is a mapping with 'role'", kind="chat"),
    Cell("a message without content", [{"role": "user"}], "content", kind="chat"),
    Cell("a message whose content is a number", [{"role": "user", "content": 5}], None, kind="chat"),
    Cell("half a pair in a message", [{"role": "user", "content": "\ud800"}], "surrogate", kind="chat"),
    Cell("bytes for messages", b"abc", "not bytes", kind="chat"),
    Cell("null for messages", None, "prompt is null", kind="chat"),
    Cell("a question", "why?", None, kind="chat"),
    Cell("null to score", None, "column 'text' is null", kind="score"),
    Cell("too long to score", "x" * 300, "text has 301 tokens", kind="score"),
    Cell("empty to score", "", "empty", kind="score"),
    Cell("empty to embed", "", "empty", kind="embed"),
    Cell("a dict to embed", {}, "holds a dict", kind="embed"),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_among_good_rows(llm: daskllm.LLM, cell: Cell) -> None:
    column = np.empty(4, dtype=object)
    for row, value in enumerate([GOOD[0], cell.value, GOOD[1], GOOD[2]]):
        column[row] = value
    table = pd.DataFrame({"id": range(4), "text": pd.Series(column, dtype=object)})
    options = SAMPLING if cell.kind in ("generate", "chat") else {}
    name = {"score": "score", "embed": "embedding"}.get(cell.kind, "generated")

    def asked(frame: Any) -> Any:
        return getattr(frame.llm, cell.kind)(llm, cell.prompt, **options)

    answered, alone = asked(table), asked(table.iloc[[0, 2, 3]])
    pd.testing.assert_frame_equal(answered.iloc[[0, 2, 3]], alone)
    assert alone[f"{name}_error"].isna().all()
    why = answered[f"{name}_error"][1]
    if cell.why is None:
        assert pd.isna(why)
        assert not np.all(pd.isna(answered[name][1]))
    else:
        assert cell.why in why
        assert np.all(pd.isna(answered[name][1]))
        if cell.kind in ("generate", "chat"):
            assert answered["generated_finish_reason"][1] == "error"
            assert answered["generated_completion_tokens"][1] == 0
    with dask.config.set({"dataframe.convert-string": False, "scheduler": "synchronous"}):
        pd.testing.assert_frame_equal(asked(dd.from_pandas(table, npartitions=2)).compute(), answered)


def test_token_ids_are_asked_as_they_are(llm: daskllm.LLM) -> None:
    table = pd.DataFrame({"ids": [[104, 105], [119, 104, 121]]})
    out = table.llm.generate(llm, "ids", **SAMPLING)
    expected = llm.generate([[104, 105], [119, 104, 121]], **SAMPLING)
    assert out["generated"].tolist() == [one.text for one in expected]
    assert out["generated_prompt_tokens"].tolist() == [2, 3]
    assert table.llm.score(llm, "ids")["score"].notna().all()
    refused = table.llm.generate(llm, "ids", system="Be brief.", **SAMPLING)
    assert refused["generated_error"].str.contains("token ids take no system text and no examples").all()


@dataclass(frozen=True)
class Column:
    """A whole column of some type; how many of its rows fail, and why."""

    name: str
    values: Any
    failed: int
    why: str = ""


COLUMNS = [
    Column("categories", pd.Categorical(["a", "b", None, "a"]), 1, "column 'text' is null"),
    Column("categories of numbers", pd.Categorical([1, 2, 2, 1]), 0),
    Column("the largest int64", np.array([2**63 - 1, -(2**63), 0, 1]), 0),
    Column("the largest uint64", np.array([2**64 - 1, 0, 1, 2], dtype="uint64"), 0),
    Column("Int64 with a null", pd.array([2**53 + 1, None, 2, 3], dtype="Int64"), 1, "is null"),
    Column("float64 with NaN", np.array([0.1, np.nan, np.inf, -0.0]), 1, "is null"),
    Column("bool with a null", pd.array([True, None, False, True], dtype="boolean"), 1, "is null"),
    Column("all null", [None] * 4, 4, "is null"),
    Column("all NaN", [np.nan] * 4, 4, "is null"),
    Column("dates", pd.date_range("2024-01-01", periods=4), 4, "holds a Timestamp"),
    Column("dates with a zone", pd.date_range("2024-01-01", periods=4, tz="Asia/Shanghai"), 4, "Timestamp"),
    Column("spans of time", pd.to_timedelta([1, 2, 3, 4], "s"), 4, "holds a Timedelta"),
    Column("periods", pd.period_range("2024-01", periods=4, freq="M"), 4, "holds a Period"),
    Column("intervals", pd.interval_range(0, 4), 4, "holds a Interval"),
    Column("Arrow's text", pd.array(["a", None, "b", "c"], dtype="string[pyarrow]"), 1, "is null"),
]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_column_of_a_type(llm: daskllm.LLM, column: Column) -> None:
    table = pd.DataFrame({"text": column.values}, index=pd.Index(["r", "r", "s", "t"], name="key"))
    out = table.llm.generate(llm, "text", **SAMPLING)
    assert int((out["generated_finish_reason"] == "error").sum()) == column.failed
    assert out["generated_error"].dropna().str.contains(column.why, regex=False).all()
    pd.testing.assert_frame_equal(out[["text"]], table)
    with dask.config.set({"dataframe.convert-string": False, "scheduler": "synchronous"}):
        again = dd.from_map(lambda part: table, [0], meta=table.iloc[:0]).llm.generate(
            llm, "text", **SAMPLING
        )
        pd.testing.assert_frame_equal(again.compute(), out)


def test_partitions_of_nothing_of_nulls_and_of_rows(llm: daskllm.LLM) -> None:
    pieces = [["one", "two"], [], [None, None], [""], ["three"], []]
    tables = [pd.DataFrame({"text": pd.Series(piece, dtype="str")}) for piece in pieces]
    frame = dd.from_map(lambda number: tables[number], range(len(tables)), meta=tables[0].iloc[:0])
    out = frame.llm.generate(llm, "text", **SAMPLING)
    assert out.divisions == (None,) * 7
    with dask.config.set(scheduler="synchronous"):
        found = out.compute()
        sizes = out.map_partitions(len).compute().tolist()
    assert sizes == [2, 0, 2, 1, 1, 0]
    assert found["generated_error"].fillna("").tolist() == [
        "", "", "column 'text' is null", "column 'text' is null", "prompt is empty", "",
    ]  # fmt: skip
    expected = [one.text for one in llm.generate(GOOD, **SAMPLING)]
    assert found["generated"].dropna().tolist() == expected


def test_a_table_without_rows(llm: daskllm.LLM) -> None:
    table = pd.DataFrame({"text": pd.Series([], dtype="str")})
    out = table.llm.generate(llm, "text")
    assert (len(out), out["generated"].dtype, out["generated_prompt_tokens"].dtype) == (0, "str", "int64")
    lazy = dd.from_pandas(table, npartitions=1).llm.generate(llm, "text").compute(scheduler="synchronous")
    added = [name for name in out if name != "text"]
    assert lazy[added].dtypes.tolist() == out[added].dtypes.tolist()


def test_a_row_of_three_thousand_columns(llm: daskllm.LLM) -> None:
    wide = pd.DataFrame(np.arange(6000).reshape(2, 3000), columns=[f"c{i}" for i in range(3000)])
    out = wide.llm.generate(llm, "{c0} and {c2999}", **SAMPLING)
    expected = llm.generate(["0 and 2999", "3000 and 5999"], **SAMPLING)
    assert out["generated"].tolist() == [one.text for one in expected]
    assert out.shape == (2, 3005)


def test_columns_of_one_name_are_refused_only_where_they_are_used(llm: daskllm.LLM) -> None:
    table = pd.DataFrame([["a", "b", "c"]], columns=["text", "x", "x"])
    assert table.llm.generate(llm, "text", **SAMPLING)["generated_error"].isna().all()
    with pytest.raises(ValueError, match="uses the column 'x', which the table has more than once"):
        table.llm.generate(llm, "{x}", **SAMPLING)
