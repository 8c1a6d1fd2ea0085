"""The generated text: the same on every machine, and its two sides never share an input."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date
from itertools import islice

import pandas as pd
import pytest

from daskllm import demo
from daskllm.demo import tasks

SAMPLE = 20_000


@pytest.fixture(scope="module")
def training() -> list[tasks.Row]:
    return tasks.sample(SAMPLE, seed=0, of_held_out=False)


@pytest.fixture(scope="module")
def held_out() -> list[tasks.Row]:
    return tasks.sample(SAMPLE // 4, seed=1, of_held_out=True)


def test_the_same_seed_gives_the_same_rows() -> None:
    assert tasks.sample(300, 7, of_held_out=True) == tasks.sample(300, 7, of_held_out=True)
    assert tasks.sample(300, 7, of_held_out=True) != tasks.sample(300, 8, of_held_out=True)


def test_rows_are_the_same_on_every_machine() -> None:
    first = next(tasks.rows(0, of_held_out=True, only=("addition", "en")))
    assert first == tasks.Row("addition", "en", "33+684", "What is 684 plus 33?", "717")


def test_no_held_out_source_or_prompt_occurs_in_training(
    training: list[tasks.Row], held_out: list[tasks.Row]
) -> None:
    assert not {row.source for row in training} & {row.source for row in held_out}
    assert not {row.prompt for row in training} & {row.prompt for row in held_out}
    assert all(tasks.held_out(row.source) for row in held_out)
    assert not any(tasks.held_out(row.source) for row in training)


def test_translation_is_held_out_in_both_directions(
    training: list[tasks.Row], held_out: list[tasks.Row]
) -> None:
    def texts(rows: list[tasks.Row]) -> set[str]:
        return {row.source for row in rows if row.task == "translation"}

    assert texts(held_out)
    assert not any(
        source in row.prompt for source in texts(held_out) for row in training if row.language == "en"
    )


def test_about_one_source_in_ten_is_held_out() -> None:
    share = sum(tasks.held_out(f"source {i}") for i in range(20_000)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)


def test_every_task_and_language_is_there_alike(held_out: list[tasks.Row]) -> None:
    counts = Counter((row.task, row.language) for row in held_out)
    assert set(counts) == {(task, language) for task in tasks.TASKS for language in tasks.LANGUAGES}
    assert min(counts.values()) > 0.7 * max(counts.values())


def test_only_one_kind_when_asked() -> None:
    some = islice(tasks.rows(0, of_held_out=True, only=("date", "zh")), 20)
    assert {(row.task, row.language) for row in some} == {("date", "zh")}
    with pytest.raises(ValueError, match=r"only must be one of \('sentiment', 'en'\), .*\('dates', 'zh'\)"):
        next(tasks.rows(0, of_held_out=True, only=("dates", "zh")))


def test_a_prompt_has_one_answer(training: list[tasks.Row], held_out: list[tasks.Row]) -> None:
    answers = {row.prompt: row.answer for row in training + held_out}
    for seed in (2, 3):
        for row in islice(tasks.rows(seed, of_held_out=False), SAMPLE):
            assert answers.get(row.prompt, row.answer) == row.answer


def test_answers_are_right(held_out: list[tasks.Row]) -> None:
    for row in held_out:
        if row.task == "addition":
            assert int(row.answer) == sum(map(int, re.findall(r"\d+", row.prompt)))
        if row.task == "date":
            assert date.fromisoformat(row.answer).isoformat() == row.answer
            assert row.answer[:4] in row.prompt
        if row.task == "order_number":
            assert row.prompt.count(row.answer) == 1
        if row.task == "translation":
            chinese = row.answer if row.language == "en" else row.prompt
            assert re.search(r"[一-鿿]", chinese)


def test_the_sample_table_is_held_out(training: list[tasks.Row]) -> None:
    table = demo.table()
    assert len(table) == 200
    assert list(table["id"]) == list(range(200))
    assert not table.isna().any(axis=None)
    assert set(zip(table["task"], table["language"], strict=True)) == set(tasks.KINDS)
    assert all(tasks.held_out(row.source) for row in tasks.table_rows())
    assert [(row.prompt, row.answer) for row in tasks.table_rows()] == list(
        zip(table["prompt"], table["answer"], strict=True)
    )
    assert not set(table["prompt"]) & {row.prompt for row in training}


def test_share_right_counts_failed_rows_as_wrong() -> None:
    frame = pd.DataFrame({"answer": ["4", "猫", "a", "None"], "generated": [" 4\n", "狗", None, None]})
    assert demo.share_right(frame) == 0.25
    assert demo.share_right(frame.rename(columns={"generated": "said"}), output="said") == 0.25
    with pytest.raises(KeyError, match="no column 'generated'; it has answer"):
        demo.share_right(frame[["answer"]])
    with pytest.raises(ValueError, match="no rows"):
        demo.share_right(frame.iloc[:0])
