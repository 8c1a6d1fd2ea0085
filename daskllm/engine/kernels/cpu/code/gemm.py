"""Products of rows with packed weights: one register tile, written out as LLVM instructions.

A weight is packed into panels of `COLUMNS` outputs, so that one step of the inner loop reads one stretch of
memory: for bfloat16 two inputs of every output side by side, which is what the dot-product instruction
(``VDPBF16PS``) takes; for float32 one. A tile keeps up to `VECTOR_ROWS` rows of one panel in registers and
walks the inputs once, in order. So a row's bits depend neither on the other rows nor on how many threads
there are. All tiles but a panel's first find it in the second cache, and while they multiply they have the
panel fetched that the thread will take next: two Zen 4 cores, whose memory is slow for what they multiply,
take 10 to 14% less for the products of 32 rows.

Where a CPU has matrix registers, the same panels are multiplied in them (`amx`): on two Emerald Rapids cores
the products of 512 prompt tokens took 100 ms where they took 830. Where it has no bfloat16 dot product, or a
slow one, inputs are float32 and a tile widens weights as it loads them: two Emerald Rapids cores without
matrix registers multiply a long prompt at 205 to 247 GFLOP/s so, and at 143 to 152 by dot products. Where it
has no 512-bit registers, tiles are smaller. Measured on two Zen 4 cores against oneDNN's packed product,
shapes of a 135M-parameter model: 1.3 to 1.5 times as fast at 16 to 32 rows, the same at 512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu import registers
from daskllm.engine.kernels.cpu.code import amx
from daskllm.engine.kernels.cpu.code.largest import lanes_of, look
from daskllm.engine.kernels.cpu.code.memory import array, element_pointer, workspace, write_fetch
from daskllm.engine.kernels.cpu.code.simd import (
    VECTOR,
    BFloat,
    compiled,
    inlined,
    round_to_bfloat16,
    splat,
)
from daskllm.engine.kernels.cpu.code.team import fetched_by, take, team_size, together
from daskllm.engine.kernels.cpu.registers import COLUMNS, LANES, ROWS, VECTOR_ROWS, VECTORS

__all__ = [
    "INPUTS",
    "PARTS",
    "ahead_of",
    "linear_bf16",
    "linear_f32",
    "logits_bf16",
    "product",
    "rows_together",
    "tile",
    "tiles_of",
]

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VI, _VH = ir.VectorType(_I32, LANES), ir.VectorType(_I16, LANES)
_PAIRS = ir.VectorType(BFloat(), 2 * LANES)
_LINE_BYTES = 64
INPUTS = np.float32 if registers.WIDENED else np.uint16
"""In which type rows are multiplied with bfloat16 weights. As float32 they are rounded to bfloat16 all the
same (but for attention's softmax weights), and need not be widened again for each panel."""
PARTS = 4 * COLUMNS // _LINE_BYTES
"""Lines of a panel for each word; a tile fetches one while it multiplies a word, or all with few rows."""
_AHEAD_BYTES = 4096
"""Products of a row alone of the 135M shape, which took two Emerald Rapids cores 14 ms, take 9 to 11 so; 11
to 13 half as far ahead, 10 to 12 twice as far."""


def _at(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), (a, b, c))


def _dot(builder: Any, total: Any, x: Any, w: Any) -> Any:
    kind = ir.FunctionType(VECTOR, [VECTOR, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), (total, x, w))


def _low(builder: Any, pairs: Any) -> Any:
    """The first of every pair of bfloat16 in a vector of int32, as float32."""
    return builder.bitcast(builder.shl(pairs, ir.Constant(_VI, [16] * LANES)), VECTOR)


def _high(builder: Any, pairs: Any) -> Any:
    return builder.bitcast(builder.and_(pairs, ir.Constant(_VI, [-65536] * LANES)), VECTOR)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Writes the instructions of tiles of the same types.

    Attributes:
        narrow: w is bfloat16, two inputs in every four bytes; else float32.
        widened: x is float32 though w is bfloat16, and both are multiplied as that; else x is as w.
        rounded: y is bfloat16; else float32.
        fetching: weights are fetched for later.
    """

    narrow: bool
    widened: bool
    rounded: bool
    fetching: bool

    def function(self, module: Any) -> Any:
        """``tile(rows, x, x_stride, w, bias, words, y, y_stride, fetched)``; addresses and strides in bytes.

        Registers are named at compile time, so there is a loop for each number of rows and a jump to it.
        """
        kinds = (self.narrow and not self.widened, self.narrow, self.rounded)
        parts = ["daskllm_tile", *("bf16" if narrow else "f32" for narrow in kinds)]
        name = "_".join([*parts, "fetching"] if self.fetching else parts)
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 9)
        function = cgutils.get_or_insert_function(module, kind, name)
        if not function.blocks:
            function.linkage = "internal"
            builder = ir.IRBuilder(function.append_basic_block())
            ways = [function.append_basic_block(f"rows_{n}") for n in range(1, VECTOR_ROWS + 1)]
            jump = builder.switch(function.args[0], ways[-1])
            for n, block in enumerate(ways, start=1):
                jump.add_case(_I64(n), block)
                builder.position_at_end(block)
                self._rows(builder, n, *function.args[1:])
                builder.ret_void()
        return function

    def _accumulate(self, builder: Any, total: Any, x: Any, w: Any) -> Any:
        """total + x * w, where x is four bytes of a row in every lane and w four bytes of each column."""
        if self.narrow and not self.widened:
            return _dot(builder, total, builder.bitcast(x, _PAIRS), builder.bitcast(w, _PAIRS))
        return _fma(builder, builder.bitcast(x, VECTOR), builder.bitcast(w, VECTOR), total)

    def _rows(self, builder: Any, rows: int, x: Any, x_stride: Any, w: Any, bias: Any, words: Any,
              y: Any, y_stride: Any, fetched: Any) -> None:  # fmt: skip
        first = [builder.load(_at(builder, bias, VECTOR, 4 * LANES * j), align=4) for j in range(VECTORS)]
        before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("k", "end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_I64)
        sums = [[builder.phi(VECTOR) for _ in first] for _ in range(rows)]
        panel = builder.add(w, builder.mul(k, _I64(4 * COLUMNS)))
        columns = [builder.load(_at(builder, panel, _VI, 4 * LANES * j), align=4) for j in range(VECTORS)]
        if self.fetching:
            lines = PARTS if rows <= VECTOR_ROWS // 2 else 1
            line = builder.add(fetched, builder.mul(k, _I64(lines * _LINE_BYTES)))
            for i in range(lines):
                write_fetch(builder, _at(builder, line, ir.IntType(8), i * _LINE_BYTES))
        # Inputs of a word that are multiplied by themselves, all rows' first ones and then all rows' second.
        parts = (
            [[part(builder, one) for one in columns] for part in (_low, _high)] if self.widened else [columns]
        )
        begin, grown = builder.add(x, builder.mul(k, _I64(4 * len(parts)))), sums
        for i, factors in enumerate(parts):
            place, totals, grown = builder.add(begin, _I64(4 * i)), grown, []
            for row in totals:
                word = splat(builder, builder.load(_at(builder, place, _I32), align=4))
                pairs = zip(row, factors, strict=True)
                grown.append([self._accumulate(builder, total, word, factor) for total, factor in pairs])
                place = builder.add(place, x_stride)
        following = builder.add(k, _I64(1))
        for phi, start, new in [(k, _I64(0), following)] + [
            (sums[r][j], first[j], grown[r][j]) for r in range(rows) for j in range(VECTORS)
        ]:
            phi.add_incoming(start, before)
            phi.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, words), loop, after)
        builder.position_at_end(after)
        for row in grown:
            for j, total in enumerate(row):
                if self.rounded:
                    builder.store(
                        round_to_bfloat16(builder, total), _at(builder, y, _VH, 2 * LANES * j), align=2
                    )
                else:
                    builder.store(total, _at(builder, y, VECTOR, 4 * LANES * j), align=4)
            y = builder.add(y, y_stride)


@intrinsic
def tile(typingctx, rows, x, at_x, x_stride, w, at_w, bias, at_bias, words, y, at_y, y_stride, cold, fetched):  # type: ignore[no-untyped-def]
    """``y[r, c] = bias[c] + sum of x[r, k] * w[k, c]`` for `rows_together` rows and one panel of columns.

    x, w and y are flat arrays, float32 or (as uint16) bfloat16, bias is float32; where w is bfloat16, x may
    be either, and should be `INPUTS`. ``at_`` is where each begins and ``_stride`` how far apart rows are,
    in elements; ``words`` counts the weights of an output in fours of bytes; ``cold`` tells that the panel is
    in no cache yet. From ``w[fetched]`` on, if that is not None, a line for each word is brought into the
    second cache meanwhile, by half of a tile's rows or fewer `PARTS`; `amx` has a way of its own. For matrix
    registers the thread has called `amx.configure`, and `registers.SLACK` rows behind the last one of ``x``
    may be read.
    """
    given, narrow, rounded = (one.dtype == types.uint16 for one in (x, w, y))
    widened = narrow and not given
    # Not measured where registers are narrow and bfloat16 is widened.
    fetching = not isinstance(fetched, types.NoneType) and not (widened and VECTORS == 1)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        rows, x, at_x, x_stride, w, at_w, bias, at_bias, words, y, at_y, y_stride, cold, fetched = args

        def start(position, array, index):  # type: ignore[no-untyped-def]
            return builder.ptrtoint(element_pointer(context, builder, sig.args[position], array, index), _I64)

        size_x, size_y = _I64(2 if given else 4), _I64(2 if rounded else 4)
        each = (
            rows,
            start(1, x, at_x),
            builder.mul(x_stride, size_x),
            start(4, w, at_w),
            start(6, bias, at_bias),
            words,
            start(9, y, at_y),
            builder.mul(y_stride, size_y),
        )
        if given and registers.AMX:
            builder.call(amx.function(builder.module, rounded), (*each, cold))
        else:
            ahead = start(4, w, fetched) if fetching else _I64(0)
            builder.call(_Tile(narrow, widened, rounded, fetching).function(builder.module), (*each, ahead))
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, x, i, i, w, i, bias, i, i, y, i, i, types.boolean, fetched), codegen


@compiled
def rows_together(left, x):  # type: ignore[no-untyped-def]
    """How many of the rows left a `tile` takes."""
    if registers.AMX and x.itemsize == 2:
        return min(left, ROWS)
    # Tiles of nearly the same height: a short last one would leave most registers idle.
    tiles = tiles_of(left)
    return (left + tiles - 1) // tiles


@compiled
def tiles_of(rows):  # type: ignore[no-untyped-def]
    """How many tiles in vectors so many rows make."""
    return (rows + VECTOR_ROWS - 1) // VECTOR_ROWS


@compiled
def ahead_of(rows, w):  # type: ignore[no-untyped-def]
    """How far ahead a panel's only tile fetches, in numbers of ``w``."""
    # With more rows it fetches half of what it reads, and would soon fetch what it has read.
    return _AHEAD_BYTES // w.itemsize if rows <= VECTOR_ROWS // 2 else 0


