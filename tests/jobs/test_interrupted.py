"""Jobs that lose their client, a worker, the disk or their weights: the table is the undisturbed one."""

from __future__ import annotations

import errno
import os
import resource
import signal
import string
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

import daskllm
from daskllm.jobs import prepare, run
from tests import tiny
from tests.fake_session import FakeLLM, FakeSpec
from tests.jobs.client import answered
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
ROWS, PARTS = 40, 8


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A directory of eight Parquet files of five rows."""
    path = tmp_path / "rows"
    path.mkdir()
    for part in range(PARTS):
        text = [f"row {n}" for n in range(part * 5, part * 5 + 5)]
        pd.DataFrame({"text": text}).to_parquet(path / f"{part}.parquet")
    return path


def files(path: Path) -> dict[str, tuple[int, int]]:
    """The parts with inode and time, which tell whether one was written again."""
    parts = sorted(path.glob("part.*"))
    return {part.name: (part.stat().st_ino, part.stat().st_mtime_ns) for part in parts}


def test_a_client_that_is_killed_goes_on_by_the_same_call(rows: Path, tmp_path: Path) -> None:
    out, gate, log = tmp_path / "out", tmp_path / "gate", tmp_path / "rows.log"
    command = [sys.executable, "-m", "tests.jobs.client", rows, out, gate, log, "20"]
    client = subprocess.Popen(command, cwd=ROOT)  # type: ignore[arg-type]
    try:
        eventually(lambda: len(files(out)) == 4 or client.poll() is not None)
        assert client.poll() is None, "the client ended before it was killed"
    finally:
        client.kill()
        client.wait()
    before = files(out)
    counted = log.read_text().splitlines()
    assert len(before) == 4
    assert counted == [str(client.pid)] * 20
    gate.touch()
    done = answered(rows, gate, log).llm.to_parquet(out)
    assert (done.parts, done.written, done.rows) == (PARTS, 4, ROWS)
    assert len(log.read_text().splitlines()) == ROWS
    assert before.items() <= files(out).items()
    # The undisturbed job draws by the same seed.
    undisturbed = prepare(answered(rows, gate, log), tmp_path / "whole", client=None)
    (call,) = {c for node in undisturbed.expr.walk() for c in node.operands if hasattr(c, "job_seed")}
    seed = prepare(answered(rows, gate, log), out, client=None).manifest.description.seeds[0]
    assert call.job_seed != seed
    (tmp_path / "whole").mkdir()
    manifest = replace(prepare(answered(rows, gate, log), out, client=None).manifest, done={}, finished=False)
    manifest.write(undisturbed.recipe.directory)
    answered(rows, gate, log).llm.to_parquet(tmp_path / "whole")
    pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(tmp_path / "whole"))


@pytest.fixture
def client() -> Iterator[Client]:
    """A client of two worker processes of its own."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.cluster
def test_a_worker_that_is_killed_takes_no_finished_part_with_it(client: Client, tmp_path: Path) -> None:
    pids = list(client.run(os.getpid).values())
    held = tmp_path / "held"
    held.write_text(str(pids[0]))
    spec = FakeSpec(log=str(tmp_path / "rows.log"), gate=str(tmp_path / "gate"), held=str(held))
    # So many rows that the held worker does not take all of the queue in hand.
    texts = pd.DataFrame({"text": [f"row {n}" for n in range(60 * PARTS)]})
    frame = dd.from_pandas(texts, npartitions=PARTS)
    table = frame.llm.generate(FakeLLM(spec), "text", seed=1, temperature=1)
    out = tmp_path / "out"
    job = prepare(table, out, client=client)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, job, client)
        try:
            eventually(lambda: len(files(out)) >= 1 and str(pids[0]) in FakeLLM(spec).processes)
            before = files(out)
            os.kill(pids[0], signal.SIGKILL)
            done = running.result(timeout=60)
        finally:
            Path(str(spec.gate)).touch()  # or after a failure the run would wait for good
    assert (done.written, done.rows) == (PARTS, len(texts))
    assert before.items() <= files(out).items()
    expected = table.compute(scheduler="threads").reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected, check_dtype=False)
    assert table.llm.to_parquet(out).written == 0


