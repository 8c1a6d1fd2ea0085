"""Workers that a program has started leave Ctrl-C to it: what `local_cluster` has them load first.

A terminal sends an interrupt to all processes that it runs. Workers would end at once, each with a traceback,
while the program hands rows in flight back and closes them in order.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["dask_setup"]


def dask_setup(worker: Worker) -> None:
    """Called by Dask when a worker starts; one in the program's own process is left alone."""
    if worker.nanny is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
