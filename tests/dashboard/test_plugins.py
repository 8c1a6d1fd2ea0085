"""The figures of a real job on a real cluster: where they come from, and where they can be read."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client, LocalCluster, Scheduler, span

import daskllm
from daskllm import demo
from daskllm.dashboard import metrics
from daskllm.dashboard.board import Board
from daskllm.dashboard.plugins import NAME, BoardPlugin, board_of
from daskllm.runtime.progress import TOPIC, Increment
from tests.dashboard.conftest import asked, got, page, rows
from tests.waiting import eventually

pytestmark = pytest.mark.cluster


def board_says(client: Client, what: Callable[[Board], Any]) -> Any:
    """Something of a scheduler's board; plain data, since it is sent."""

    def look(dask_scheduler: Scheduler) -> Any:
        board = board_of(dask_scheduler)
        assert board is not None
        dask_scheduler.plugins[NAME].look()
        return what(board)

    return client.run_on_scheduler(look)


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    named = [(s.name, frozenset(s.labels.items()), s.value) for s in found if s.name.startswith("daskllm_")]
    assert len({(name, labels) for name, labels, _ in named}) == len(named)
    return {(name, labels): value for name, labels, value in named}


@pytest.fixture(scope="module")
def job(client: Client, llm: daskllm.LLM) -> str:
    """The name of a job that is done: 40 rows of 16 tokens, one more that fails."""
    table = rows(41)
    table.loc[7, "text"] = None
    answers = asked(llm, table)
    with span("evening"), span("sums"):
        futures = client.compute(answers)
    assert futures.result()["generated"].notna().sum() == 40
    return "evening/sums"


def test_both_ends_say_the_same_figures_on_metrics(cluster: LocalCluster, client: Client, job: str) -> None:
    label = frozenset({("job", job)})

    def scheduler_knows() -> Any:
        found = samples(page(cluster, "/metrics"))
        # A heartbeat's figures are half a second old at most.
        tokens = sum(v for (name, _), v in found.items() if name == "daskllm_output_tokens_total")
        return found if tokens >= 640 and found.get(("daskllm_rows_total", label)) == 41 else None

    found = eventually(scheduler_knows)
    failed = label | {("kind", "null")}
    assert found["daskllm_failed_rows_total", failed] == 1
    assert found["daskllm_job_output_tokens_total", label] == 640
    assert found["daskllm_job_rows", label] == 41
    assert found["daskllm_workers", frozenset()] == 2
    workers = client.scheduler_info()["workers"].values()
    each = [samples(got(f"http://{w['host']}:{w['services']['dashboard']}/metrics")) for w in workers]
    for ours, theirs, labels in (
        ("daskllm_rows_total", "daskllm_worker_rows_total", label),
        ("daskllm_failed_rows_total", "daskllm_worker_failed_rows_total", failed),
        ("daskllm_job_prompt_tokens_total", "daskllm_worker_job_prompt_tokens_total", label),
    ):
        assert found[ours, labels] == sum(one.get((theirs, labels), 0) for one in each) > 0
    held = frozenset({("model", "model"), ("stage", "")})
    resident = [one["daskllm_worker_resident_bytes", held] for one in each]
    assert min(resident) > 1e6
    busy = frozenset({("phase", "decode")})
    assert all(
        one["daskllm_worker_engine_seconds_total", busy] > 0
        for one in each
        if one.get(("daskllm_worker_rows_total", label))
    )


def test_every_metric_is_one_of_the_table(cluster: LocalCluster, client: Client, job: str) -> None:
    worker = next(iter(client.scheduler_info()["workers"].values()))
    urls = {"scheduler": str(cluster.dashboard_link).removesuffix("/status")}
    urls["worker"] = f"http://{worker['host']}:{worker['services']['dashboard']}"
    for on, url in urls.items():
        known = {m.sample: set(m.labels) for m in metrics.METRICS if m.on == on}
        found = samples(got(f"{url}/metrics"))
        assert {name for name, _ in found} <= set(known)
        assert all({label for label, _ in labels} == known[name] for name, labels in found)
        # What no job of this test has: a time left, and on one worker perhaps no failed row.
        assert len({name for name, _ in found}) >= len(known) - 2


def test_a_span_has_its_own_tokens_and_rows(client: Client, job: str) -> None:
    def look(dask_scheduler: Scheduler) -> dict[Any, float]:
        sums: dict[Any, float] = {}
        for one in dask_scheduler.extensions["spans"].find_by_tags("evening"):
            for (_, _, what, unit), value in one.cumulative_worker_metrics.items():
                sums[what, unit] = sums.get((what, unit), 0) + value
        return sums

    found = eventually(lambda: (s := client.run_on_scheduler(look)).get(("output", "tokens"), 0) >= 640 and s)
    assert (found["output", "tokens"], found["answered", "rows"], found["failed", "rows"]) == (640, 40, 1)


