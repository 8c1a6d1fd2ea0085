"""The threads that run kernels: torch's own OpenMP pool. A second pool beside it would have its threads spin
against torch's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch

from daskllm.engine.kernels.cpu.compiled import Kernel

__all__ = ["TEAM_SIZE", "YIELD", "address", "float_bits", "run", "start"]


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's elements are; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def float_bits(value: float) -> int:
    """A float32 as the int64 that carries it among a kernel's arguments."""
    return int(np.float32(value).view(np.int32))


def _library() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, where it is GNU's; else None."""
    beside_torch = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    for name in (*map(str, beside_torch), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
        except (OSError, AttributeError):
            continue
        return library
    return None


def _function(library: ctypes.CDLL | None, name: str) -> int:
    """Where a C function is, 0 where it is not there."""
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


_POOL = _library()
TEAM_SIZE = _function(_POOL, "omp_get_num_threads")
"""Address of the function that `code.team.team_size` asks; 0 where there is one thread only."""
YIELD = _function(ctypes.CDLL(None), "sched_yield")
"""Address of the function by which a thread gives its core away."""


_SHARE = 1 << 16
"""Numbers that are work enough for a thread: to wake another took an Emerald Rapids core 100 us, in which it
quantises as many."""


def run(kernel: Kernel, items: int, *arguments: int, numbers: int | None = None) -> None:
    """Run a kernel over ``items`` items on torch's threads (on this one where there is no pool).

    Its arguments begin with the item counter and the number of items. ``numbers`` tells how many it touches
    once each, where there may be too few for several threads.
    """
    if items == 0:
        return
    packed = np.array((0, items, *arguments), dtype=np.int64)
    threads = min(torch.get_num_threads(), items)
    if numbers is not None:
        threads = min(threads, -(-numbers // _SHARE))
    start(kernel, packed, max(1, threads))


def start(kernel: Kernel, packed: np.ndarray, threads: int) -> None:
    """Run a kernel on so many threads."""
    loaded, arguments = kernel.load(), packed.ctypes.data
    if _POOL is None or threads == 1:
        loaded.call(arguments)
    else:
        _POOL.GOMP_parallel(loaded.address, arguments, threads, 0)
