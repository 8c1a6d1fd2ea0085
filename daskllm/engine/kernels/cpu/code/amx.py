"""Tiles of products in a CPU's matrix registers (Intel AMX), of bfloat16 and of eight-bit integers.

It owns the tile registers: how they are shaped, filled and multiplied. A panel of `gemm` is already what the
instruction wants on its right side, two inputs of sixteen columns in every 64 bytes, and sixteen channels of
`int8` are, four inputs each. Sixteen rows of inputs are the left side; rows that there are none of are
multiplied as well and forgotten, so that one shape of registers serves every product. An instruction adds 32
inputs of a row in an order of its own, the same for each row, so that here too a row's bits do not depend on
its company.

Source of the instructions and of the layout of their configuration: Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu.code.memory import write_fetch
from daskllm.engine.kernels.cpu.code.simd import VECTOR, round_to_bfloat16, splat
from daskllm.engine.kernels.cpu.registers import AMX, INT8_COLUMNS, INT8_ROWS, LANES, ROWS, TILE_HEIGHT

__all__ = ["configure", "function", "int8_function", "release"]

_COLUMNS = 2 * LANES
_LINE = 64
_PANEL = 4 * _COLUMNS  # bytes of a panel for two inputs
_AHEAD = 8192
"""Bytes that weights are fetched ahead. Two Emerald Rapids cores read 12 GB/s without it, 20 GB/s with it."""
_INT8_AHEAD = _AHEAD // 2
_LEFT, _RIGHT = (4, 5), (6, 7)  # registers; 0 to 3 hold the sums, two beside each other for sixteen rows

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_VH = ir.VectorType(_I16, LANES)
_BYTES = _I8.as_pointer()

_INT8_LEFT, _INT8_RIGHT = 6, 7


def _instruction(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _pointer(builder: Any, address: Any, offset: int = 0) -> Any:
    return builder.inttoptr(builder.add(address, _I64(offset)), _BYTES)


def _load(builder: Any, register: int, address: Any, stride: Any, offset: int = 0) -> None:
    _instruction(builder, "tileloadd64", _I8(register), _pointer(builder, address, offset), stride)


def _shape(builder: Any, words: Any, left: tuple[int, ...] = _LEFT, right: tuple[int, ...] = _RIGHT) -> None:
    """Shape the registers for so many fours of bytes of each row of inputs, 1 to 16; sums become zero."""
    room = cgutils.alloca_once(builder, ir.ArrayType(_I8, _LINE))
    start = builder.bitcast(room, _BYTES)
    builder.store(ir.Constant(ir.ArrayType(_I8, _LINE), [1] + [0] * (_LINE - 1)), room)  # palette 1
    height, width = builder.trunc(words, _I8), builder.trunc(builder.mul(words, _I64(4)), _I16)
    for register in range(8):
        columns = builder.bitcast(builder.gep(start, [_I64(16 + 2 * register)]), _I16.as_pointer())
        builder.store(width if register in left else _I16(_LINE), columns)
        rows = builder.gep(start, [_I64(48 + register)])
        builder.store(height if register in right else _I8(TILE_HEIGHT), rows)
    _instruction(builder, "ldtilecfg", start)


def _step(builder: Any, halves: int, x: Any, x_stride: Any, panel: Any, cold: bool = False) -> None:
    """Sums of 32 inputs, or of fewer where the registers are shaped so."""
    for half in range(halves):
        begin = builder.add(x, builder.mul(x_stride, _I64(half * TILE_HEIGHT)))
        _load(builder, _LEFT[half], begin, x_stride)
    if cold:
        for line in range(LANES * _PANEL // _LINE):
            write_fetch(builder, _pointer(builder, panel, _AHEAD + line * _LINE))
    for side in range(2):
        _load(builder, _RIGHT[side], panel, _I64(_PANEL), side * _LINE)
    for half in range(halves):
        for side in range(2):
            numbers = _I8(2 * half + side), _I8(_LEFT[half]), _I8(_RIGHT[side])
            _instruction(builder, "tdpbf16ps", *numbers)


def _sums(builder: Any, halves: int, name: str, address: Any) -> None:
    """Load or store the sums, ``[16 * halves, 32]`` of float32."""
    for half in range(halves):
        for side in range(2):
            place = _pointer(builder, address, half * TILE_HEIGHT * _PANEL + side * _LINE)
            _instruction(builder, name, _I8(2 * half + side), place, _I64(_PANEL))


def _products(builder: Any, halves: int, cold: bool, x: Any, x_stride: Any, w: Any, bias: Any, words: Any,
              room: Any) -> None:  # fmt: skip
    """Sums of all inputs into ``room``."""
    for half in range(halves):
        for side in range(2):
            _load(builder, 2 * half + side, bias, _I64(0), side * _LINE)
    whole, rest = builder.udiv(words, _I64(LANES)), builder.urem(words, _I64(LANES))
    with cgutils.for_range(builder, whole) as loop:
        panel = builder.add(w, builder.mul(loop.index, _I64(LANES * _PANEL)))
        _step(builder, halves, builder.add(x, builder.mul(loop.index, _I64(_LINE))), x_stride, panel, cold)
    _sums(builder, halves, "tilestored64", room)
    with cgutils.if_unlikely(builder, builder.icmp_unsigned(">", rest, _I64(0))):
        _shape(builder, rest)
        _sums(builder, halves, "tileloadd64", room)
        done = builder.mul(whole, _I64(_LINE))
        panel = builder.add(w, builder.mul(done, _I64(_PANEL // 4)))
        _step(builder, halves, builder.add(x, done), x_stride, panel)
        _sums(builder, halves, "tilestored64", room)
        _shape(builder, _I64(LANES))


def function(module: Any, rounded: bool) -> Any:
    """``(rows, x, x_stride, w, bias, words, y, y_stride, cold)`` of 1 to `ROWS` rows and a panel of `gemm`.

    Addresses and strides are in bytes. The registers are shaped by `configure`. ``rounded``: y is bfloat16;
    ``cold``: the panel is not in a cache yet.
    """
    name = f"daskllm_amx_{'bf16' if rounded else 'f32'}"
    kind = ir.FunctionType(ir.VoidType(), [_I64] * 8 + [ir.IntType(1)])
    made = cgutils.get_or_insert_function(module, kind, name)
    if made.blocks:
        return made
    made.linkage = "internal"
    made.attributes.add("noinline")
    builder = ir.IRBuilder(made.append_basic_block())
    rows, x, x_stride, w, bias, words, y, y_stride, cold = made.args
    room = builder.ptrtoint(builder.alloca(ir.ArrayType(ir.FloatType(), ROWS * _COLUMNS)), _I64)
    with builder.if_else(builder.icmp_unsigned(">", rows, _I64(TILE_HEIGHT))) as (many, few):
        for tall, halves in ((many, 2), (few, 1)):
            with tall, builder.if_else(cold) as (first, later):
                for branch, fetched in ((first, True), (later, False)):
                    with branch:
                        _products(builder, halves, fetched, x, x_stride, w, bias, words, room)
    with cgutils.for_range(builder, rows) as loop:
        line = builder.add(room, builder.mul(loop.index, _I64(_PANEL)))
        to = builder.add(y, builder.mul(loop.index, y_stride))
        for side in range(2):
            place = builder.bitcast(_pointer(builder, line, side * _LINE), VECTOR.as_pointer())
            value = builder.load(place, align=4)
            if rounded:
                value, kind, size = round_to_bfloat16(builder, value), _VH, 2
            else:
                kind, size = VECTOR, 4
            into = builder.bitcast(_pointer(builder, to, side * size * LANES), kind.as_pointer())
            builder.store(value, into, align=size)
    builder.ret_void()
    return made


def int8_function(module: Any) -> Any:
    """``(x, w, quads, minus, out, cold)``: int32 products of `INT8_ROWS` rows with ``16 * INT8_COLUMNS``
    channels, less ``minus`` of each row; see `vnni.dot_tile`, whose numbers these are."""
    name = "daskllm_amx_int8"
    if name in module.globals:
        return module.globals[name]
    words = ir.IntType(32).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _BYTES, _I64, words, words, ir.IntType(1)])
    made = ir.Function(module, kind, name)
    made.linkage = "internal"
    made.attributes.add("noinline")
    builder = ir.IRBuilder(made.append_basic_block("entry"))
    x, w, quads, minus, out, cold = made.args
    x, w, room = (builder.ptrtoint(pointer, _I64) for pointer in (x, w, out))
    width, sixteen = builder.mul(quads, _I64(4)), builder.mul(quads, _I64(_LINE))
    whole, rest = builder.udiv(quads, _I64(LANES)), builder.urem(quads, _I64(LANES))

    def step(done: Any, fetched: bool) -> None:
        """Sums of 64 inputs, ``done`` fours of bytes from the first."""
        _load(builder, _INT8_LEFT, builder.add(x, builder.mul(done, _I64(4))), width)
        ahead = _I64(_INT8_AHEAD)
        if fetched:  # behind the last inputs, the first ones of the same channels of the panel that follows
            left = builder.sub(sixteen, builder.mul(done, _I64(_LINE)))
            others = builder.mul(sixteen, _I64(INT8_COLUMNS - 1))
            ahead = builder.select(builder.icmp_signed("<", ahead, left), ahead, builder.add(ahead, others))
        for i in range(INT8_COLUMNS):
            panel = builder.add(builder.add(w, builder.mul(sixteen, _I64(i))), builder.mul(done, _I64(_LINE)))
            for line in range(LANES if fetched else 0):
                write_fetch(builder, _pointer(builder, builder.add(panel, ahead), line * _LINE))
            _load(builder, _INT8_RIGHT, panel, _I64(_LINE))
            _instruction(builder, "tdpbsud", _I8(i), _I8(_INT8_LEFT), _I8(_INT8_RIGHT))

    def sums(instruction: str) -> None:
        for i in range(INT8_COLUMNS):
            place = _pointer(builder, room, i * _LINE)
            _instruction(builder, instruction, _I8(i), place, _I64(INT8_COLUMNS * _LINE))

    for i in range(INT8_COLUMNS):
        _instruction(builder, "tilezero", _I8(i))
    with builder.if_else(cold) as (first, later):
        for branch, fetched in ((first, True), (later, False)):
            with branch, cgutils.for_range(builder, whole) as loop:
                step(builder.mul(loop.index, _I64(LANES)), fetched)
    sums("tilestored64")
    with cgutils.if_unlikely(builder, builder.icmp_unsigned(">", rest, _I64(0))):
        _shape(builder, rest, (_INT8_LEFT,), (_INT8_RIGHT,))
        sums("tileloadd64")
        step(builder.mul(whole, _I64(LANES)), False)
        sums("tilestored64")
        _shape(builder, _I64(LANES))
    vector = ir.VectorType(ir.IntType(32), LANES)
    with cgutils.for_range(builder, _I64(INT8_ROWS)) as loop:
        less = splat(builder, builder.load(builder.gep(minus, [loop.index])))
        line = builder.gep(out, [builder.mul(loop.index, _I64(INT8_COLUMNS * LANES))])
        for i in range(INT8_COLUMNS):
            place = builder.bitcast(builder.gep(line, [_I64(i * LANES)]), vector.as_pointer())
            builder.store(builder.sub(builder.load(place, align=4), less), place, align=4)
    builder.ret_void()
    return made


@intrinsic
def configure(typingctx):  # type: ignore[no-untyped-def]
    """Shape this thread's registers for `function` and `int8_function`; nothing where there are none."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if AMX:
            _shape(builder, _I64(LANES))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release(typingctx):  # type: ignore[no-untyped-def]
    """Give this thread's registers back: the system need not save them when it changes threads."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        if AMX:
            _instruction(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen
