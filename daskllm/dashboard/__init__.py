"""What people look at while it runs: a page "LLM" on Dask's dashboard, and the same figures for Prometheus.

`daskllm.load` installs both on the cluster of its client. A scheduler has the page from its start with

    dask scheduler --preload daskllm.dashboard

It is at ``/llm`` beside Dask's own pages, and among the individual plots that JupyterLab's extension docks:
"Individual Llm", and its parts. It needs ``bokeh``, ``/metrics`` needs ``prometheus_client`` (both:
``pip install daskllm[dashboard]``); without them nothing else changes.

What each metric means: `daskllm.dashboard.metrics`. A Grafana dashboard of them: ``cluster/grafana/``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from daskllm.dashboard.plugins import BoardPlugin, EnginePlugin

if TYPE_CHECKING:
    from distributed import Client, Scheduler

__all__ = ["dask_setup", "install"]


def install(client: Client) -> None:
    """Gather and show the figures of a client's cluster, unless that is done already."""
    client.register_plugin(BoardPlugin())
    client.register_plugin(EnginePlugin())


async def dask_setup(scheduler: Scheduler) -> None:
    """What ``dask scheduler --preload daskllm.dashboard`` calls."""
    await scheduler.register_scheduler_plugin(BoardPlugin(), idempotent=True)
