"""Jobs in the background: found by name, watched, cancelled, outliving the client that submitted them."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import daskllm
import daskllm.jobs as jobs
from daskllm import demo
from daskllm.jobs import background
from daskllm.runtime.process import session_for
from tests.fake_session import FakeLLM
from tests.waiting import eventually

TABLE = pd.DataFrame({"text": [f"row {i}" for i in range(40)]})


def answers(llm: FakeLLM, partitions: int = 4) -> Any:
    return dd.from_pandas(TABLE, npartitions=partitions).llm.generate(llm, "text")


def written(path: Path) -> list[str]:
    return pd.read_parquet(path).sort_index()["generated"].tolist()


EXPECTED = [f"<row {i}>" for i in range(40)]


def test_a_thread_of_this_process(gated: FakeLLM, tmp_path: Path) -> None:
    job = answers(gated).llm.submit(str(tmp_path / "out"), name="here")
    eventually(lambda: gated.rows)
    assert job.status() == "running"
    assert jobs.find("here") is job
    assert repr(job) == f"<job 'here' that writes {tmp_path / 'out'}>"
    assert "here" in jobs.names()
    with pytest.raises(TimeoutError):
        job.result(timeout=0.01)
    with pytest.raises(ValueError, match="'here' is running"):
        answers(gated).llm.submit(str(tmp_path / "other"), name="here")
    Path(str(gated.spec.gate)).touch()
    assert job.result(timeout=30).rows == 40
    assert (job.status(), job.progress().rows, job.progress().eta) == ("finished", 40, 0)
    assert written(tmp_path / "out") == EXPECTED


def test_a_thread_is_cancelled_and_goes_on_from_there(gated: FakeLLM, tmp_path: Path) -> None:
    job = answers(gated).llm.submit(str(tmp_path / "out"), name="stopped")
    eventually(lambda: gated.rows)
    job.cancel()
    assert session_for(gated.spec).interrupted.wait(10)  # type: ignore[arg-type,attr-defined]
    with pytest.raises(InterruptedError):
        job.result(timeout=30)
    assert job.status() == "cancelled"
    Path(str(gated.spec.gate)).touch()
    again = answers(gated).llm.submit(str(tmp_path / "out"), name="stopped")
    again.result(timeout=30)
    assert written(tmp_path / "out") == EXPECTED


def test_what_is_refused_is_refused_at_once(fake: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        answers(fake).llm.submit(str(tmp_path))
    with pytest.raises(TypeError, match="name must be text"):
        answers(fake).llm.submit(str(tmp_path / "out"), name=3)
    with pytest.raises(TypeError, match="priority must be an integer"):
        answers(fake).llm.submit(str(tmp_path / "out"), priority="high")
    with pytest.raises(KeyError, match="no job is named 'nobody'"):
        jobs.find("nobody")
    assert fake.rows == 0


def test_a_job_that_fails_says_why(fake: FakeLLM, tmp_path: Path) -> None:
    table = pd.DataFrame({"text": ["a", None, "b"]})
    out = dd.from_pandas(table, npartitions=1).llm.generate(fake, "text")
    job = out.llm.submit(str(tmp_path / "out"), name="failing", on_error="raise")
    with pytest.raises(Exception, match="null"):
        job.result(timeout=30)
    assert job.status() == "failed"


def test_a_job_whose_summary_was_lost_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    future, told = SimpleNamespace(status="lost"), SimpleNamespace(get=lambda timeout: {"rows": 1})
    monkeypatch.setattr(background, "_told", lambda name, client: told)
    record = {"path": "out", "priority": 0, "future": future}
    job = background._ClusterJob("again", record, SimpleNamespace())  # type: ignore[arg-type]
    assert job.status() == "running"
    future.status = "finished"
    assert job.status() == "finished"
    for future.status in ("cancelled", "finished"):
        assert job.status() == "cancelled"


@pytest.mark.cluster
def test_a_job_outlives_its_client_and_is_found_by_name(
    gated: FakeLLM, two_processes_cluster: LocalCluster, tmp_path: Path
) -> None:
    with Client(two_processes_cluster) as first:
        job = answers(gated).llm.submit(str(tmp_path / "out"), name="night", priority=-3)
        eventually(lambda: gated.rows)
        assert job.status() == "running"
        assert jobs.queue(first)[-3]["running"] > 0
    with Client(two_processes_cluster) as second:
        found = jobs.find("night", second)
        assert (found.name, found.path, found.priority) == ("night", str(tmp_path / "out"), -3)
        assert "night" in jobs.names(second)
        assert found.status() == "running"
        eventually(lambda: found.progress().total_rows == 40)
        with pytest.raises(ValueError, match="'night' is running"):
            answers(gated).llm.submit(str(tmp_path / "other"), name="night")
        Path(str(gated.spec.gate)).touch()
        assert found.result(timeout=60).rows == 40
        assert (found.status(), found.progress().rows) == ("finished", 40)
        assert jobs.find("night", second).status() == "finished"
        with pytest.raises(KeyError, match="'night'"):
            jobs.find("day", second)
    assert written(tmp_path / "out") == EXPECTED


@pytest.mark.cluster
def test_a_job_is_cancelled_by_whoever_finds_it(
    gated: FakeLLM, two_processes_cluster: LocalCluster, tmp_path: Path
) -> None:
    with (
        Client(two_processes_cluster) as first,
        Client(two_processes_cluster, set_as_default=False) as second,
    ):
        job = answers(gated).llm.submit(str(tmp_path / "out"), name="unwanted", priority=5)
        eventually(lambda: gated.rows)
        jobs.find("unwanted", second).cancel()
        eventually(lambda: not jobs.queue(first))
        eventually(lambda: all(not running for running in first.run(_running, gated.spec).values()))
        assert eventually(lambda: job.status() == "cancelled")
        assert jobs.find("unwanted", first).status() == "cancelled"
        with pytest.raises(InterruptedError):
            job.result(timeout=10)
        Path(str(gated.spec.gate)).touch()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = answers(gated).llm.submit(str(tmp_path / "out"), name="unwanted")
        assert not [one for one in said if "key is unknown" in str(one.message)]
        assert again.result(timeout=60).rows == 40
    assert written(tmp_path / "out") == EXPECTED


@pytest.mark.cluster
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("leave", ["client", "model"])
def test_a_job_ends_well_though_its_model_was_let_go_meanwhile(
    stages: int, leave: str, two_processes_cluster: LocalCluster, tmp_path: Path
) -> None:
    """Rows come late, when nobody has a lease any more and no worker has the model open."""
    gate, name = tmp_path / "gate", f"late-{leave}-{stages}"
    source = dd.from_pandas(demo.table().head(24), npartitions=4)
    late = source.map_partitions(_once_there, str(gate), meta=source)
    with Client(two_processes_cluster, set_as_default=False) as watcher:
        with Client(two_processes_cluster) as first, dask.config.set({"daskllm.lease": "300ms"}):
            llm = daskllm.load(demo.model_path(), client=first, stages=stages)
            llm.generate("A", max_tokens=1)  # where kernels are not compiled yet, they are now
            late.llm.chat(llm, "prompt", max_tokens=64).llm.submit(str(tmp_path / "out"), name=name)
            if leave == "model":
                eventually(lambda: _done(tmp_path / "out") >= 3)
                llm.close()
        eventually(lambda: _done(tmp_path / "out") >= 3)
        eventually(lambda: daskllm.loaded(watcher).empty)
        job = jobs.find(name, watcher)
        assert job.status() == "running"
        gate.touch()
        assert job.result(timeout=120).rows == 24
        assert demo.share_right(pd.read_parquet(tmp_path / "out")) >= 0.9
        # And it is let go again, by whichever worker opened it for the job.
        eventually(lambda: daskllm.loaded(watcher).empty)


@pytest.mark.cluster
@pytest.mark.parametrize("stages", [1, 2])
def test_closing_a_model_waits_for_the_rows_of_a_job(
    stages: int, two_processes_cluster: LocalCluster, tmp_path: Path
) -> None:
    table, name = dd.from_pandas(demo.table().head(24), npartitions=2), f"closed-{stages}"
    with Client(two_processes_cluster) as client, dask.config.set({"daskllm.lease": "300ms"}):
        llm = daskllm.load(demo.model_path(), client=client, stages=stages)
        llm.generate("A", max_tokens=1)
        out = table.llm.chat(llm, "prompt", max_tokens=400, ignore_eos=True)
        job = out.llm.submit(str(tmp_path / "out"), name=name)
        eventually(lambda: job.progress().output_tokens)
        llm.close()
        assert job.result(timeout=120).rows == 24
        written = pd.read_parquet(tmp_path / "out")
        assert set(written["generated_completion_tokens"]) == {400}
        eventually(lambda: daskllm.loaded(client).empty)


def _once_there(rows: pd.DataFrame, gate: str) -> pd.DataFrame:
    """These rows; the table's last quarter only when there is a file."""
    while rows.index.min() >= 18 and not Path(gate).exists():
        time.sleep(0.02)
    return rows


def _done(directory: Path) -> int:
    return len([*directory.glob("*.parquet")])


def _running(spec: Any) -> int:
    """Calls that this worker's session is in."""
    return int(session_for(spec).running)  # type: ignore[attr-defined]
