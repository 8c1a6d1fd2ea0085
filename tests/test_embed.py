"""Texts as vectors: equal to transformers', the same bits in any company, and the like of what was given."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import torch

import daskllm
from daskllm.engine.kvcache import bytes_per_block
from daskllm.engine.runner import Runner
from daskllm.engine.sequence import Request
from daskllm.llm import LLM
from daskllm.session import Session
from daskllm.types import ModelSpec, Pooling, SamplingParams
from tests import tiny

FAMILIES = ("gpt2", "llama-gqa", "qwen2-tied-window-from", "qwen3", "mistral-window")
POOLINGS: tuple[Pooling, ...] = ("mean", "last")
ADDED = ["embedding", "embedding_tokens", "embedding_error"]


def prompts(vocab: int = 256) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(vocab) for _ in range(length)] for length in (1, 3, 31, 32, 33, 64, 90, 150)]


def embed(session: Session, rows: list[list[int]], pooling: Pooling, normalize: bool = False) -> np.ndarray:
    return np.stack([e.vector for e in session.embed(rows, pooling=pooling, normalize=normalize)])


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    path = tiny.make_model(name, tmp_path)
    base = tiny.oracle(path).base_model
    rows = prompts()
    with torch.inference_mode():
        hidden = [base(torch.tensor([ids])).last_hidden_state[0].double().numpy() for ids in rows]
    pooled = {
        "mean": np.stack([states.mean(0) for states in hidden]),
        "last": np.stack([states[-1] for states in hidden]),
    }
    session = Session.open(ModelSpec(path=str(path)))
    try:
        for pooling in POOLINGS:
            expected = pooled[pooling]
            np.testing.assert_allclose(embed(session, rows, pooling), expected, atol=1e-4, rtol=0)
            unit = embed(session, rows, pooling, normalize=True)
            assert unit.dtype == np.float32
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(unit, expected, atol=1e-5, rtol=0)
    finally:
        session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits(dtype: str, tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path, dtype=dtype)
    rows = prompts()

    def run(step_tokens: int, kv_memory: int | None = None) -> dict[Pooling, np.ndarray]:
        session = Session.open(ModelSpec(path=str(path), dtype=dtype, kv_memory=kv_memory))
        session.engine.batcher.max_tokens = step_tokens
        try:
            return {pooling: embed(session, rows, pooling) for pooling in POOLINGS}
        finally:
            session.close()

    session = Session.open(ModelSpec(path=str(path), dtype=dtype))
    alone = {p: np.concatenate([embed(session, [row], p) for row in rows]) for p in POOLINGS}
    config = session.config
    session.close()
    block = bytes_per_block(
        config.num_layers, config.num_kv_heads, config.head_dim, 4 if dtype[0] == "f" else 2
    )
    for other in (run(512), run(13), run(13, kv_memory=6 * block)):
        for pooling in POOLINGS:
            np.testing.assert_array_equal(other[pooling], alone[pooling])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("llama-gqa", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with dask.config.set(scheduler="threads"):
        llm = daskllm.load(path)
        yield llm
    llm.close()


def test_rows_of_all_kinds_share_steps_and_only_some_need_logits(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    logits = Runner.logits

    def counting(self: Runner, normed: torch.Tensor) -> torch.Tensor:
        widths.append(len(normed))
        return logits(self, normed)

    monkeypatch.setattr(Runner, "logits", counting)
    session, rows = llm.session(), prompts()[:5]  # thrice as many fit one step
    lone = embed(session, rows, "mean")
    assert widths == []
    session.score(rows)
    assert sum(widths) == sum(len(row) - 1 for row in rows)
    engine = session.engine
    with engine._changed:  # so that the three calls' rows are there before the next step
        steps = engine.metrics.steps
        tickets = [
            engine.submit([Request(row, SamplingParams(max_tokens=3), kind=kind)])[0]
            for kind in ("embed", "generate", "score")
            for row in rows
        ]
    engine.wait(tickets, 60)
    assert max(s.running for s in list(engine.metrics.history)[steps:]) == len(tickets)
    shared = [t.samples[0].pooled for t in tickets[: len(rows)] if t.samples[0] is not None]
    np.testing.assert_array_equal(np.stack(shared).astype(np.float32), lone)


TEXTS = ["some text", None, "", "x" * 400, "some other text"]


def test_a_list_gives_a_row_for_each_and_a_text_one_vector(llm: LLM) -> None:
    found = llm.embed(TEXTS)
    assert (found.shape, found.dtype) == ((5, llm.config.hidden_size), np.float32)
    assert list(np.isnan(found).any(1)) == [False, True, True, True, False]
    assert np.isnan(found[1:4]).all()
    np.testing.assert_allclose(np.linalg.norm(found[[0, 4]], axis=1), 1, rtol=1e-6)
    one = llm.embed("some text")
    assert one.shape == (llm.config.hidden_size,)
    np.testing.assert_array_equal(one, found[0])
    np.testing.assert_array_equal(llm.embed([llm.tokenizer.encode("some text")]), found[:1])
    assert np.isnan(llm.embed("")).all()
    empty = llm.embed([])
    assert (empty.shape, empty.dtype) == ((0, llm.config.hidden_size), np.float32)
    last, mean = (
        llm.embed("some text", pooling="last", normalize=False),
        llm.embed("some text", normalize=False),
    )
    assert not np.allclose(last, mean)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), one, rtol=1e-5)


def test_a_series_gives_a_frame_and_a_bag_a_bag(llm: LLM) -> None:
    expected = llm.embed(TEXTS, pooling="last")
    series = pd.Series(TEXTS, index=range(10, 15), dtype=object)
    for given in (series, dd.from_pandas(series, npartitions=2)):
        out = llm.embed(given, pooling="last")
        out = out.compute() if isinstance(out, dd.DataFrame) else out
        assert list(out.columns) == ADDED
        assert list(out.index) == list(series.index)
        check_columns(out, expected)
    bag = llm.embed(db.from_sequence(TEXTS, npartitions=2), pooling="last")
    np.testing.assert_array_equal(np.stack(bag.compute(scheduler="threads")), expected)


def check_columns(out: pd.DataFrame, expected: np.ndarray) -> None:
    assert [str(out.dtypes[name]) for name in ADDED] == ["object", "int64", "str"]
    assert (
        list(out["embedding"].isna())
        == list(out["embedding_error"].notna())
        == [False, True, True, True, False]
    )
    for vector, other in zip(out["embedding"], expected, strict=True):
        if vector is not None:
            assert vector.dtype == np.float32
            np.testing.assert_array_equal(vector, other)
    assert [n > 0 for n in out["embedding_tokens"]] == [True, False, False, True, True]
    said = list(out["embedding_error"][1:4])
    assert "null" in said[0]
    assert "empty" in said[1]
    assert "401 tokens" in said[2]


def test_tables(llm: LLM, tmp_path: Path) -> None:
    table = pd.DataFrame({"id": range(5), "text": pd.Series(TEXTS, dtype=object)})
    expected = llm.embed(TEXTS)
    here = table.llm.embed(llm, "text")
    assert list(here.columns) == ["id", "text", *ADDED]
    check_columns(here, expected)
    frame = dd.from_pandas(table, npartitions=3)
    lazy = frame.llm.embed(llm, "text")
    assert list(lazy.dtypes[ADDED].astype(str)) == ["object", "int64", "str"]
    for part in lazy.partitions:
        assert list(part.compute().dtypes) == list(lazy.dtypes)
    check_columns(lazy.compute(), expected)
    lazy.to_parquet(tmp_path / "out", schema=None)
    again = dd.read_parquet(tmp_path / "out")["embedding"].compute()
    assert list(again.isna()) == [False, True, True, True, False]
    np.testing.assert_array_equal(np.stack(again.dropna()), expected[[0, 4]])
    templated = table.llm.embed(llm, "{text} {id}", output="v", pooling="last", normalize=False)
    assert list(templated.columns[-3:]) == ["v", "v_tokens", "v_error"]
    np.testing.assert_array_equal(templated["v"].iloc[0], llm.embed("some text 0", "last", normalize=False))
    empty = table.iloc[:0].llm.embed(llm, "text")
    assert list(empty.dtypes[ADDED].astype(str)) == ["object", "int64", "str"]


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"pooling": "cls"}, ValueError, "pooling"),
        ({"pooling": None}, ValueError, "pooling"),
        ({"normalize": 1}, TypeError, "normalize"),
    ],
)
def test_a_bad_call_is_refused_before_any_work(
    llm: LLM, arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    table = pd.DataFrame({"text": ["a"]})
    frame = dd.from_pandas(table, npartitions=1)
    steps = llm.session().metrics.steps
    for given in ("a", ["a"], table["text"], frame["text"], db.from_sequence(["a"])):
        with pytest.raises(error, match=named):
            llm.embed(given, **arguments)
    for either in (table, frame):
        with pytest.raises(error, match=named):
            either.llm.embed(llm, "text", **arguments)
        with pytest.raises(KeyError, match="nothing"):
            either.llm.embed(llm, "nothing")
    with pytest.raises(TypeError, match=r"df\.llm\.embed"):
        llm.embed(table)
    assert llm.session().metrics.steps == steps
