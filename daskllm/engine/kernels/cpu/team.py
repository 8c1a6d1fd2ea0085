"""Threads for compiled kernels: torch's own OpenMP pool, and what its threads need to work together.

Kernels are plain C functions of one pointer (`Kernel`), run by every thread of the pool: a second pool
beside torch's would have its threads spin against them. Items are handed out by an atomic counter (`take`),
so that long ones do not hold up short ones; an item never depends on which thread does it. A kernel of
several phases has its threads wait for each other between them (`meet`), which costs a microsecond where
starting the pool again would cost tens.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu.simd import element_pointer

__all__ = [
    "LINE",
    "YIELD",
    "Kernel",
    "address",
    "begin",
    "float_bits",
    "meet",
    "neighbours",
    "run",
    "start",
    "take",
    "team_size",
    "together",
]

LINE = 8
"""int64 per cache line. Each phase counts in a line of its own: items taken, threads arrived, all there."""

_SIGNATURE = types.void(types.CPointer(types.int64))
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_SPINS = 4096  # some tens of microseconds: longer than threads that all have a core wait for each other


class Kernel:
    """A function of one pointer, to its int64 arguments, as a compiled kernel.

    It is compiled, or taken from Numba's cache, when it is first asked for: a model runs a few of them all.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function, self._compiled = function, None
        self._lock = threading.Lock()

    def load(self) -> Any:
        """Numba's own object, with its ``address``."""
        with self._lock:
            if self._compiled is None:
                self._compiled = numba.cfunc(_SIGNATURE, cache=True)(self._function)
            return self._compiled


@intrinsic
def take(typingctx, counters, index):  # type: ignore[no-untyped-def]
    """The next item: the counter at ``index``, raised by one."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = element_pointer(context, builder, sig.args[0], *args)
        return builder.atomic_rmw("add", pointer, _I64(1), "acq_rel")

    return types.int64(counters, types.intp), codegen


@intrinsic
def _read(typingctx, counters, index):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.load_atomic(element_pointer(context, builder, sig.args[0], *args), "acquire", 8)

    return types.int64(counters, types.intp), codegen


@intrinsic
def _open(typingctx, counters, index):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        builder.store_atomic(_I64(1), element_pointer(context, builder, sig.args[0], *args), "release", 8)
        return context.get_dummy_value()

    return types.void(counters, types.intp), codegen


@intrinsic
def _cycles(typingctx):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_I64, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), ())

    return types.int64(), codegen


@intrinsic
def _pause(typingctx):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), ())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(typingctx, address):  # type: ignore[no-untyped-def]
    """The int32 that a C function without arguments returns."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        function = builder.inttoptr(args[0], ir.FunctionType(_I32, []).as_pointer())
        return builder.sext(builder.call(function, ()), _I64)

    return types.int64(types.int64), codegen


@numba.njit
def together(rows, panels):  # type: ignore[no-untyped-def]
    """How many panels a thread takes at a time.

    A row or two read weights as fast as memory gives them, which is up to a tenth faster in long stretches
    than where two threads take turns; with more rows, one panel is work enough and shares are more even.
    """
    return max(1, min(panels // 8, 8)) if rows <= 2 else 1


@numba.njit
def neighbours(rows):  # type: ignore[no-untyped-def]
    """How many rows a thread takes at a time where each is treated by itself.

    Neighbours share cache lines, those of the counter and those of a block of keys, which take longer to pass
    between two cores than a row takes.
    """
    return max(1, min(rows // 16, 32))


@numba.njit
def team_size(function):  # type: ignore[no-untyped-def]
    """How many threads run this kernel; OpenMP may grant fewer than were asked for."""
    return _call(function) if function else 1


@numba.njit
def begin(clock):  # type: ignore[no-untyped-def]
    """Start the clock that `meet` reads. Every thread may call it."""
    clock[0] = _cycles()


@numba.njit
def meet(counters, phase, size, give_way, clock, times, kind):  # type: ignore[no-untyped-def]
    """Wait until all threads have come to the end of a phase.

    The last of them adds the cycles since the meeting before, which ``clock[0]`` tells, to ``times[kind]``. A
    thread that waits for long gives its core away, since the one waited for may want it.
    """
    line = phase * LINE
    if take(counters, line + 1) == size - 1:
        now = _cycles()
        times[kind] += now - clock[0]
        clock[0] = now
        _open(counters, line + 2)
        return
    spins = 0
    while _read(counters, line + 2) == 0:
        spins += 1
        _pause()
        if spins % _SPINS == 0 and give_way:
            _call(give_way)


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
"""Address of the function that `team_size` asks; 0 where there is one thread only."""
YIELD = _function(ctypes.CDLL(None), "sched_yield")
"""Address of the function by which a thread gives its core away."""


def run(kernel: Kernel, items: int, *arguments: int) -> None:
    """Run a kernel over ``items`` items on torch's threads (on this one where there is no pool).

    Its arguments begin with the item counter and the number of items.
    """
    if items == 0:
        return
    packed = np.array((0, items, *arguments), dtype=np.int64)
    start(kernel, packed, min(torch.get_num_threads(), items))


def start(kernel: Kernel, packed: np.ndarray, threads: int) -> None:
    """Run a kernel on so many threads."""
    compiled = kernel.load()
    if _POOL is None or threads == 1:
        compiled.ctypes(packed.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    else:
        _POOL.GOMP_parallel(compiled.address, packed.ctypes.data, threads, 0)
