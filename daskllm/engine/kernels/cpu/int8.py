"""Products with int8 weights, by the AMX or VNNI instructions where the machine has them.

A row is quantised by a scale of its own and its sums are whole numbers, so that its bits depend neither on
its company nor on the order of additions. Weights are kept 128 higher, as unsigned bytes (the instruction
multiplies unsigned by signed), which each row's sum of inputs takes off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch

from daskllm.engine.kernels.cpu import amx
from daskllm.engine.kernels.cpu.regions import room
from daskllm.engine.kernels.cpu.simd import (
    LANES,
    array,
    load,
    store,
    vadd,
    vload,
    vmax,
    vmul,
    vreduce_add,
    vreduce_max,
    vround,
    vsplat,
    vstore,
    vsub,
)
from daskllm.engine.kernels.cpu.team import Kernel, address, neighbours, run, take, together
from daskllm.engine.kernels.cpu.vnni import TILE_COLUMNS, TILE_ROWS, dot_tile
from daskllm.engine.kernels.int8 import quantised

__all__ = [
    "PackedInt8",
    "padded_inputs",
    "padded_rows",
    "panels_of",
    "product",
    "product_kernels",
    "product_scratch",
    "quantise_row",
]

_PANEL = TILE_COLUMNS * LANES
_AT_ONCE = 4096  # channels quantised at once: their float32 form is never large


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """Weights as uint8 ``[channels / 16, in / 4, 16, 4]``, 128 above what they are, filled up with zeros;
    scales and biases float32 ``[channels]``."""

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    out: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.weight.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> PackedInt8:
        """Quantise ``[out, in]`` weights, side by side as one, by output channel."""
        out, size = sum(map(len, weights)), weights[0].shape[1]
        channels, inputs = max(_PANEL, -(-out // LANES) * LANES), -(-size // 4) * 4
        whole = torch.full((channels, inputs), 128, dtype=torch.uint8)
        scales = torch.zeros(channels)
        at = 0
        for part in (part for weight in weights for part in weight.split(_AT_ONCE)):
            q, scale = quantised(part)
            whole[at : at + len(q), :size] = q.view(torch.uint8) ^ 128
            scales[at : at + len(q)] = scale
            at += len(q)
        packed = room((channels // LANES, inputs // 4, LANES, 4), torch.uint8)
        packed.copy_(whole.view(channels // LANES, LANES, inputs // 4, 4).transpose(1, 2))
        bias = None
        if biases is not None:
            bias = torch.zeros(channels)
            bias[:out] = torch.cat(tuple(biases))
        return cls(packed, scales, bias, out)

    def product(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x @ weight.T + bias, ``[rows, in] -> [rows, out]``, in the type of ``x`` or another."""
        rows, size = x.shape
        x = x.contiguous()
        sixteens, quads = self.weight.shape[:2]
        q = torch.empty((padded_rows(rows), 4 * quads), dtype=torch.int8)
        scales, minus = torch.empty(len(q)), torch.empty(len(q), dtype=torch.int32)
        given = (q.data_ptr(), scales.data_ptr(), minus.data_ptr())
        quantise, product = product_kernels(x.dtype, dtype or x.dtype)
        run(quantise, rows, x.data_ptr(), *given, size)
        y = torch.empty((rows, self.out), dtype=dtype or x.dtype)
        run(
            product,
            -(-sixteens // TILE_COLUMNS),
            *given,
            self.weight.data_ptr(),
            self.scales.data_ptr(),
            address(self.bias),
            y.data_ptr(),
            rows,
            self.out,
            sixteens,
            quads,
        )
        return y


def product_kernels(given: torch.dtype, made: torch.dtype) -> tuple[Kernel, Kernel]:
    """What `PackedInt8.product` runs, first on its rows and then on them and its weights."""
    quantise = _quantise_f32 if given == torch.float32 else _quantise_bf16
    return quantise, _linear_f32 if made == torch.float32 else _linear_bf16


def padded_rows(rows: int) -> int:
    """Rows that there must be room for: a tile reads whole ones, wherever it begins."""
    return rows + TILE_ROWS - 1


@numba.njit
def padded_inputs(size):  # type: ignore[no-untyped-def]
    """Bytes of a quantised row of so many inputs."""
    return (size + 3) // 4 * 4


@numba.njit
def panels_of(sixteens):  # type: ignore[no-untyped-def]
    """How many panels there are of so many times sixteen channels."""
    return (sixteens + TILE_COLUMNS - 1) // TILE_COLUMNS


@numba.njit
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


@numba.njit
def product_scratch():  # type: ignore[no-untyped-def]
    """Room for one thread's `product`: a tile of sums, and sixteen results."""
    return np.empty(TILE_ROWS * _PANEL, np.int32), np.empty(LANES, np.float32)


@numba.njit
def product(  # type: ignore[no-untyped-def]
    panel, start, stop, q, scales, minus, w, w_scales, bias, y, out, sixteens, quads, scratch
):  # fmt: skip
    """One panel's channels of ``x @ w.T + bias`` for rows ``start <= row < stop``, ``x`` quantised."""
    tile, line = scratch
    # The last panel may begin within the one before, and leaves what that one writes.
    first = min(panel * TILE_COLUMNS, sixteens - TILE_COLUMNS)
    own = panel * TILE_COLUMNS - first
    first *= LANES
    for row in range(start, stop, TILE_ROWS):
        dot_tile(q, row * quads * 4, w, first * quads * 4, quads, minus, row, tile, row == start)
        for r in range(min(TILE_ROWS, stop - row)):
            scale, at = vsplat(scales[row + r]), (row + r) * out
            for c in range(own, TILE_COLUMNS):
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


@numba.njit(inline="always")
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


@Kernel
def _quantise_f32(pointer):  # type: ignore[no-untyped-def]
    _quantise_loop(pointer, np.float32)


@Kernel
def _quantise_bf16(pointer):  # type: ignore[no-untyped-def]
    _quantise_loop(pointer, np.uint16)


@numba.njit(inline="always")
def _linear_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (13,), np.int64)
    panels, rows, out, sixteens, quads = a[1], a[9], a[10], a[11], a[12]
    room, channels = rows + TILE_ROWS - 1, sixteens * LANES
    q = array(a[2], room * quads * 4, np.int8)
    scales, minus = array(a[3], room, np.float32), array(a[4], room, np.int32)
    w, w_scales = array(a[5], channels * quads * 4, np.uint8), array(a[6], channels, np.float32)
    bias, y = array(a[7], channels if a[7] else 0, np.float32), array(a[8], rows * out, dtype)
    scratch = product_scratch()
    group = together(rows, panels)
    amx.configure()
    while True:
        first = take(a, 0) * group
        if first >= panels:
            break
        for panel in range(first, min(first + group, panels)):
            product(panel, 0, rows, q, scales, minus, w, w_scales, bias, y, out, sixteens, quads, scratch)
    amx.release()


@Kernel
def _linear_f32(pointer):  # type: ignore[no-untyped-def]
    _linear_loop(pointer, np.float32)


@Kernel
def _linear_bf16(pointer):  # type: ignore[no-untyped-def]
    _linear_loop(pointer, np.uint16)
