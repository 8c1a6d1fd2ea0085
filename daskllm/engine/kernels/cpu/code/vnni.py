"""Products of eight-bit integers, a tile of them in registers.

It owns one instruction and how a tile keeps it busy. What the numbers stand for is `int8`'s business.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu import registers
from daskllm.engine.kernels.cpu.code import amx, avx2
from daskllm.engine.kernels.cpu.code.memory import element_pointer, write_fetch
from daskllm.engine.kernels.cpu.code.simd import splat
from daskllm.engine.kernels.cpu.registers import INT8_COLUMNS, INT8_ROWS, LANES

__all__ = ["BLOCK_ROWS", "dot_rows", "dot_tile"]

BLOCK_ROWS = 12
"""Rows at most that are multiplied with a block of 32 columns at once: 24 sums."""

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_VI = ir.VectorType(_I32, LANES)


def _const(value: int) -> Any:
    return ir.Constant(_VI, [value] * LANES)


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Each lane's total and the products of its four unsigned with its four signed bytes."""
    if registers.VNNI:
        kind, name = ir.FunctionType(_VI, [_VI] * 3), "llvm.x86.avx512.vpdpbusd.512"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, (total, unsigned, signed))
    if registers.WORDS:
        return avx2.dot(builder, total, unsigned, signed)
    for byte in range(4):  # the same sums on any other machine
        left = builder.and_(builder.lshr(unsigned, _const(8 * byte)), _const(255))
        right = builder.ashr(builder.shl(signed, _const(24 - 8 * byte)), _const(24))
        total = builder.add(total, builder.mul(left, right))
    return total


