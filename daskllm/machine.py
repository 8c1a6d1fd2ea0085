"""What this process may use of the machine: cores and memory.

It reads the affinity mask, the control group (https://docs.kernel.org/admin-guide/cgroup-v2.html, and version
1's files where those are mounted) and the size of the machine, whichever allows least. It refuses to know who
the other processes are: whoever starts several on one machine says how many by `set_share`, and how much
memory each may hold.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["available_memory", "cores", "keep_freed_memory", "set_share", "total_memory", "uncollected"]

_CGROUP = Path("/sys/fs/cgroup")
# Version 1 writes "no limit" as the largest page-aligned int64.
_NO_LIMIT = 1 << 60
# Parameters of glibc's mallopt (https://man7.org/linux/man-pages/man3/mallopt.3.html).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _LARGEST_REUSED = 1 << 30, 32 << 20


@dataclass(frozen=True, slots=True)
class _Share:
    processes: int = 1
    memory_limit: int | None = None


_share = _Share()
# Blocks that are `uncollected` now, and whether the collector was on before the first of them.
_collector, _uncollected, _collects = threading.Lock(), 0, True


def set_share(processes: int, memory_limit: int | None = None) -> None:
    """Say how many equal processes share this machine, this one included.

    Args:
        processes: at least 1; `cores` and `available_memory` are divided by it.
        memory_limit: bytes that this process may hold, where something enforces that (a Dask nanny does).

    Example:
        >>> everything = cores()
        >>> set_share(10**6)
        >>> cores()
        1
        >>> set_share(1)
        >>> cores() == everything
        True
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, not {processes!r}")
    global _share
    _share = _Share(processes, memory_limit)


def cores() -> int:
    """Cores for this process: those it may run on, divided among the processes that share them; at least 1.

    >>> cores() >= 1
    True
    """
    bound = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1
    quota = _cpu_quota()
    if quota is not None:
        allowed = min(allowed, math.ceil(quota))
    return max(1, allowed // _share.processes)


def total_memory() -> int:
    """Bytes that this process could ever hold, by the machine, its control group and its own limit.

    >>> total_memory() >= available_memory()
    True
    """
    limits = [psutil.virtual_memory().total, _cgroup_limit(), _share.memory_limit]
    return min(limit for limit in limits if limit is not None)


def available_memory() -> int:
    """Bytes that this process may still take: its share of what is free, within its own limit; at least 0."""
    free = psutil.virtual_memory().available
    limit, used = _cgroup_limit(), _cgroup_used()
    if limit is not None and used is not None:
        free = min(free, limit - used)
    free //= _share.processes
    if _share.memory_limit is not None:
        free = min(free, _share.memory_limit - psutil.Process().memory_info().rss)
    return max(0, free)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector out of a block that makes much and for a moment throws nothing away.

    The collector goes through all that there is each time that a quarter more is there: a third of the time
    that importing torch takes beside Dask, and of reading a large vocabulary.
    """
    global _uncollected, _collects
    with _collector:
        _collects = gc.isenabled() if not _uncollected else _collects
        _uncollected += 1
        gc.disable()
    try:
        yield
    finally:
        with _collector:
            _uncollected -= 1
            if _collects and not _uncollected:
                if not gc.get_freeze_count():  # what somebody has frozen must stay so
                    # What was made is old from now on, and is not gone through as what is young is.
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()


def _collect_in_child() -> None:
    """A forked child has none of the threads that were in such blocks, and must not wait for them."""
    global _collector, _uncollected
    _collector = threading.Lock()
    if _uncollected and _collects:
        gc.enable()
    _uncollected = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_collect_in_child)


def keep_freed_memory() -> None:
    """Let the C library reuse what a step frees for the next, instead of giving it back in between.

    Dask's nannies start workers with a trim threshold of 64 KiB, under which a step's intermediate results
    are mapped and paged in anew each time: 15% of the throughput of a small model. Where the C library is not
    glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_REUSED)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def _read(name: str) -> str | None:
    try:
        return (_CGROUP / name).read_text().strip()
    except OSError:
        return None


def _cpu_quota() -> float | None:
    """Cores that the control group grants, or None where it sets no limit."""
    modern = _read("cpu.max")
    if modern is not None:
        quota, period = modern.split()
        return None if quota == "max" else int(quota) / int(period)
    old, old_period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
    if old is None or old_period is None or int(old) <= 0:
        return None
    return int(old) / int(old_period)


def _cgroup_limit() -> int | None:
    text = _read("memory.max") or _read("memory/memory.limit_in_bytes")
    if text is None or text == "max" or int(text) >= _NO_LIMIT:
        return None
    return int(text)


def _cgroup_used() -> int | None:
    text = _read("memory.current") or _read("memory/memory.usage_in_bytes")
    if text is None:
        return None
    # Pages that only cache files count as used there, but are given up as soon as memory is asked for.
    stat = _read("memory.stat") or _read("memory/memory.stat") or ""
    fields = dict(line.split() for line in stat.splitlines() if len(line.split()) == 2)
    return int(text) - int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))