def test_jobs_in_the_background_are_spans_of_their_names(
    client: Client, llm: daskllm.LLM, tmp_path: Path
) -> None:
    with client.as_current():
        done = asked(llm, rows(12)).llm.submit(str(tmp_path / "out"), name="nightly", priority=4)
        assert done.result(timeout=60).rows == 12

    def told(board: Board) -> Any:
        job = board.jobs.get("nightly")
        return job and (job.counts["rows"], job.state(0.0).total_rows, job.priority)

    eventually(lambda: board_says(client, told) == (12, 12, 4))


def test_a_job_that_goes_on_waits_for_the_partitions_that_are_left() -> None:
    left = range(90, 100)
    keys = ["job", ("chat-cut-02", 3), ("chat-01", 90, 0), ("sum-01", 7), *(("chat-cut-01", n) for n in left)]
    plugin = BoardPlugin()
    plugin._scheduler = SimpleNamespace(tasks=dict.fromkeys(keys))  # type: ignore[assignment]
    cut = Increment(job="chat-cut-01", task="('chat-cut-01', 93)", part=93, cut_rows=5)
    assert plugin._parts(cut) == set(left)
    assert plugin._parts(replace(cut, cut_rows=0, rows=5)) == set()
    plugin.log_event(TOPIC, asdict(cut))
    assert plugin.board.jobs["chat 01"].state(0.0).total_rows == 50


def test_lists_have_a_name_too(client: Client, llm: daskllm.LLM) -> None:
    assert len(llm.generate(["one", "two"], max_tokens=2)) == 2
    eventually(
        lambda: board_says(client, lambda b: "lists" in b.jobs and b.jobs["lists"].counts["rows"] == 2)
    )


def test_events_can_be_subscribed_to(client: Client, llm: daskllm.LLM) -> None:
    heard: list[Any] = []
    client.subscribe_topic("daskllm", heard.append)
    try:
        with span("heard"):
            futures = client.compute(asked(llm, rows(5)))
        futures.result()
        eventually(lambda: sum(told.get("rows", 0) for _, told in heard if told.get("span") == "heard") == 5)
    finally:
        client.unsubscribe_topic("daskllm")


def test_stages_are_told_with_their_layers(client: Client) -> None:
    staged = daskllm.load(demo.model_path(), client=client, dtype="float32", answers=None, stages=2)
    try:
        staged.generate([f"{i}" for i in range(4)], max_tokens=8, ignore_eos=True)

        def stages(board: Board) -> Any:
            return {e.stage: asdict(e) for _, e in board.engines() if e.stage}

        def parts() -> Any:
            found = board_says(client, stages)
            return found if len(found) == 2 and all(one["steps"] for one in found.values()) else None

        found = eventually(parts)
        assert found["1/2"]["layers"].startswith("embed, layers 0")
        assert found["2/2"]["layers"].endswith("head")
        assert found["1/2"]["stage_seconds"] > 0
        eventually(lambda: board_says(client, stages)["2/2"]["output_tokens"] == 32)
    finally:
        staged.close()


def test_the_page_is_listed_and_comes_with_all_that_it_needs(cluster: LocalCluster, llm: daskllm.LLM) -> None:
    plots = json.loads(page(cluster, "/individual-plots.json"))
    assert plots["Individual Llm"] == "/individual-llm"
    for path in ("/llm", *(one for one in plots.values() if one.startswith("/individual-llm"))):
        text = page(cluster, path)
        assert "data-root-id" in text
        assert 'src="static/js/bokeh' in text
        assert "cdn." not in text
    assert 'href="llm"' in page(cluster, "/status")


def test_loading_again_adds_nothing(cluster: LocalCluster, client: Client, llm: daskllm.LLM) -> None:
    daskllm.load(demo.model_path(), client=client, dtype="float32", answers=None).close()
    assert page(cluster, "/status").count('href="llm"') == 1


@pytest.fixture
def preloaded() -> Iterator[str]:
    """The dashboard's address of a scheduler that was started with the preload."""
    with ExitStack() as stack:
        ports = []
        for _ in range(2):
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                ports.append(s.getsockname()[1])
        dask = str(Path(sys.executable).with_name("dask"))
        command = [dask, "scheduler", "--host", "127.0.0.1", "--port", str(ports[0])]
        command += ["--dashboard-address", f"127.0.0.1:{ports[1]}", "--preload", "daskllm.dashboard"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        yield f"http://127.0.0.1:{ports[1]}"


def test_a_scheduler_has_the_page_from_its_start(preloaded: str) -> None:
    def answered() -> str:
        try:
            return got(f"{preloaded}/llm")
        except OSError:
            return ""

    assert "data-root-id" in eventually(answered)
    found = samples(got(f"{preloaded}/metrics"))
    assert found["daskllm_steals_total", frozenset()] == 0
    assert found["daskllm_workers", frozenset()] == 0


def test_without_bokeh_load_and_metrics_go_on(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["bokeh"] = None
import daskllm, urllib.request
from daskllm import demo
from distributed import Client, LocalCluster
if __name__ == "__main__":
    options = {"processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(1, **options) as cluster, Client(cluster) as client:
        llm = daskllm.load(demo.model_path(), client=client, answers=None)
        port = cluster.scheduler.http_server.port
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        print(llm.generate("one", max_tokens=2, ignore_eos=True).completion_tokens, "daskllm_workers" in text)
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "True"], done.stderr
