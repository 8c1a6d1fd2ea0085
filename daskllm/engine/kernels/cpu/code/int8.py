"""Rows quantised, and their products with int8 weights; `daskllm.engine.kernels.cpu.int8` lays those out."""

from __future__ import annotations

import numba
import numpy as np

from daskllm.engine.kernels.cpu import fields
from daskllm.engine.kernels.cpu.code import amx
from daskllm.engine.kernels.cpu.code.largest import lanes_of, look
from daskllm.engine.kernels.cpu.code.memory import array, load, store, vload, vstore, workspace
from daskllm.engine.kernels.cpu.code.simd import (
    compiled,
    inlined,
    vadd,
    vmax,
    vmul,
    vreduce_add,
    vreduce_max,
    vround,
    vsplat,
    vsub,
)
from daskllm.engine.kernels.cpu.code.team import fetched_by, neighbours, take, team_size, together
from daskllm.engine.kernels.cpu.code.vnni import dot_tile
from daskllm.engine.kernels.cpu.registers import INT8_COLUMNS, INT8_ROWS, LANES

__all__ = [
    "linear_bf16",
    "linear_f32",
    "padded_inputs",
    "panels_of",
    "product",
    "product_scratch",
    "quantise_bf16",
    "quantise_f32",
    "quantise_row",
]

_PANEL = INT8_COLUMNS * LANES


padded_inputs = compiled(fields.padded_inputs)


@compiled
def panels_of(sixteens):  # type: ignore[no-untyped-def]
    """How many panels there are of so many times sixteen channels."""
    return (sixteens + INT8_COLUMNS - 1) // INT8_COLUMNS


@compiled
def panel_begin(panel, sixteens):  # type: ignore[no-untyped-def]
    """A panel's first channel, and how many of its channels are left to another: the last panel may begin
    within the one before, and leaves what that one writes."""
    first = min(panel * INT8_COLUMNS, sixteens - INT8_COLUMNS)
    return first * LANES, (panel * INT8_COLUMNS - first) * LANES


@compiled
def quantise_row(x, row, size, q, scales, minus):  # type: ignore[no-untyped-def]
    """``x[row]`` as int8 to ``q[row]``, filled up with zeros; its scale, and its sum times 128."""
    at, room = row * size, padded_inputs(size)
    to = row * room
    whole = size // LANES * LANES
    zero = vsplat(np.float32(0))
    peaks = zero
    for i in range(0, whole, LANES):
        v = vload(x, at + i)
        peaks = vmax(vmax(v, vsub(zero, v)), peaks)
    peak = vreduce_max(peaks)
    for i in range(whole, size):
        peak = max(peak, abs(load(x, at + i)))
    inverse = np.float32(127) / peak if peak > 0 else np.float32(0)
    # Float32 sums of whole numbers are exact far beyond any row's length.
    sums = zero
    for i in range(0, whole, LANES):
        v = vround(vmul(vload(x, at + i), vsplat(inverse)))
        sums = vadd(sums, v)
        vstore(q, to + i, v)
    total = vreduce_add(sums)
    for i in range(whole, size):
        one = np.float32(np.rint(load(x, at + i) * inverse))
        total += one
        q[to + i] = np.int8(one)
    for i in range(size, room):
        q[to + i] = 0
    scales[row] = peak / np.float32(127)
    minus[row] = np.int32(total) * np.int32(128)


@inlined
def product_scratch():  # type: ignore[no-untyped-def]
    """Room for one thread's `product`: a tile of sums, and sixteen results."""
    return workspace(INT8_ROWS * _PANEL, np.int32), workspace(LANES, np.float32)


@compiled
def product(  # type: ignore[no-untyped-def]
    panel, start, stop, q, scales, minus, w, w_scales, bias, y, stride, base, out, sixteens, quads, scratch,
    team
):  # fmt: skip
    """One panel's channels of ``x @ w.T + bias`` for rows ``start <= row < stop``, ``x`` quantised, to
    ``y[row * stride + channel - base]``, by a thread of ``team``."""
    tile, line = scratch
    first, begin = panel_begin(panel, sixteens)
    own = begin // LANES
    tiles, size = (stop - start + INT8_ROWS - 1) // INT8_ROWS, _PANEL * quads * 4
    panels = panels_of(sixteens)
    for row in range(start, stop, INT8_ROWS):
        number = (row - start) // INT8_ROWS
        fetched = fetched_by(number, tiles, INT8_COLUMNS, panel, team, panels, size, 0)
        dot_tile(q, row * quads * 4, w, first * quads * 4, quads, minus, row, tile, row == start, fetched)
        for r in range(min(INT8_ROWS, stop - row)):
            scale, at = vsplat(scales[row + r]), (row + r) * stride - base
            for c in range(own, INT8_COLUMNS):
                channel = first + c * LANES
                v = vmul(vload(tile, r * _PANEL + c * LANES), scale)
                v = vmul(v, vload(w_scales, channel))
                if bias.size:
                    v = vadd(v, vload(bias, channel))
                if channel + LANES <= out:
                    vstore(y, at + channel, v)
                else:
                    vstore(line, 0, v)
                    for i in range(max(0, out - channel)):
                        store(y, at + channel + i, line[i])


@inlined
def _quantise_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (7,), np.int64)
    rows, size = a[1], a[6]
    x, q = array(a[2], rows * size, dtype), array(a[3], rows * padded_inputs(size), np.int8)
    scales, minus = array(a[4], rows, np.float32), array(a[5], rows, np.int32)
    many = neighbours(rows)
    while True:
        first = take(a, 0) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            quantise_row(x, row, size, q, scales, minus)


def quantise_f32(pointer):  # type: ignore[no-untyped-def]
    _quantise_loop(pointer, np.float32)


def quantise_bf16(pointer):  # type: ignore[no-untyped-def]
    _quantise_loop(pointer, np.uint16)


@inlined
def _linear_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (17,), np.int64)
    panels, rows, out, sixteens, quads = a[1], a[9], a[10], a[11], a[12]
    room, channels = rows + INT8_ROWS - 1, sixteens * LANES
    q = array(a[2], room * quads * 4, np.int8)
    scales, minus = array(a[3], room, np.float32), array(a[4], room, np.int32)
    w, w_scales = array(a[5], channels * quads * 4, np.uint8), array(a[6], channels, np.float32)
    bias = array(a[7], channels if a[7] else 0, np.float32)
    y = array(a[8], rows * out if a[8] else 0, dtype)
    scratch = product_scratch()
    largest = a[14] != 0
    line = workspace(rows * _PANEL if largest else 0, dtype)
    best, where, slot = lanes_of(a, 14, rows)
    group, team = together(rows, panels), team_size(a[13])
    amx.configure()
    while True:
        first = take(a, 0) * group
        if first >= panels:
            break
        for panel in range(first, min(first + group, panels)):
            if largest:
                base, begin = panel_begin(panel, sixteens)
                product(
                    panel, 0, rows, q, scales, minus, w, w_scales, bias, line, _PANEL, base, out, sixteens,
                    quads, scratch, team,
                )  # fmt: skip
                look(line, _PANEL, rows, begin, min(_PANEL, out - base), base, best, where, slot)
            else:
                product(
                    panel, 0, rows, q, scales, minus, w, w_scales, bias, y, out, 0, out, sixteens, quads,
                    scratch, team,
                )  # fmt: skip
    amx.release()


def linear_f32(pointer):  # type: ignore[no-untyped-def]
    _linear_loop(pointer, np.float32)


def linear_bf16(pointer):  # type: ignore[no-untyped-def]
    _linear_loop(pointer, np.uint16)
