"""Partitions cut by cost: every row once, in order again, slices alike; and stolen where a worker is slow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daskllm.runtime import slices
from daskllm.runtime.call import Call
from daskllm.runtime.cluster import client_for, over_rows
from daskllm.runtime.loading import ALLOWED_FAILURES, expect_losses
from daskllm.runtime.process import close_session
from daskllm.runtime.slices import SLICES, answer_slice, costs_of, cut_table, deal, merge_table, number_rows
from daskllm.runtime.tasks import answer_rows
from daskllm.runtime.worker import ROWS_IN_HAND
from daskllm.types import SamplingParams
from tests.fake_session import FakeLLM, FakeSpec
from tests.waiting import eventually


def ask(fake: FakeLLM, **fields: Any) -> Call:
    return Call(**{"spec": fake.spec, "kind": "generate", "labels": ("text",), **fields})


@pytest.fixture
def on_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a cut believe that a worker runs it."""
    monkeypatch.setattr(slices, "current_worker", lambda: "a worker")


@given(
    costs=st.lists(st.floats(0.5, 1e6), min_size=1, max_size=200),
    hands=st.integers(1, 9),
)
def test_all_rows_are_dealt_once_and_hands_cost_the_same(costs: list[float], hands: int) -> None:
    each = np.array(costs)
    dealt = deal(each, hands)
    assert sorted(row for hand in dealt for row in hand) == list(range(len(costs)))
    assert all(hand == sorted(hand) for hand in dealt)
    spent = [each[hand].sum() for hand in dealt]
    # Each hand is off what is left for it by half a row, and what that leaves the others adds up.
    assert max(spent) - min(spent) <= 2 * each.max() * (1 + 1e-9)
    assert all(min(each[a]) >= max(each[b]) for a, b in itertools.pairwise(h for h in dealt if h))
    assert all(dealt) or len(costs) < hands


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.one_of(st.text(max_size=40), st.none(), st.just("again")), max_size=120),
    sampled=st.booleans(),
    long=st.integers(1, 20_000),
)
def test_cut_answered_and_merged_is_as_answered_at_once(
    fake: FakeLLM, on_a_worker: None, texts: list[str | None], sampled: bool, long: int
) -> None:
    """Whatever the slices: the same columns, in the rows' order, with an index that is no order at all."""
    params = SamplingParams(temperature=float(sampled), max_tokens=long, ignore_eos=True, n=2, logprobs=0)
    call = ask(fake, params=params, job_seed=7)
    table = pd.DataFrame({"x": 1, "text": pd.Series(texts, dtype=object)})
    table.index = pd.Index(range(len(table))[::-1]) // 2
    given = number_rows(table, 5) if call.by_place else table
    cut = cut_table(given, call)
    assert sorted(row for part in cut for row in part.index) == list(range(len(table)))
    assert len(cut) <= SLICES
    answers = [answer_slice(cut, number, call) for number in range(SLICES)]
    assert [one is not None for one in answers] == [number < len(cut) for number in range(SLICES)]
    merged = merge_table(given, call, *answers)
    whole = answer_slice([given.reset_index(drop=True)], 0, call) if texts else None
    pd.testing.assert_frame_equal(merged, merge_table(given, call, whole))
    pd.testing.assert_frame_equal(merged[["x", "text"]], table)


@pytest.mark.usefixtures("on_a_worker")
def test_slices_hold_enough_for_an_engine(fake: FakeLLM) -> None:
    call = ask(fake)
    short = pd.DataFrame({"text": [f"question {i}" for i in range(10_000)]})
    sizes = [[len(part) for part in cut_table(short.iloc[:rows], call)] for rows in (1, 31, 70, 192, 10_000)]
    assert sizes == [[1], [16, 15], [9, 9, 9, 9, 9, 8, 9, 8], [24] * 8, [1250] * 8]
    long = pd.DataFrame({"text": [f"{i} " + "word " * 10_000 for i in range(10)]})
    assert sorted(len(part) for part in cut_table(long, call)) == [1, 1, 1, 1, 1, 1, 2, 2]
    assert cut_table(short.iloc[:0], call) == []


@pytest.mark.usefixtures("on_a_worker")
def test_equal_rows_stay_together(fake: FakeLLM) -> None:
    table = pd.DataFrame({"text": [f"question {i % 70}" for i in range(700)]})
    parts = [set(part["text"]) for part in cut_table(table, ask(fake))]
    assert len(parts) == 8
    assert len(set.union(*parts)) == sum(map(len, parts)) == 70


@pytest.mark.usefixtures("on_a_worker")
def test_a_slice_has_no_other_column(fake: FakeLLM) -> None:
    table = pd.DataFrame({"text": ["a"] * 100, "more": "x" * 1000})
    assert {tuple(part.columns) for part in cut_table(table, ask(fake))} == {("text",)}