def _tile_function(module: Any) -> Any:
    """``(x, w, quads, minus, out, fetched)`` over one tile, as a function of its own: inlined, the constants
    that the code around it keeps in registers would push sums out of them, at a third of the speed."""
    name = "daskllm_int8_tile"
    if name in module.globals:
        return module.globals[name]
    bytes_, words = _I8.as_pointer(), _I32.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [bytes_, bytes_, _I64, words, words, bytes_])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    if registers.WORDS:
        avx2.write_tile(builder, *function.args[:5])
        builder.ret_void()
        return function
    x, w, quads, minus, out, fetched = function.args
    width = builder.mul(_I64(4), quads)
    rows = [builder.bitcast(builder.gep(x, [builder.mul(_I64(r), width)]), words) for r in range(INT8_ROWS)]
    weights = [
        builder.bitcast(builder.gep(w, [builder.mul(_I64(LANES * c), width)]), _VI.as_pointer())
        for c in range(INT8_COLUMNS)
    ]
    totals = [cgutils.alloca_once(builder, _VI) for _ in range(INT8_ROWS * INT8_COLUMNS)]
    for i, total in enumerate(totals):
        start = builder.neg(builder.load(builder.gep(minus, [_I64(i // INT8_COLUMNS)])))
        builder.store(splat(builder, start), total)
    with cgutils.for_range(builder, quads) as loop:
        write_fetch(builder, builder.gep(fetched, [builder.mul(loop.index, _I64(4 * LANES))]))
        columns = [builder.load(builder.gep(one, [loop.index]), align=1) for one in weights]
        for r, row in enumerate(rows):
            value = splat(builder, builder.load(builder.gep(row, [loop.index]), align=1))
            for column, total in zip(columns, totals[r * INT8_COLUMNS :], strict=False):
                builder.store(_dot(builder, builder.load(total), column, value), total)
    into = builder.bitcast(out, _VI.as_pointer())
    for i, total in enumerate(totals):
        builder.store(builder.load(total), builder.gep(into, [_I64(i)]), align=4)
    builder.ret_void()
    return function


@intrinsic
def dot_tile(typingctx, x, x_at, w, w_at, quads, minus, row, out, cold, fetched):  # type: ignore[no-untyped-def]
    """Int32 products of `INT8_ROWS` rows with ``16 * INT8_COLUMNS`` channels, row by row into ``out``.

    The thread has called `amx.configure`.

    Args:
        x, x_at: int8, ``4 * quads`` numbers for each row.
        w, w_at: uint8, for every sixteen channels ``[quads, 16, 4]``.
        minus, row: int32, what each row's sums start below zero by.
        cold: whether these channels are in no cache yet.
        fetched: from here on in ``w``, as many bytes as sixteen channels have are brought into the second
            cache meanwhile; `amx` and `avx2` do not.
    """

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        _, x_at_, _, w_at_, quads_, _, row_, _, cold_, fetched_ = args

        def pointer(k: int, index: Any) -> Any:
            return element_pointer(context, builder, sig.args[k], args[k], index)

        each = [pointer(0, x_at_), pointer(2, w_at_), quads_, pointer(5, row_), pointer(7, _I64(0))]
        if registers.AMX:
            builder.call(amx.int8_function(builder.module), [*each, cold_])
        else:
            builder.call(_tile_function(builder.module), [*each, pointer(2, fetched_)])
        return context.get_dummy_value()

    whole = types.intp
    return types.void(x, whole, w, whole, whole, minus, whole, out, types.boolean, whole), codegen


def _rows_function(module: Any, columns_unsigned: bool) -> Any:
    """``(rows, x, stride, w, quads, start, out)``: registers are named at compile time, so there is a loop
    for each number of rows and a jump to it."""
    name = f"daskllm_int8_rows_{'columns' if columns_unsigned else 'rows'}_unsigned"
    if name in module.globals:
        return module.globals[name]
    bytes_, words = _I8.as_pointer(), _I32.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [_I64, bytes_, _I64, bytes_, _I64, words, words])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    ways = [function.append_basic_block(f"rows_{n}") for n in range(1, BLOCK_ROWS + 1)]
    jump = builder.switch(function.args[0], ways[-1])
    for n, block in enumerate(ways, start=1):
        jump.add_case(_I64(n), block)
        builder.position_at_end(block)
        _rows_loop(builder, n, columns_unsigned, *function.args[1:])
        builder.ret_void()
    return function


def _rows_loop(
    builder: Any,
    rows: int,
    columns_unsigned: bool,
    x: Any,
    stride: Any,
    w: Any,
    quads: Any,
    start: Any,
    out: Any,
) -> None:
    words = _I32.as_pointer()
    first = [splat(builder, builder.load(builder.gep(start, [_I64(r)]), align=4)) for r in range(rows)]
    before, loop, after = builder.block, *(builder.append_basic_block(name) for name in ("k", "end"))
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = [[builder.phi(_VI) for _ in range(2)] for _ in first]
    panel = builder.bitcast(builder.gep(w, [builder.mul(k, _I64(8 * LANES))]), _VI.as_pointer())
    columns = [builder.load(builder.gep(panel, [_I64(j)]), align=1) for j in range(2)]
    place, grown = builder.gep(x, [builder.mul(k, _I64(4))]), []
    for row in sums:
        value = splat(builder, builder.load(builder.bitcast(place, words), align=1))
        pairs = [(column, value) if columns_unsigned else (value, column) for column in columns]
        grown.append([_dot(builder, total, *pair) for total, pair in zip(row, pairs, strict=True)])
        place = builder.gep(place, [stride])
    following = builder.add(k, _I64(1))
    for phi, begin, new in [(k, _I64(0), following)] + [
        (sums[r][j], first[r], grown[r][j]) for r in range(rows) for j in range(2)
    ]:
        phi.add_incoming(begin, before)
        phi.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", following, quads), loop, after)
    builder.position_at_end(after)
    into = builder.bitcast(out, _VI.as_pointer())
    for i, total in enumerate(total for row in grown for total in row):
        builder.store(total, builder.gep(into, [_I64(i)]), align=4)


@intrinsic
def dot_rows(typingctx, rows, x, x_at, stride, w, w_at, quads, start, row, out):  # type: ignore[no-untyped-def]
    """Int32 products of 1 to `BLOCK_ROWS` rows with 32 columns, ``[rows, 32]`` from ``out[32 * row]`` on.

    Args:
        x, x_at, stride: where the first row begins and how far apart two are; ``4 * quads`` of each count.
        w, w_at: ``[quads, 32, 4]``; of ``x`` and ``w``, one is int8 and the other uint8.
        start: int32, what each row's sums start from, ``start[row]`` the first's.
    """
    columns_unsigned = w.dtype == types.uint8
    assert x.dtype == (types.int8 if columns_unsigned else types.uint8), "one side is signed and one is not"

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        rows_, _, x_at_, stride_, _, w_at_, quads_, _, row_, _ = args

        def pointer(k: int, index: Any) -> Any:
            return element_pointer(context, builder, sig.args[k], args[k], index)

        tile = _rows_function(builder.module, columns_unsigned)
        into = pointer(9, builder.mul(row_, _I64(2 * LANES)))
        each = (rows_, pointer(1, x_at_), stride_, pointer(4, w_at_), quads_, pointer(7, row_), into)
        builder.call(tile, each)
        return context.get_dummy_value()

    i = types.int64
    return types.void(i, x, i, i, w, i, i, start, i, out), codegen
