"""What a job would take, told from a sample and a few rows, and checked against the job itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from distributed import Client

from daskllm.cli import main
from daskllm.jobs.explanation import Explanation
from daskllm.jobs.lengths import Lengths
from daskllm.jobs.sample import TRIAL_ROWS, Distinct, common_prefix, sample_of
from daskllm.jobs.trial import Trial
from daskllm.llm import LLM, load
from daskllm.metrics import StepCosts
from daskllm.runtime.call import Call
from tests.fake_session import FakeLLM
from tests.tiny import make_model

ROWS = 600


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = load(str(make_model("llama-gqa", tmp_path_factory.mktemp("explain") / "model")))
    yield model
    model.close()


@pytest.fixture
def table() -> pd.DataFrame:
    """Every third row is like another; a null and an empty cell."""
    text: list[Any] = [f"row {i % 400} " + "x" * (i % 7) for i in range(ROWS)]
    text[400:] = text[:200]
    text[5], text[6] = None, ""
    return pd.DataFrame({"id": range(ROWS), "text": text})


def test_everything_counted_is_what_the_job_reads(llm: LLM, table: pd.DataFrame) -> None:
    frame = dd.from_pandas(table, npartitions=5)
    out = frame.llm.generate(llm, "text", max_tokens=4, ignore_eos=True)
    found = out.llm.explain(full=True, seconds=2)
    answers = out.compute()
    assert found.rows == len(answers) == found.counted
    assert found.prompt_tokens == answers["generated_prompt_tokens"].sum()
    assert found.prompt_tokens_error == 0
    assert found.failed == (answers["generated_finish_reason"] == "error").sum() == 2
    assert sorted(found.reasons) == sorted(answers["generated_error"].dropna().unique())
    assert found.longest_prompt == answers["generated_prompt_tokens"].max()
    assert found.output_tokens == found.most_output_tokens == answers["generated_completion_tokens"].sum()
    assert found.duplicates == ROWS - table["text"].nunique(dropna=False)
    assert found.common_prefix > 0
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.tried > 0


def test_a_sample_is_near_the_whole(llm: LLM) -> None:
    many = pd.DataFrame({"text": [f"number {i} " + "word " * (i % 11) for i in range(6000)]})
    frame = dd.from_pandas(many, npartitions=12)
    whole = frame.llm.explain(llm, "text", full=True, seconds=0)
    found = frame.llm.explain(llm, "text", seconds=0)
    assert found.counted < whole.counted == found.rows == 6000
    assert found.partitions_looked_at < found.partitions == 12
    assert abs(found.prompt_tokens - whole.prompt_tokens) <= 2 * found.prompt_tokens_error
    assert 0 < found.prompt_tokens_error < 0.1 * whole.prompt_tokens
    assert found.seconds is None
    assert found.output_tokens is None


def test_nothing_runs_on_the_table_but_the_rows_tried(fake: FakeLLM, table: pd.DataFrame) -> None:
    before = table.copy()
    frame = dd.from_pandas(table, npartitions=3)
    out = frame.llm.generate(fake, "text")
    out.llm.explain(seconds=0)
    assert fake.rows == 0
    found = out.llm.explain()
    assert fake.rows <= TRIAL_ROWS + 1
    assert found.seconds is not None
    pd.testing.assert_frame_equal(table, before)


def test_filters_below_the_answers_count(fake: FakeLLM, table: pd.DataFrame) -> None:
    out = dd.from_pandas(table, npartitions=3).llm.generate(fake, "text")
    assert out[out.id < 100].llm.explain(full=True, seconds=0).rows == 100
    drawn = dd.from_pandas(table, npartitions=3).llm.generate(fake, "text", temperature=1.0)
    found = drawn.llm.explain(seconds=0)
    assert (found.rows, found.duplicates) == (ROWS, 0)


def test_rows_that_are_remembered(llm: LLM, table: pd.DataFrame, tmp_path: Path) -> None:
    keeping = load(llm.spec.path, answers=str(tmp_path))
    frame = dd.from_pandas(table, npartitions=2)
    out = frame.llm.generate(keeping, "text", max_tokens=3)
    assert out.llm.explain(full=True, seconds=0).remembered == 0
    out.partitions[0].compute()
    found = out.llm.explain(full=True, seconds=0)
    # The second half of the rows repeats some of the first.
    expected = table["text"].isin(table["text"][:300].dropna()) & (table["text"] != "")
    assert found.remembered == expected.sum()
    assert found.computed < 600 - 300


def test_pandas_and_other_kinds(llm: LLM, table: pd.DataFrame) -> None:
    found = table.llm.explain(llm, "text", kind="score", seconds=1)
    assert (found.kind, found.output_tokens, found.most_output_tokens) == ("score", 0, 0)
    assert table.llm.explain(llm, "text", kind="embed", seconds=0, pooling="last").rows == ROWS


def test_what_cannot_be_explained_says_why(fake: FakeLLM, table: pd.DataFrame) -> None:
    frame = dd.from_pandas(table, npartitions=2)
    out = frame.llm.generate(fake, "text")
    with pytest.raises(ValueError, match="no answers to come"):
        frame.llm.explain()
    with pytest.raises(ValueError, match="'generated', 'more'"):
        out.llm.generate(fake, "text", output="more").llm.explain()
    with pytest.raises(TypeError, match="answered at once"):
        table.llm.explain()
    with pytest.raises(TypeError, match="a column or a template"):
        frame.llm.explain(fake)
    with pytest.raises(TypeError, match="model first"):
        frame.llm.explain(prompt="text")
    with pytest.raises(ValueError, match="kind must be"):
        frame.llm.explain(fake, "text", kind="guess")
    with pytest.raises(TypeError, match="no argument 'pool'"):
        frame.llm.explain(fake, "text", pool=3)
    with pytest.raises(ValueError, match="seconds"):
        out.llm.explain(seconds=-1)
    with pytest.raises(KeyError):
        frame.llm.explain(fake, "no such column")


@pytest.mark.cluster
def test_a_cluster_counts_and_tries_where_its_workers_are(
    fake: FakeLLM, table: pd.DataFrame, two_processes: Client
) -> None:
    out = dd.from_pandas(table, npartitions=6).llm.generate(fake, "text")
    found = out.llm.explain(full=True)
    assert (found.engines, found.rows, found.failed) == (2, ROWS, 2)
    assert len(Counter(fake.processes)) == 2
    assert found.tried > 0


def test_an_empty_table(fake: FakeLLM) -> None:
    empty = pd.DataFrame({"text": pd.Series([], dtype=object)})
    found = dd.from_pandas(empty, npartitions=1).llm.explain(fake, "text")
    assert (found.rows, found.prompt_tokens, found.tried) == (0, 0, 0)
    assert "rows" in str(found)


def test_the_table_is_text_html_and_data(fake: FakeLLM, table: pd.DataFrame) -> None:
    table["text"] = table["text"].fillna("<b>")
    found = table.llm.explain(fake, "text", seconds=0)
    assert isinstance(found, Explanation)
    assert "600 in 1 partitions" in str(found)
    assert found._repr_html_().count("<tr>") == len(str(found).splitlines())
    assert json.loads(json.dumps(found.to_dict()))["rows"] == ROWS


def test_dry_run_writes_nothing(llm: LLM, table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_parquet(tmp_path / "in.parquet")
    arguments = ["generate", "--model", llm.spec.path, "--input", str(tmp_path / "in.parquet"), "--prompt",
                 "text", "--max-tokens", "3", "--no-answers", "--json"]  # fmt: skip
    done = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.strip().splitlines()[-1])["rows"] == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]
    failed = CliRunner().invoke(main, arguments)
    assert failed.exit_code == 2
    assert "--output" in failed.output


# --- what the numbers are made of ---------------------------------------------------------------------------


def test_samples_of_partitions_add_up_and_stay_small(fake: FakeLLM) -> None:
    call = Call(spec=fake.spec, kind="generate", labels=("text",))  # type: ignore[arg-type]
    parts = [pd.DataFrame({"text": [f"{part}-{i}" for i in range(1000)]}) for part in range(3)]
    samples = [sample_of(part, call, 400, seed) for seed, part in enumerate(parts)]
    whole = samples[0] + samples[1] + samples[2]
    assert (whole.rows, whole.counted, whole.distinct.count) == (3000, 1200, 3000)
    assert len(whole.trial) == TRIAL_ROWS
    assert {cells[0].partition("-")[0] for cells, _ in whole.trial} == {"0", "1", "2"}
    again = sample_of(parts[0], call, 400, 0)
    assert again.trial == samples[0].trial


def test_different_rows_are_counted_in_bounded_memory() -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 200_000, dtype=np.uint64)
    halves = Distinct.of(np.concatenate([hashes[:150_000]] * 2)) + Distinct.of(hashes[50_000:])
    assert len(halves.least) == len(Distinct.of(hashes).least) < 20_000
    assert abs(halves.count - 200_000) < 0.04 * 200_000


def test_the_common_prefix() -> None:
    assert common_prefix([]) is None
    assert common_prefix([(1, 2)]) == (1, 2)
    assert common_prefix([(1, 2, 3), (2, 2, 3)]) == ()


def test_answers_that_go_on_count_for_what_is_known_of_them() -> None:
    """Rows of random lengths on a few slots, looked at when few have ended."""
    draw = np.random.default_rng(1)
    naive, estimate, rest, true_rest = [], [], [], []
    for _ in range(40):
        slots = [[0, 1 + int(draw.exponential(39))] for _ in range(64)]
        ended: Counter[int] = Counter()
        for _ in range(40):
            for slot in slots:
                slot[0] += 1
                if slot[0] >= slot[1]:
                    ended[slot[1]] += 1
                    slot[:] = [0, 1 + int(draw.exponential(39))]
        lengths = Lengths(ended, [slot[0] for slot in slots], 512)
        naive.append(sum(length * count for length, count in ended.items()) / sum(ended.values()))
        estimate.append(lengths.mean)
        rest.append(np.mean([lengths.rest(slot[0]) for slot in slots]))
        true_rest.append(np.mean([slot[1] - slot[0] for slot in slots]))
    assert np.mean(naive) < 25
    assert abs(np.mean(estimate) - 40) < 3
    assert abs(np.mean(rest) - np.mean(true_rest)) < 4


def test_answers_of_one_length() -> None:
    lengths = Lengths({40: 64}, [10] * 64, most=128)
    assert lengths.mean == pytest.approx(40)
    assert lengths.rest(10) == pytest.approx(30)
    assert Lengths({}, [3, 4], most=16).mean == 16


def test_seconds_are_told_from_steps() -> None:
    costs = StepCosts(0.01, 0.001, 0.002)
    trial = Trial(3, 1.0, 30, Counter({4: 3}), (), costs, batch=4)
    assert trial.expected_seconds(8, 100, 40) == pytest.approx(0.01 * 10 + 0.1 + 0.08)
    assert Trial(4, 2.0, 30, Counter(), (), None, 4).expected_seconds(8, 0, 0) == 4.0
    assert Trial(0, 2.0, 0, Counter(), (), None, 4).expected_seconds(8, 0, 0) is None