@pytest.mark.cluster
def test_a_job_on_a_cluster_that_is_stopped_lets_its_tasks_go(
    two_processes: Client, rows: Path, tmp_path: Path
) -> None:
    spec = FakeSpec(log=str(tmp_path / "rows.log"), gate=str(tmp_path / "gate"))
    table = dd.read_parquet(str(rows / "*.parquet")).llm.generate(FakeLLM(spec), "text")
    job = prepare(table, tmp_path / "out", client=two_processes)
    with pytest.raises(InterruptedError, match="cancelled"):
        run(job, two_processes, cancelled=lambda: bool(FakeLLM(spec).rows))
    eventually(lambda: not any(two_processes.processing().values()))
    Path(str(spec.gate)).touch()
    done = table.llm.to_parquet(tmp_path / "out")
    assert (done.written, done.rows) == (PARTS, ROWS)


def test_a_full_disk_is_one_clear_error_and_what_was_finished_stays(tmp_path: Path, fake: FakeLLM) -> None:
    big = "".join(Random(0).choices(string.printable, k=400_000))  # which no compression makes small
    frame = dd.from_pandas(pd.DataFrame({"text": ["a", "b", "c", big]}), npartitions=4)
    table = frame.llm.generate(fake, "text")
    table.llm.to_parquet(tmp_path / "out")
    (tmp_path / "out" / max(files(tmp_path / "out"))).unlink()
    there = files(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))
    try:
        with (
            dask.config.set(scheduler="synchronous"),
            pytest.raises(
                OSError, match=r"part\.00003-.* cannot be written to .*What was finished stays"
            ) as full,
        ):
            table.llm.to_parquet(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.value.errno == errno.EFBIG
    assert files(tmp_path / "out") == there
    assert len(list((tmp_path / "out").iterdir())) == 4  # with the manifest, and nothing half written
    assert sorted(pd.read_parquet(tmp_path / "out")["generated"]) == ["<a>", "<b>", "<c>"]
    assert table.llm.to_parquet(tmp_path / "out").written == 1
    assert there.items() <= files(tmp_path / "out").items()


@pytest.mark.parametrize("place", ["/proc/daskllm", "file/out"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_row(
    tmp_path: Path, fake: FakeLLM, place: str
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / place
    table = dd.from_pandas(pd.DataFrame({"text": ["a"]}), npartitions=1).llm.generate(fake, "text")
    with pytest.raises(OSError, match=str(path)):
        table.llm.to_parquet(path)
    assert fake.rows == 0


def test_an_update_in_between_does_not_mix_versions(tmp_path: Path) -> None:
    paths = [tiny.make_model("llama-gqa", tmp_path / str(seed), seed=seed) for seed in (0, 7)]
    frame = dd.from_pandas(pd.DataFrame({"text": [f"row {i}" for i in range(6)]}), npartitions=3)
    options = {"max_tokens": 6, "ignore_eos": True}
    with dask.config.set(scheduler="synchronous"):
        llm = daskllm.load(paths[0])
        table = frame.llm.generate(llm, "text", **options)
        expected = table.compute()
        job = prepare(table, tmp_path / "out", client=None)
        run(job, told=lambda part: llm.update(paths[1]) if part.number == 0 else None)
        assert llm.version == 1
        changed = table.compute()
        assert not (changed["generated"] == expected["generated"]).any()
        assert pd.read_parquet(tmp_path / "out")["generated"].tolist() == expected["generated"].tolist()
        with pytest.raises(ValueError, match=r"model\.content"):
            table.llm.to_parquet(tmp_path / "out")
        llm.close()
