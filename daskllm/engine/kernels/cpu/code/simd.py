"""Sixteen float32 lanes as a Numba value.

The CPU kernels need register accumulators and a fixed order of operations, which a loop left to the
auto-vectoriser does not promise. `f32x16` is an LLVM ``<16 x float>``: one register with AVX-512, two or
four where registers are narrower, the same bits in every case, since each operation here is defined lane
by lane and multiply-add is always fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from daskllm.engine.kernels.cpu.registers import BFLOAT16, LANES

__all__ = [
    "VECTOR",
    "BFloat",
    "compiled",
    "f32x16",
    "inlined",
    "round_to_bfloat16",
    "splat",
    "vadd",
    "vblend",
    "vdiv",
    "vexp",
    "vfma",
    "vmax",
    "vmul",
    "vpick",
    "vreduce_add",
    "vreduce_max",
    "vround",
    "vsplat",
    "vsub",
]

compiled = numba.njit(error_model="numpy", boundscheck=False)
"""For a function that kernels call. None of them raises, nor for a division by zero: nobody would hear."""
inlined = numba.njit(error_model="numpy", boundscheck=False, inline="always")
"""As `compiled`, within its caller."""

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
VECTOR = ir.VectorType(_F32, LANES)
_VI = ir.VectorType(_I32, LANES)
_VH = ir.VectorType(ir.IntType(16), LANES)


class BFloat(ir.Type):
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


_BFLOATS = ir.VectorType(BFloat(), LANES)


class Float32x16(types.Type):
    """Numba type of a value of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = Float32x16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VECTOR)


def _const(kind: ir.VectorType, value: float | int) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def splat(builder: Any, scalar: Any) -> Any:
    """Write a vector with this number, of whichever type, in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    vector = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(vector, undefined, _const(_VI, 0))


@intrinsic
def vsplat(typingctx, x):  # type: ignore[no-untyped-def]
    """A float32 in every lane."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return splat(builder, args[0])

    return f32x16(types.float32), codegen


def round_to_bfloat16(builder: Any, value: Any) -> Any:
    """The upper half of a float32 scalar or vector, rounded to nearest even; a NaN stays one.

    Where there is an instruction for vectors, they are rounded by it: denormal numbers become zero.
    """
    if value.type == VECTOR and BFLOAT16:
        kind = ir.FunctionType(_BFLOATS, [VECTOR])
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.bitcast(builder.call(function, (value,)), _VH)
    wide, narrow = (_VI, _VH) if value.type == VECTOR else (_I32, ir.IntType(16))

    def const(number: int) -> ir.Constant:
        return _const(wide, number) if wide == _VI else wide(number)

    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, const(16)), const(1))
    rounded = builder.add(builder.add(bits, const(0x7FFF)), odd)
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), const(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, const(16)), narrow)


def _binary(operation: str, doc: str) -> Any:
    @intrinsic
    def op(typingctx, a, b):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            return getattr(builder, operation)(*args)

        return f32x16(f32x16, f32x16), codegen

    op.__doc__ = doc
    return op


vadd = _binary("fadd", "a + b")
vsub = _binary("fsub", "a - b")
vmul = _binary("fmul", "a * b")
vdiv = _binary("fdiv", "a / b")


