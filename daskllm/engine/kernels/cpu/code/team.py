"""What the threads of a kernel need to work together.

Items are handed out by an atomic counter (`take`), so that long ones do not hold up short ones; an item never
depends on which thread does it. A kernel of several phases has its threads wait for each other between them
(`meet`), which costs a microsecond where starting the pool again would cost tens.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu.code.memory import element_pointer
from daskllm.engine.kernels.cpu.code.simd import compiled
from daskllm.engine.kernels.cpu.fields import LINE

__all__ = ["begin", "fetched_by", "meet", "neighbours", "peek", "take", "team_size", "together"]

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_X86 = platform.machine().lower() in ("x86_64", "amd64")
_SPINS = 4096  # some tens of microseconds: longer than threads that all have a core wait for each other


@intrinsic
def take(typingctx, counters, index):  # type: ignore[no-untyped-def]
    """The next item: the counter at ``index``, raised by one."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = element_pointer(context, builder, sig.args[0], *args)
        return builder.atomic_rmw("add", pointer, _I64(1), "acq_rel")

    return types.int64(counters, types.intp), codegen


@intrinsic
def peek(typingctx, counters, index):  # type: ignore[no-untyped-def]
    """A number that others write, as it is now."""

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
        # Elsewhere the system may keep the cycles of a core to itself.
        kind, name = ir.FunctionType(_I64, []), f"llvm.read{'cycle' if _X86 else 'steady'}counter"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), ())

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


@compiled
def together(rows, panels):  # type: ignore[no-untyped-def]
    """How many panels a thread takes at a time.

    A row or two read weights as fast as memory gives them, which is up to a tenth faster in long stretches
    than where two threads take turns; with more rows, one panel is work enough and shares are more even.
    """
    return max(1, min(panels // 8, 8)) if rows <= 2 else 1


@compiled
def fetched_by(tile, tiles, parts, panel, team, panels, size, ahead):  # type: ignore[no-untyped-def]
    """Where in the weights one of a panel's tiles fetches from while it multiplies, a part of a panel each.

    A panel's first tile reads it from memory; for the others, which find it in a cache, memory would have
    nothing to do. So the last of them have the panel brought in that their thread is taken to go on with, so
    many further on as the team has threads, from its beginning. The rest fetch what they are reading. One
    that is alone reads memory all of the time, and fetches a little further on.

    Args:
        parts: of a panel, that a tile can fetch one of.
        size: numbers in a panel.
        ahead: numbers that a tile which is alone fetches ahead.
    """
    part, following = min(tiles - 1, parts) - tiles + tile, panel + team
    if tiles == 1:
        return panel * size + ahead
    if part < 0 or following >= panels:
        return panel * size
    return following * size + part * (size // parts)


@compiled
def neighbours(rows):  # type: ignore[no-untyped-def]
    """How many rows a thread takes at a time where each is treated by itself.

    Neighbours share cache lines, those of the counter and those of a block of keys, which take longer to pass
    between two cores than a row takes.
    """
    return max(1, min(rows // 16, 32))


@compiled
def team_size(function):  # type: ignore[no-untyped-def]
    """How many threads run this kernel; OpenMP may grant fewer than were asked for."""
    return _call(function) if function else 1


@compiled
def begin(clock):  # type: ignore[no-untyped-def]
    """Start the clock that `meet` reads. Every thread may call it."""
    clock[0] = _cycles()


@compiled
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
    while peek(counters, line + 2) == 0:
        spins += 1
        _pause()
        if spins % _SPINS == 0 and give_way:
            _call(give_way)
