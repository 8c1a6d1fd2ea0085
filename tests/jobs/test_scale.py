"""How many tasks a table of many partitions has, and whose progress is whose."""

from __future__ import annotations

import dask
import dask.dataframe as dd
import pandas as pd
import pytest

from daskllm.frame import ask, expr
from daskllm.jobs.watch import jobs_in, watching
from daskllm.runtime.slices import slices_for
from tests.fake_session import FakeLLM

TABLE = pd.DataFrame({"text": [f"row {i}" for i in range(30)]})
MOST_TASKS = 100_000


def part(number: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"row {number}"]})


def test_tasks_are_bounded() -> None:
    for partitions in (1, 2, 300, 511, 512, 1000, 4095, 4096, 16_384):
        assert partitions * (slices_for(partitions) + 2) <= MOST_TASKS
        assert slices_for(partitions) in (1, 2, 4, 8)
    assert slices_for(16_385) == slices_for(MOST_TASKS) == 0


def test_a_table_of_many_partitions_has_a_task_for_each(fake: FakeLLM) -> None:
    frame = dd.from_map(part, range(17_000), meta=part(0))
    out = frame.llm.generate(fake, "text")
    assert len(out.optimize().__dask_graph__()) <= 2 * 17_000
    few = out.partitions[[3, 16_000]].compute(scheduler="sync")
    assert few["generated"].tolist() == ["<row 3>", "<row 16000>"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "n": 2}])
def test_one_task_for_a_partition_gives_what_slices_give(
    fake: FakeLLM, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, object]
) -> None:
    monkeypatch.setattr(ask, "draw_seed", lambda params: 7)
    sliced = dd.from_pandas(TABLE, npartitions=3).llm.generate(fake, "text", **sampling).compute()
    monkeypatch.setattr(expr, "slices_for", lambda partitions: 0)
    again = dd.from_pandas(TABLE.assign(id=1), npartitions=3).llm.generate(fake, "text", **sampling)
    with watching(again.expr, None) as eta:
        whole = again.compute(scheduler="sync")
    pd.testing.assert_frame_equal(whole.drop(columns="id"), sliced)
    assert (eta.state().rows, eta.state().total_rows) == (30, 30)


def test_two_jobs_at_once_are_told_apart(fake: FakeLLM) -> None:
    frame = dd.from_pandas(TABLE, npartitions=3)
    one, other = frame.llm.generate(fake, "text"), frame.llm.generate(fake, "again: {text}")
    assert not jobs_in(one.expr).keys() & jobs_in(other.expr).keys()
    with watching(one.expr, None) as first, watching(other.partitions[[0]].expr, None) as second:
        dask.compute(one, other.partitions[[0]], scheduler="threads")
    assert (first.state().rows, second.state().rows) == (30, 10)
    assert first.state().share == second.state().share == 1


def test_answers_to_answers_are_one_job(fake: FakeLLM) -> None:
    out = dd.from_pandas(TABLE, npartitions=3).llm.generate(fake, "text")
    both = out.llm.generate(fake, "generated", output="more")
    with watching(both.expr, None) as eta:
        both.compute(scheduler="sync")
    assert (eta.state().rows, eta.state().total_rows, eta.state().eta) == (60, 60, 0)
