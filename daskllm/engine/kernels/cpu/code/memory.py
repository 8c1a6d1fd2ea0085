"""What kernels read and write: elements and vectors of flat arrays, and a thread's own room.

In registers everything is float32. In memory numbers may be bfloat16, which arrays have as uint16, or whole.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu.code.simd import VECTOR, compiled, f32x16, inlined, round_to_bfloat16
from daskllm.engine.kernels.cpu.registers import LANES

__all__ = [
    "array",
    "as_float",
    "cleared",
    "element_pointer",
    "fetch",
    "load",
    "rounded",
    "store",
    "vload",
    "vstore",
    "workspace",
    "write_fetch",
]

_F32, _I32 = ir.FloatType(), ir.IntType(32)
_VI, _VH, _VB = (ir.VectorType(ir.IntType(bits), LANES) for bits in (32, 16, 8))
_SIXTEENS = ir.Constant(_VI, [16] * LANES)
_LINE = 64
_FIRST, _SECOND = 3, 2  # caches, as ``llvm.prefetch`` numbers them


def element_pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def load(typingctx, array, index):  # type: ignore[no-untyped-def]
    """``array[index]`` as float32; uint16 elements are bfloat16 bits."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = builder.load(element_pointer(context, builder, sig.args[0], args[0], args[1]))
        if sig.args[0].dtype == types.float32:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _F32)

    return types.float32(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """``array[index] = value``; into uint16, rounded to bfloat16 (nearest even)."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = element_pointer(context, builder, sig.args[0], args[0], args[1])
        if sig.args[0].dtype == types.float32:
            builder.store(args[2], pointer)
        else:
            builder.store(round_to_bfloat16(builder, args[2]), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), codegen


@intrinsic
def rounded(typingctx, value, like, out):  # type: ignore[no-untyped-def]
    """A float32, or a vector of them, as precise as ``like``'s elements, if ``out`` is to keep more of it."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value, kinds = args[0], [array.dtype for array in sig.args[1:]]
        if kinds != [types.uint16, types.float32]:
            return value
        wide = _VI if value.type == VECTOR else _I32
        sixteen = _SIXTEENS if value.type == VECTOR else _I32(16)
        half = builder.zext(round_to_bfloat16(builder, value), wide)
        return builder.bitcast(builder.shl(half, sixteen), value.type)

    return value(value, like, out), codegen


@intrinsic
def vload(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Lanes ``array[index : index + 16]`` of a flat contiguous array; uint16 elements are bfloat16 bits, int8
    and int32 ones become float32."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = element_pointer(context, builder, sig.args[0], args[0], args[1])
        if sig.args[0].dtype in (types.int8, types.int32):
            kind, align = (_VB, 1) if sig.args[0].dtype == types.int8 else (_VI, 4)
            whole = builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)
            return builder.sitofp(whole, VECTOR)
        if sig.args[0].dtype == types.float32:
            return builder.load(builder.bitcast(pointer, VECTOR.as_pointer()), align=4)
        bits = builder.load(builder.bitcast(pointer, _VH.as_pointer()), align=2)
        return builder.bitcast(builder.shl(builder.zext(bits, _VI), _SIXTEENS), VECTOR)

    return f32x16(array, types.intp), codegen


@intrinsic
def fetch(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Have the 64 bytes around ``array[index]`` brought into the first cache while other work is done."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = builder.bitcast(
            element_pointer(context, builder, sig.args[0], *args), ir.IntType(8).as_pointer()
        )
        write_fetch(builder, pointer, _FIRST)
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def write_fetch(builder: Any, pointer: Any, cache: int = _SECOND) -> None:
    """Write the instruction of `fetch`, into the second cache if not said otherwise."""
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, data = _I32(0), _I32(1)
    builder.call(function, (pointer, read, _I32(cache), data))


@intrinsic
def vstore(typingctx, array, index, value):  # type: ignore[no-untyped-def]
    """``array[index : index + 16] = value``; into uint16, rounded to bfloat16 (nearest even); into bytes,
    the lowest eight bits of the whole part."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = element_pointer(context, builder, sig.args[0], args[0], args[1])
        if sig.args[0].dtype in (types.int8, types.uint8):
            small = builder.trunc(builder.fptosi(args[2], _VI), _VB)
            builder.store(small, builder.bitcast(pointer, _VB.as_pointer()), align=1)
        elif sig.args[0].dtype == types.float32:
            builder.store(args[2], builder.bitcast(pointer, VECTOR.as_pointer()), align=4)
        else:
            half = round_to_bfloat16(builder, args[2])
            builder.store(half, builder.bitcast(pointer, _VH.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def _pointer(typingctx, address):  # type: ignore[no-untyped-def]
    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@compiled
def as_float(bits):  # type: ignore[no-untyped-def]
    """The float32 whose bits an int64 carries among a kernel's arguments."""
    return np.int32(bits).view(np.float32)


@inlined
def array(address, size, dtype):  # type: ignore[no-untyped-def]
    """A flat array of ``size`` elements over memory that the caller keeps alive."""
    return numba.carray(_pointer(address), size, dtype)


@intrinsic
def _reserve(typingctx, size, dtype):  # type: ignore[no-untyped-def]
    kind = dtype.instance_type if isinstance(dtype, types.TypeRef) else dtype.dtype

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        room = builder.alloca(context.get_data_type(kind), size=args[0])
        room.align = _LINE
        return builder.bitcast(room, cgutils.voidptr_t)

    return types.voidptr(types.int64, dtype), codegen


@inlined
def workspace(size, dtype):  # type: ignore[no-untyped-def]
    """A flat array of ``size`` elements for one thread until its kernel ends, with whatever lies there.

    It is on the stack, from where it goes by itself: for kernels and what is `inlined` in them, outside of
    loops. With 64 query heads of 128 for each key, attention takes 0.8 MB of the 8 that a thread usually has.
    """
    return numba.carray(_reserve(size, dtype), size, dtype)


@inlined
def cleared(size, dtype):  # type: ignore[no-untyped-def]
    """As `workspace`, of zeros."""
    zeros = workspace(size, dtype)
    zeros[:] = 0
    return zeros