@compiled
def product(panel, rows, x, x_stride, w, bias, place, count, words, y, y_stride, spare, team):  # type: ignore[no-untyped-def]
    """One panel's ``count`` columns of ``x @ w.T + bias`` for all rows, to ``y[:, place:]``, by a thread of
    ``team``; ``spare`` has room for a tile."""
    size = words * COLUMNS * (4 // w.itemsize)
    start, tiles, number, row = panel * size, tiles_of(rows), 0, 0
    ahead = ahead_of(rows, w)
    while row < rows:
        many = rows_together(rows - row, x)
        at, fetched = (
            row * x_stride,
            fetched_by(number, tiles, PARTS, panel, team, w.size // size, size, ahead),
        )
        if count == COLUMNS:
            to = row * y_stride + place
            tile(many, x, at, x_stride, w, start, bias, panel * COLUMNS, words, y, to, y_stride, row == 0,
                 fetched)  # fmt: skip
        else:
            tile(many, x, at, x_stride, w, start, bias, panel * COLUMNS, words, spare, 0, COLUMNS, row == 0,
                 fetched)  # fmt: skip
            for r in range(many):
                for c in range(count):
                    y[(row + r) * y_stride + place + c] = spare[r * COLUMNS + c]
        row += many
        number += 1


@inlined
def _linear_loop(pointer, given, dtype, out):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (16,), np.int64)
    panels, rows, x_stride, words, y_stride = a[1], a[7], a[8], a[9], a[10]
    x = array(a[2], rows * x_stride, given)
    w = array(a[3], a[11], dtype)
    bias = array(a[4], panels * COLUMNS, np.float32)
    places = array(a[5], 2 * panels, np.int64)
    y = array(a[6], rows * y_stride if a[6] else 0, out)
    spare = workspace(ROWS * COLUMNS, out)
    largest = a[13] != 0
    line = workspace(rows * COLUMNS if largest else 0, out)
    best, where, slot = lanes_of(a, 13, rows)
    group, team = together(rows, panels), team_size(a[12])
    amx.configure()
    while True:
        first = take(a, 0) * group
        if first >= panels:
            break
        for panel in range(first, min(first + group, panels)):
            place, count = places[2 * panel], places[2 * panel + 1]
            if largest:
                product(panel, rows, x, x_stride, w, bias, 0, COLUMNS, words, line, COLUMNS, spare, team)
                look(line, COLUMNS, rows, 0, count, place, best, where, slot)
            else:
                product(panel, rows, x, x_stride, w, bias, place, count, words, y, y_stride, spare, team)
    amx.release()


def linear_f32(pointer):  # type: ignore[no-untyped-def]
    _linear_loop(pointer, np.float32, np.float32, np.float32)


def linear_bf16(pointer):  # type: ignore[no-untyped-def]
    _linear_loop(pointer, INPUTS, np.uint16, np.uint16)


def logits_bf16(pointer):  # type: ignore[no-untyped-def]
    _linear_loop(pointer, INPUTS, np.uint16, np.float32)
