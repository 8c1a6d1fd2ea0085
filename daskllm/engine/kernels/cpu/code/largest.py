"""The largest output of each row of a product, found panel by panel while it is in a cache.

Each of sixteen lanes keeps the largest of every sixteenth output and where it is, in float32, which counts
exactly to 2^24; `daskllm.engine.kernels.cpu.largest` compares lanes and threads.
"""

from __future__ import annotations

import numpy as np

from daskllm.engine.kernels.cpu.code.memory import array, vload, vstore
from daskllm.engine.kernels.cpu.code.simd import compiled, inlined, vblend, vpick, vsplat
from daskllm.engine.kernels.cpu.code.team import take
from daskllm.engine.kernels.cpu.registers import LANES

__all__ = ["lanes_of", "look"]


@inlined
def lanes_of(a, field, rows):  # type: ignore[no-untyped-def]
    """A thread's lanes among what `Lanes.arguments` tells from ``a[field]`` on: both arrays, and where its
    own begin. Nothing where that is 0."""
    begin = take(a, field + 2) * rows * LANES if a[field] else 0
    size = begin + rows * LANES if a[field] else 0
    return array(a[field], size, np.float32), array(a[field + 1], size, np.float32), begin


@compiled
def look(y, stride, rows, begin, end, first, best, where, at):  # type: ignore[no-untyped-def]
    """Take columns ``begin <= column < end`` of ``y [rows, stride]`` into account, panels in ascending order.

    Args:
        begin: a multiple of sixteen.
        first: which output column 0 is.
        best, where, at: a thread's lanes, sixteen for each row, begin at ``at``.
    """
    least = vsplat(np.float32(-np.inf))
    whole = begin + (end - begin) // LANES * LANES
    for row in range(rows):
        to, start = at + row * LANES, row * stride
        top, place = vload(best, to), vload(where, to)
        for column in range(begin, whole, LANES):
            v = vload(y, start + column)
            place = vpick(v, top, vsplat(np.float32(first + column)), place)
            top = vpick(v, top, v, top)
        if whole < end:
            v = vblend(vload(y, start + whole), least, 0, end - whole)
            place = vpick(v, top, vsplat(np.float32(first + whole)), place)
            top = vpick(v, top, v, top)
        vstore(best, to, top)
        vstore(where, to, place)
