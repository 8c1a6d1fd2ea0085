"""Worker processes on this machine, set up as this project wants them.

It owns what is different from Dask's own `LocalCluster`, and why. Models come later, by `daskllm.load`.
"""

from __future__ import annotations

from typing import Any

import dask.config
from distributed import LocalCluster

__all__ = ["local_cluster"]

_KEEP_NANNIES = {"distributed.deploy.lost-worker-timeout": "365 days"}


def local_cluster(workers: int, threads: int = 2, *, secure: bool = False, **options: Any) -> LocalCluster:
    """A scheduler and worker processes on this machine; used and closed like any `LocalCluster`.

    Args:
        workers: processes. One holds the model and has all cores to itself; more of them share both.
        threads: Dask threads of each. A thread has one task in hand, and a worker decodes the rows of all
            its tasks together, so that two keep its batch full at a task's end.
        secure: TLS with temporary credentials between scheduler, workers and this process's clients
            (``cluster.security`` for others); needs the ``cryptography`` package.
        options: for `LocalCluster`, in the place of what follows.

    The dashboard is on the loopback address alone; Dask's own default is every interface. Workers have no
    memory limit: daskllm sizes weights and KV cache itself, and Dask's nanny would kill a worker for pages
    of the weights' file. A worker that dies is started again however often it happens; by default, the
    cluster closes a nanny for good when its worker happens to be down 15 s after an earlier death. Workers
    leave Ctrl-C in the terminal to this process, which closes them.

    Example:
        >>> with local_cluster(1, threads=1) as cluster, cluster.get_client() as client:
        ...     client.submit(sum, [1, 2]).result()
        3
    """
    if workers < 1 or threads < 1:
        raise ValueError(f"workers and threads must be at least 1, not {workers} and {threads}")
    # Read whenever a worker is lost, so it cannot be set for this call alone.
    dask.config.set(_KEEP_NANNIES)
    preload = [*dask.config.get("distributed.worker.preload"), "daskllm.runtime.interrupts"]
    given = {"memory_limit": 0, "dashboard_address": "127.0.0.1:0", "security": secure or None}
    given |= {"preload": preload, **options}
    return LocalCluster(n_workers=workers, threads_per_worker=threads, **given)
