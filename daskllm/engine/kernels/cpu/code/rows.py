"""What is done to a row by itself: residual add and norm, the MLP's activation."""

from __future__ import annotations

import math

import numba
import numpy as np

from daskllm.engine.kernels.cpu.code.memory import (
    array,
    as_float,
    cleared,
    load,
    rounded,
    store,
    vload,
    vstore,
)
from daskllm.engine.kernels.cpu.code.simd import (
    compiled,
    inlined,
    vadd,
    vdiv,
    vexp,
    vfma,
    vmax,
    vmul,
    vreduce_add,
    vsplat,
    vsub,
)
from daskllm.engine.kernels.cpu.code.team import neighbours, take
from daskllm.engine.kernels.cpu.registers import LANES

__all__ = [
    "activate_bf16",
    "activate_f32",
    "activate_row",
    "norm_bf16",
    "norm_f32",
    "norm_row",
    "sum_of_squares",
]


@compiled
def sum_of_squares(row, start, size, mean):  # type: ignore[no-untyped-def]
    """Sum of (x - mean)^2 over ``row[start : start + size]``, sixteen partial sums at a time."""
    total = vsplat(np.float32(0))
    centre = vsplat(mean)
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        x = vsub(vload(row, start + i), centre)
        total = vfma(x, x, total)
    sum_ = vreduce_add(total)
    for i in range(whole, size):
        x = load(row, start + i) - mean
        sum_ += x * x
    return sum_


@compiled
def _sum(row, start, size):  # type: ignore[no-untyped-def]
    total = vsplat(np.float32(0))
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        total = vadd(total, vload(row, start + i))
    sum_ = vreduce_add(total)
    for i in range(whole, size):
        sum_ += load(row, start + i)
    return sum_


@compiled
def norm_row(item, delta, residual, out, weight, bias, size, eps, layer_norm):  # type: ignore[no-untyped-def]
    """One row of `add_norm`."""
    start = item * size
    whole = size // LANES * LANES
    if delta.size:
        for i in range(0, whole, LANES):
            vstore(residual, start + i, vadd(vload(residual, start + i), vload(delta, start + i)))
        for i in range(whole, size):
            store(residual, start + i, load(residual, start + i) + load(delta, start + i))
    mean = np.float32(0)
    if layer_norm:
        mean = _sum(residual, start, size) / np.float32(size)
    variance = sum_of_squares(residual, start, size, mean) / np.float32(size)
    scale = np.float32(1) / np.float32(math.sqrt(variance + eps))
    centre, factor = vsplat(mean), vsplat(scale)
    for i in range(0, whole, LANES):
        y = vmul(vmul(vsub(vload(residual, start + i), centre), factor), vload(weight, i))
        if bias.size:
            y = vadd(y, vload(bias, i))
        vstore(out, start + i, rounded(y, residual, out))
    for i in range(whole, size):
        x = (load(residual, start + i) - mean) * scale * load(weight, i)
        if bias.size:
            x += load(bias, i)
        store(out, start + i, rounded(x, residual, out))


@inlined
def _norm_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (10,), np.int64)
    rows, size = a[1], a[7]
    residual = array(a[3], rows * size, dtype)
    delta = array(a[2], rows * size if a[2] else 0, dtype)
    out = array(a[4], rows * size, dtype)
    weight = array(a[5], size, dtype)
    bias = array(a[6], size if a[6] else 0, dtype)
    many = neighbours(rows)
    while True:
        first = take(a, 0) * many
        if first >= rows:
            break
        for item in range(first, min(first + many, rows)):
            norm_row(item, delta, residual, out, weight, bias, size, as_float(a[8]), a[9] != 0)


def norm_f32(pointer):  # type: ignore[no-untyped-def]
    _norm_loop(pointer, np.float32)


def norm_bf16(pointer):  # type: ignore[no-untyped-def]
    _norm_loop(pointer, np.uint16)


@compiled
def _sigmoid(x):  # type: ignore[no-untyped-def]
    one = vsplat(np.float32(1))
    return vdiv(one, vadd(one, vexp(vsub(vsplat(np.float32(0)), x))))


@compiled
def _gelu(x):  # type: ignore[no-untyped-def]
    """x * Phi(x), with erf from Abramowitz & Stegun 7.1.26 (absolute error below 1.5e-7)."""
    one, zero = vsplat(np.float32(1)), vsplat(np.float32(0))
    z = vmul(x, vsplat(np.float32(math.sqrt(0.5))))
    size = vmax(z, vsub(zero, z))
    t = vdiv(one, vfma(size, vsplat(np.float32(0.3275911)), one))
    p = vsplat(np.float32(1.061405429))
    p = vfma(p, t, vsplat(np.float32(-1.453152027)))
    p = vfma(p, t, vsplat(np.float32(1.421413741)))
    p = vfma(p, t, vsplat(np.float32(-0.284496736)))
    p = vmul(vfma(p, t, vsplat(np.float32(0.254829592))), t)
    # tail = 1 - erf(|z|); Phi(x) is tail/2 below zero and 1 - tail/2 above.
    tail = vmul(p, vexp(vsub(zero, vmul(z, z))))
    # x * Phi(x) = max(x, 0) - |x| * tail / 2 on both sides of zero.
    return vsub(vmax(x, zero), vmul(vmul(vmax(x, vsub(zero, x)), tail), vsplat(np.float32(0.5))))


@compiled
def _apply(x, kind):  # type: ignore[no-untyped-def]
    if kind == 0:
        return vmul(x, _sigmoid(x))
    if kind == 1:
        return _gelu(x)
    if kind == 2:
        # (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3)
        cube = vmul(vmul(x, x), x)
        u = vfma(cube, vsplat(np.float32(0.044715)), x)
        return vmul(x, _sigmoid(vmul(u, vsplat(np.float32(2 * math.sqrt(2 / math.pi))))))
    return vmax(x, vsplat(np.float32(0)))


@compiled
def activate_row(source, start, up, out, at, size, kind, scratch):  # type: ignore[no-untyped-def]
    """``out[at :] = act(source[start :])``, ``size`` numbers, times what is ``up`` further on if not 0."""
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        y = _apply(vload(source, start + i), kind)
        if up:
            y = vmul(y, vload(source, start + up + i))
        vstore(out, at + i, rounded(y, source, out))
    if whole < size:
        for i in range(size - whole):
            scratch[i] = load(source, start + whole + i)
        vstore(scratch, 0, _apply(vload(scratch, 0), kind))
        for i in range(size - whole):
            y1 = scratch[i]
            if up:
                y1 *= load(source, start + up + whole + i)
            store(out, at + whole + i, rounded(y1, source, out))


@inlined
def _activate_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (7,), np.int64)
    rows, size, gated = a[1], a[4], a[6]
    width = size * (1 + gated)
    source, out = array(a[2], rows * width, dtype), array(a[3], rows * size, dtype)
    lanes = cleared(LANES, np.float32)
    many = neighbours(rows)
    while True:
        first = take(a, 0) * many
        if first >= rows:
            break
        for item in range(first, min(first + many, rows)):
            activate_row(source, item * width, gated * size, out, item * size, size, a[5], lanes)


def activate_f32(pointer):  # type: ignore[no-untyped-def]
    _activate_loop(pointer, np.float32)


def activate_bf16(pointer):  # type: ignore[no-untyped-def]
    _activate_loop(pointer, np.uint16)
