"""Prompt templates: fields, cells, errors."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from daskllm.text import PromptTemplate
from daskllm.types import RowError

COLUMNS = ["id", "text", "two words", "a.b", "city-名"]


@pytest.mark.parametrize(
    ("prompt", "fields", "filled"),
    [
        ("text", ("text",), "T"),
        ("two words", ("two words",), "W"),
        ("{text}", ("text",), "T"),
        ("{two words}/{city-名}", ("two words", "city-名"), "W/C"),
        ("{text} {id} {text}", ("text", "id"), "T 7 T"),
        ("{{text}} {text}", ("text",), "{text} T"),
        ("{{{text}}}", ("text",), "{T}"),
        ('{{"a": "{text}"}}', ("text",), '{"a": "T"}'),
        ("{a.b}", ("a.b",), "D"),
        ("line\n{text}\n", ("text",), "line\nT\n"),
    ],
)
def test_fields_and_text(prompt: str, fields: tuple[str, ...], filled: str) -> None:
    template = PromptTemplate.parse(prompt, COLUMNS)
    values = {"id": 7, "text": "T", "two words": "W", "a.b": "D", "city-名": "C"}
    assert template.fields == fields
    assert template.fill(values) == filled


def test_a_column_goes_before_a_template() -> None:
    assert PromptTemplate.parse("{x}", ["{x}", "x"]).fields == ("{x}",)


def test_cells_are_not_templates() -> None:
    template = PromptTemplate.parse("{text}", COLUMNS)
    assert template.fill({"text": "{id} {{x}}"}) == "{id} {{x}}"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("{x}", "'x'"), ("Hello", "'Hello'"), ("{{text}}", "{{text}}"), ("", "''")],
)
def test_an_unknown_column_is_named_beside_the_known(prompt: str, name: str) -> None:
    with pytest.raises(KeyError) as caught:
        PromptTemplate.parse(prompt, COLUMNS)
    assert name in caught.value.args[0]
    assert all(repr(column) in caught.value.args[0] for column in COLUMNS)


@pytest.mark.parametrize("field", ["text.upper", "text!r", "text:>3", "", "text[0]", "0.x", " "])
def test_a_field_that_is_not_plain_is_named(field: str) -> None:
    with pytest.raises(ValueError, match="is not a plain") as caught:
        PromptTemplate.parse(f"a {{{field}}}", COLUMNS)
    assert f"{{{field}}}" in str(caught.value)


@pytest.mark.parametrize("prompt", ["{text", "text}", "{text} }", "{a{text}}", "{{{text}}"])
def test_a_lone_brace_is_an_error(prompt: str) -> None:
    with pytest.raises(ValueError, match="lone"):
        PromptTemplate.parse(prompt, COLUMNS)


@pytest.mark.parametrize("prompt", [None, 3, b"text", ["text"]])
def test_a_prompt_is_text(prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt must be"):
        PromptTemplate.parse(prompt, COLUMNS)


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (3, "3"),
        (1.5, "1.5"),
        (True, "True"),
        (float("inf"), "inf"),
        (decimal.Decimal("1.10"), "1.10"),
        (np.int64(3), "3"),
        (np.float32(0.1), "0.1"),
        (np.bool_(False), "False"),
        (np.str_("s"), "s"),
        (pd.Series([2], dtype="Int64")[0], "2"),
        (pd.Series(["文"], dtype="string[pyarrow]")[0], "文"),
        (" ", " "),
    ],
)
def test_text_and_numbers_fill(cell: Any, shown: str) -> None:
    assert PromptTemplate.parse("text", COLUMNS).fill({"text": cell}) == shown


@pytest.mark.parametrize(
    "cell", [None, float("nan"), np.nan, np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT")]
)
def test_null_is_the_rows_error(cell: Any) -> None:
    with pytest.raises(RowError, match=r"^column 'text' is null$"):
        PromptTemplate.parse("{id}: {text}", COLUMNS).fill({"id": 1, "text": cell})


@pytest.mark.parametrize(
    "cell",
    [
        *([1], {"a": 1}, b"x", object()),
        *(np.array([1.0, 2.0]), np.array([])),
        *(datetime.date(2024, 1, 1), pd.Timestamp("2024")),
    ],
)
def test_other_cells_are_the_rows_error(cell: Any) -> None:
    with pytest.raises(RowError, match=r"^column 'text' holds a .*expected"):
        PromptTemplate.parse("text", COLUMNS).fill({"text": cell})


def test_empty_and_broken_text_are_the_rows_error() -> None:
    template = PromptTemplate.parse("text", COLUMNS)
    with pytest.raises(RowError, match=r"^prompt is empty$"):
        template.fill({"text": ""})
    with pytest.raises(RowError, match="lone surrogate"):
        template.fill({"text": "a\ud800"})


def test_an_unused_null_does_not_matter() -> None:
    assert PromptTemplate.parse("text", COLUMNS).fill({"text": "x", "id": None}) == "x"
