"""Products of eight-bit integers, a tile of them in registers.

It owns one instruction and how a tile keeps it busy. What the numbers stand for is `int8`'s business.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu.simd import LANES, element_pointer

__all__ = ["TILE_COLUMNS", "TILE_ROWS", "dot_tile"]

TILE_ROWS, TILE_COLUMNS = 4, 6
"""Rows, and registers of output channels: 24 sums, six weights and an input fill the 32 registers. (8 by 3, 6
by 4 and 12 by 2 were slower, by 3% at 32 rows and 40% and more at one.)"""

_VNNI = "avx512vnni"
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VI = ir.VectorType(_I32, LANES)


def _const(value: int) -> Any:
    return ir.Constant(_VI, [value] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_VI, ir.Undefined)
    one = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(one, undefined, _const(0))


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Each lane's total and the products of its four unsigned with its four signed bytes."""
    if llvm.get_host_cpu_features().get(_VNNI):
        kind, name = ir.FunctionType(_VI, [_VI] * 3), "llvm.x86.avx512.vpdpbusd.512"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, (total, unsigned, signed))
    for byte in range(4):  # the same sums on any other machine
        left = builder.and_(builder.lshr(unsigned, _const(8 * byte)), _const(255))
        right = builder.ashr(builder.shl(signed, _const(24 - 8 * byte)), _const(24))
        total = builder.add(total, builder.mul(left, right))
    return total


def _tile_function(module: Any) -> Any:
    """``(x, w, quads, minus, out)`` over one tile, as a function of its own: inlined, the constants that the
    code around it keeps in registers would push sums out of them, at a third of the speed."""
    name = "daskllm_int8_tile"
    if name in module.globals:
        return module.globals[name]
    bytes_, words = _I8.as_pointer(), _I32.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [bytes_, bytes_, _I64, words, words]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, w, quads, minus, out = function.args
    width = builder.mul(_I64(4), quads)
    rows = [builder.bitcast(builder.gep(x, [builder.mul(_I64(r), width)]), words) for r in range(TILE_ROWS)]
    weights = [
        builder.bitcast(builder.gep(w, [builder.mul(_I64(LANES * c), width)]), _VI.as_pointer())
        for c in range(TILE_COLUMNS)
    ]
    totals = [cgutils.alloca_once(builder, _VI) for _ in range(TILE_ROWS * TILE_COLUMNS)]
    for i, total in enumerate(totals):
        start = builder.neg(builder.load(builder.gep(minus, [_I64(i // TILE_COLUMNS)])))
        builder.store(_splat(builder, start), total)
    with cgutils.for_range(builder, quads) as loop:
        columns = [builder.load(builder.gep(one, [loop.index]), align=1) for one in weights]
        for r, row in enumerate(rows):
            value = _splat(builder, builder.load(builder.gep(row, [loop.index]), align=1))
            for column, total in zip(columns, totals[r * TILE_COLUMNS :], strict=False):
                builder.store(_dot(builder, builder.load(total), column, value), total)
    into = builder.bitcast(out, _VI.as_pointer())
    for i, total in enumerate(totals):
        builder.store(builder.load(total), builder.gep(into, [_I64(i)]), align=4)
    builder.ret_void()
    return function


@intrinsic
def dot_tile(typingctx, x, x_at, w, w_at, quads, minus, row, out):  # type: ignore[no-untyped-def]
    """Int32 products of `TILE_ROWS` rows with ``16 * TILE_COLUMNS`` channels, row by row into ``out``.

    Args:
        x, x_at: int8, ``4 * quads`` numbers for each row.
        w, w_at: uint8, for every sixteen channels ``[quads, 16, 4]``.
        minus, row: int32, what each row's sums start below zero by.
    """

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        _, x_at_, _, w_at_, quads_, _, row_, _ = args

        def pointer(k: int, index: Any) -> Any:
            return element_pointer(context, builder, sig.args[k], args[k], index)

        tile = _tile_function(builder.module)
        builder.call(
            tile, [pointer(0, x_at_), pointer(2, w_at_), quads_, pointer(5, row_), pointer(7, _I64(0))]
        )
        return context.get_dummy_value()

    whole = types.intp
    return types.void(x, whole, w, whole, whole, minus, whole, out), codegen
