"""One table, five ways to ask: the same answers, token for token, and the same bits of log-probability."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client

import daskllm
from daskllm.engine.kvcache import bytes_per_block
from daskllm.llm import LLM
from tests import tiny

ROWS = 520
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 16, "logprobs": 0},
    "seeded": {"max_tokens": 16, "logprobs": 0, "temperature": 0.9, "top_p": 0.95, "seed": 11},
}
BAD = {3: None, 40: "", 41: None, 200: "x" * 400, 519: ""}
SPELLED = {7: "say </s> and <|im_start|>system", 300: "<s>"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    draw = random.Random(2)
    words = ["red", "fish", "阳光", "tree", "1999", "naïve", "🙂", "of the", "x"]
    texts: list[str | None] = [" ".join(draw.choices(words, k=draw.randint(1, 18))) for _ in range(ROWS)]
    for row, text in (BAD | SPELLED).items():
        texts[row] = text
    return pd.DataFrame({"id": range(1000, 1000 + ROWS), "text": texts})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    llm = daskllm.load(path)
    yield llm
    llm.close()


@pytest.fixture(scope="module", params=SAMPLING)
def sampling(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SAMPLING[request.param]


@pytest.fixture(scope="module")
def expected(llm: LLM, table: pd.DataFrame, sampling: dict[str, Any]) -> pd.DataFrame:
    """The answers of a pandas table, which the other ways are compared with."""
    return table.llm.generate(llm, "text", **sampling)


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal but for the type that Dask gives text columns when it takes a pandas table over."""
    pd.testing.assert_frame_equal(found.drop(columns="text"), expected.drop(columns="text"))
    assert found["text"].fillna("null").tolist() == expected["text"].fillna("null").tolist()


def test_bad_rows_alone_failed(expected: pd.DataFrame) -> None:
    failed = expected["generated_finish_reason"] == "error"
    assert sorted(expected.index[failed]) == sorted(BAD)
    assert expected["generated"].isna().equals(failed)
    assert expected["generated_error"].notna().equals(failed)
    for row, words in {3: "column 'text' is null", 40: "empty", 200: "context"}.items():
        assert words in expected.loc[row, "generated_error"]
    good = expected[~failed]
    assert (good["generated_completion_tokens"] == good["generated_logprobs"].map(len)).all()


def test_list(llm: LLM, table: pd.DataFrame, sampling: dict[str, Any], expected: pd.DataFrame) -> None:
    answers = llm.generate(
        table["text"].astype(object).where(table["text"].notna(), None).tolist(), **sampling
    )
    for answer, row in zip(answers, expected.itertuples(), strict=True):
        assert answer.finish_reason == row.generated_finish_reason
        if answer.finish_reason != "error":
            assert answer.text == row.generated
            assert [entry.logprob for entry in answer.logprobs] == row.generated_logprobs
            assert answer.prompt_tokens == row.generated_prompt_tokens


@pytest.mark.parametrize("npartitions", [1, 3, 17])
def test_dask_on_threads(
    llm: LLM, table: pd.DataFrame, sampling: dict[str, Any], expected: pd.DataFrame, npartitions: int
) -> None:
    frame = dd.from_pandas(table, npartitions=npartitions)
    answered = frame.llm.generate(llm, "text", **sampling)
    assert answered.divisions == frame.divisions
    same(answered.compute(scheduler="threads"), expected)


def test_preemption(
    path: Path, table: pd.DataFrame, sampling: dict[str, Any], expected: pd.DataFrame
) -> None:
    config = tiny.CONFIGS["qwen3"]
    block = bytes_per_block(config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"], 4)
    small = daskllm.load(path, kv_memory=10 * block)
    try:
        answered = dd.from_pandas(table, npartitions=3).llm.generate(small, "text", **sampling)
        same(answered.compute(scheduler="threads"), expected)
        assert small.session().metrics.preemptions > 0
    finally:
        small.close()


@pytest.mark.cluster
def test_cluster_of_two_processes(
    two_processes: Client,
    path: Path,
    table: pd.DataFrame,
    sampling: dict[str, Any],
    expected: pd.DataFrame,
) -> None:
    llm = daskllm.load(path, client=two_processes)
    answered = dd.from_pandas(table, npartitions=6).llm.generate(llm, "text", **sampling)
    same(answered.compute(), expected)


def test_duplicates_without_a_seed_differ(llm: LLM) -> None:
    table = pd.DataFrame({"text": ["the same prompt"] * 40})
    frame = dd.from_pandas(table, npartitions=4)
    answered = frame.llm.generate(llm, "text", max_tokens=12, temperature=1.0, ignore_eos=True)
    first = answered.compute(scheduler="threads")
    assert first["generated"].nunique() == 40
    # The job's seed was drawn when the graph was built and stays with it.
    pd.testing.assert_frame_equal(answered.compute(scheduler="threads"), first)
    again = frame.llm.generate(llm, "text", max_tokens=12, temperature=1.0, ignore_eos=True)
    assert (again.compute(scheduler="threads")["generated"] != first["generated"]).all()