def test_where_nobody_steals_a_partition_is_one_slice(fake: FakeLLM) -> None:
    assert [len(part) for part in cut_table(pd.DataFrame({"text": ["a"] * 1000}), ask(fake))] == [1000]


@pytest.mark.parametrize(
    ("cell", "tokens"),
    [
        ("a" * 400, 100),
        ("你" * 100, 75),
        ("\ud800" * 4, 3),
        ([1] * 50, 50),
        (np.arange(50), 50),
        (np.array(3), 1),
        ([{"role": "user", "content": "a" * 400}], 101),
        (np.array([{"content": "a" * 400}], dtype=object), 100),
        (None, 1),
        (float("nan"), 1),
        (object(), 1),
        ("", 0),
    ],
)
def test_the_cost_of_a_cell_needs_no_tokenizer(fake: FakeLLM, cell: Any, tokens: int) -> None:
    reading = costs_of([(cell,)], ask(fake, kind="score"))
    assert reading == [1 + tokens]
    call = ask(fake, params=SamplingParams(n=3, max_tokens=1000))
    assert costs_of([(cell,)], call) == [1 + tokens + 3 * 128]
    exact = replace(call, params=call.params.with_(ignore_eos=True))
    assert costs_of([(cell,)], exact) == [1 + tokens + 3 * 1000]


# --- on a cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of two worker processes of one thread each."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


def _pid() -> int:
    import os

    return os.getpid()


def table(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"id": range(rows), "text": [f"row {i}" for i in range(rows)]})


@pytest.mark.cluster
def test_slices_are_stolen_from_a_worker_that_is_slow(two_single: Client, tmp_path: Path) -> None:
    """One worker is held up at its first rows: the other answers all that the first has not begun."""
    spec = FakeSpec(
        log=str(tmp_path / "rows.log"),
        gate=str(tmp_path / "gate"),
        held=str(tmp_path / "held"),
        seconds=0.2,
    )
    llm = FakeLLM(spec)
    held = str(next(iter(two_single.run(_pid).values())))
    Path(str(spec.held)).write_text(held)
    rows = 5 * 128
    # Partitions enough that slices are no roots, which Dask would keep back instead of having them stolen.
    given = dd.from_pandas(table(rows), npartitions=5)
    future = two_single.compute(given.llm.generate(llm, "text"))
    most = 32  # of rows in flight on the slow worker, where the queue is short
    eventually(lambda: llm.processes.count(held) == most)
    eventually(lambda: len(llm.processes) == rows)
    assert llm.processes.count(held) == most
    Path(str(spec.gate)).touch()
    out = future.result(timeout=60)
    pd.testing.assert_index_equal(out.index, table(rows).index)
    assert list(out["generated"]) == [f"<row {i}>" for i in range(rows)]
    assert list(out["id"]) == list(range(rows))
    moved = [event for _, event in two_single.get_events("stealing") if event[0] == "confirm"]
    assert any(len(key) == 3 and key[0].startswith("generate-") for _, key, *_ in moved)
    two_single.run(close_session, spec)


def llm_says(llm: FakeLLM, text: str) -> Any:
    """As `LLM.generate` of a text."""
    return over_rows(client_for(None), answer_rows, [(text,)], ask(llm))[0][0].text


@pytest.mark.cluster
def test_a_call_goes_ahead_of_a_long_job(tmp_path: Path, one_thread: Client) -> None:
    """The job's rows wait for a gate that opens after the call has come back."""
    llm = FakeLLM(FakeSpec(log=str(tmp_path / "rows.log"), gate=str(tmp_path / "gate"), yields=True))
    future = one_thread.compute(dd.from_pandas(table(384), npartitions=3).llm.generate(llm, "text"))
    eventually(lambda: len(llm.processes) == ROWS_IN_HAND)  # the slices that are in flight
    assert llm_says(llm, "x") == "<x>"
    assert not future.done()
    # The slices that come into the pool behind the calls do not begin: the job has its rows in hand already.
    begun = len(llm.processes) - 1
    for number in range(3):
        assert llm_says(llm, f"call {number}") == f"<call {number}>"
    assert len(llm.processes) == begun + 4
    Path(str(llm.spec.gate)).touch()
    assert list(future.result(timeout=60)["generated"]) == [f"<row {i}>" for i in range(384)]
    close_session(llm.spec)  # type: ignore[arg-type]


@pytest.mark.cluster
def test_a_scheduler_bears_more_losses_and_keeps_a_higher_setting(one_thread: Client) -> None:
    scheduler = one_thread.cluster.scheduler
    assert scheduler.allowed_failures < ALLOWED_FAILURES
    one_thread.run_on_scheduler(expect_losses)
    assert scheduler.allowed_failures == ALLOWED_FAILURES
    scheduler.allowed_failures = 1000
    one_thread.run_on_scheduler(expect_losses)
    assert scheduler.allowed_failures == 1000
