"""What a worker of ``soak.py`` runs first: its disk is slow and its clock is wrong.

A worker's clock is off by up to an hour, its own way each time it starts. Once a part is there, rows wait as
long as there is a file ``hold`` in ``DASKLLM_PLACE``, so that all that is to befall a job befalls it under
way.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from daskllm.session import Session


def set_clock(off: int) -> None:
    """Set this process's clock wrong by so many seconds, for all who have asked for its time by now.

    Dask takes the function by name and tornado calls it by its module: two clocks in one process, where no
    wrong one shows two times, keep a worker's messages back for as long as the one is behind the other.
    """
    now, now_ns = time.time, time.time_ns
    wrong = {id(now): lambda: now() + off, id(now_ns): lambda: now_ns() + off * 10**9}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is now or value is now_ns:
                setattr(module, name, wrong[id(value)])


def dask_setup(worker: Any) -> None:
    """Bring it about; the worker has not met its scheduler yet."""
    place, draw = Path(os.environ["DASKLLM_PLACE"]), Random(os.getpid())
    off = draw.randrange(-3600, 3600)
    set_clock(off)
    sync = os.fsync

    def slow_sync(handle: int) -> None:
        time.sleep(draw.uniform(0.0, 0.3))
        sync(handle)

    os.fsync = slow_sync
    generate = Session.generate

    def held(self: Session, prompts: Any, params: Any, **options: Any) -> Any:
        cancelled = options.get("cancelled") or (lambda: False)
        while (place / "hold").exists() and not cancelled():
            if not any((place.parent / "out").glob("part.*")):
                break
            time.sleep(0.05)
        return generate(self, prompts, params, **options)

    Session.generate = held  # type: ignore[method-assign]
    with (place / "clocks").open("a") as log:
        log.write(f"{os.getpid()} {off}\n")
