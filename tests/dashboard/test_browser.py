"""The page as somebody sees it: in a real Chromium, while a job runs, and after a worker has died."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from distributed import Client, LocalCluster

import daskllm
from daskllm import demo
from tests.dashboard.browser import CHROMIUM, Tab, browsing
from tests.dashboard.conftest import address, asked, rows

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture
def watched() -> Iterator[tuple[LocalCluster, Client]]:
    """A cluster with a job that lasts for as long as it is watched."""
    with daskllm.local_cluster(2) as cluster, Client(cluster, set_as_default=False) as client:
        llm = daskllm.load(demo.model_path(), client=client, answers=None)
        future = client.compute(asked(llm, rows(20_000), partitions=16, tokens=100))
        yield cluster, client
        future.cancel()


def figure(tab: Tab, name: str) -> int:
    """A figure of the page's head; -1 where it is not there yet."""
    text = tab.text(f'[data-figure="{name}"]')
    return -1 if text is None or not text[:1].isdigit() else int(text.replace(",", ""))


def moves(tab: Tab) -> None:
    """Wait until the tokens per second are above zero, and then another number above zero."""
    first = tab.until(lambda: max(0, figure(tab, "output-rate")))
    tab.until(lambda: figure(tab, "output-rate") not in (0, first))


def test_the_page_moves_while_a_job_runs_and_goes_on_when_a_worker_dies(
    watched: tuple[LocalCluster, Client],
) -> None:
    cluster, client = watched
    with browsing() as tab:
        tab.open(f"{address(cluster)}/llm")
        moves(tab)
        assert figure(tab, "workers") == 2
        tab.until(lambda: figure(tab, "rows") > 0)
        assert tab.text("canvas") is not None
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        tab.until(lambda: figure(tab, "lost") == 1)
        tab.until(lambda: figure(tab, "workers") == 2)
        moves(tab)
        assert tab.errors == []
        # No font, style or script comes from anywhere but the scheduler itself.
        assert tab.hosts == {address(cluster).removeprefix("http://")}