@intrinsic
def vmax(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The larger of a and b in each lane."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def vpick(typingctx, x, y, a, b):  # type: ignore[no-untyped-def]
    """Lanes of a where x is larger than y, or the first of both that is no number; of b elsewhere."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        x_, y_, a_, b_ = args
        larger = builder.fcmp_unordered(">", x_, y_)
        return builder.select(builder.and_(larger, builder.fcmp_ordered("ord", y_, y_)), a_, b_)

    return f32x16(f32x16, f32x16, f32x16, f32x16), codegen


@intrinsic
def vround(typingctx, a):  # type: ignore[no-untyped-def]
    """The nearest whole number in each lane, the even one of two."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return _call(builder, "llvm.rint.v16f32", VECTOR, *args)

    return f32x16(f32x16), codegen


@intrinsic
def vfma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return _call(builder, "llvm.fma.v16f32", VECTOR, *args)

    return f32x16(f32x16, f32x16, f32x16), codegen


@intrinsic
def vblend(typingctx, a, b, first, last):  # type: ignore[no-untyped-def]
    """Lanes ``first <= lane < last`` of a, the others of b."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        a_, b_, first_, last_ = args
        lanes = ir.Constant(_VI, list(range(LANES)))

        def spread(index: Any) -> Any:
            # Clamped before it is narrowed: a block far off must not wrap round.
            wide = index.type
            low = builder.select(builder.icmp_signed("<", index, wide(0)), wide(0), index)
            high = builder.select(builder.icmp_signed(">", low, wide(LANES)), wide(LANES), low)
            return splat(builder, builder.trunc(high, _I32))

        inside = builder.and_(
            builder.icmp_signed(">=", lanes, spread(first_)), builder.icmp_signed("<", lanes, spread(last_))
        )
        return builder.select(inside, a_, b_)

    return f32x16(f32x16, f32x16, types.intp, types.intp), codegen


def _fold(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Halves combined until one lane is left: a fixed tree, whatever the machine's registers."""
    width = LANES
    while width > 1:
        width //= 2
        half = ir.VectorType(_I32, width)
        low = ir.Constant(half, list(range(width)))
        high = ir.Constant(half, list(range(width, 2 * width)))
        undefined = ir.Constant(vector.type, ir.Undefined)
        vector = combine(
            builder.shuffle_vector(vector, undefined, low), builder.shuffle_vector(vector, undefined, high)
        )
    return builder.extract_element(vector, _I32(0))


@intrinsic
def vreduce_add(typingctx, a):  # type: ignore[no-untyped-def]
    """The sum of the lanes, as float32."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return _fold(builder, args[0], builder.fadd)

    return types.float32(f32x16), codegen


@intrinsic
def vreduce_max(typingctx, a):  # type: ignore[no-untyped-def]
    """The largest of the lanes, as float32."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return _fold(builder, args[0], lambda x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))

    return types.float32(f32x16), codegen


# exp(r) on |r| <= ln(2)/2 as 1 + r + r^2 * p(r), with the coefficients of expf in the Cephes library
# (https://www.netlib.org/cephes); ln(2) in two parts so that r keeps its last bits.
_EXP_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


@intrinsic
def vexp(typingctx, a):  # type: ignore[no-untyped-def]
    """exp(a); below -87 it is exp(-87) (about 1e-38), above 88 exp(88)."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        def const(value: float) -> ir.Constant:
            return _const(VECTOR, value)

        def fma(x: Any, y: Any, z: Any) -> Any:
            return _call(builder, "llvm.fma.v16f32", VECTOR, x, y, z)

        x = args[0]
        x = builder.select(builder.fcmp_ordered(">", x, const(-87.0)), x, const(-87.0))
        x = builder.select(builder.fcmp_ordered("<", x, const(88.0)), x, const(88.0))
        n = _call(builder, "llvm.floor.v16f32", VECTOR, fma(x, const(1.44269504088896341), const(0.5)))
        r = fma(n, const(-_LN2_HIGH), x)
        r = fma(n, const(-_LN2_LOW), r)
        p = const(_EXP_COEFFICIENTS[0])
        for coefficient in _EXP_COEFFICIENTS[1:]:
            p = fma(p, r, const(coefficient))
        y = fma(p, builder.fmul(r, r), builder.fadd(r, const(1.0)))
        power = builder.shl(builder.add(builder.fptosi(n, _VI), _const(_VI, 127)), _const(_VI, 23))
        return builder.fmul(y, builder.bitcast(power, VECTOR))

    return f32x16(f32x16), codegen
