"""The fused operations on a CPU: oneDNN for the products, Numba SIMD kernels for everything between them.

Every operation treats a row by itself and in one order of operations, so that a row's bits do not depend
on its company, on how its prompt was cut into chunks, or on the number of threads:

- a packed oneDNN product gives a row the same bits at every batch size in bfloat16 and at every batch size
  above one in float32 (hence the doubled row in `linear`);
- attention walks a sequence's blocks from its first key to its last and treats keys beyond a row's own as
  exact zeros, so that a prefill tile and a decode step add the same numbers in the same order.

See `daskllm.engine.kernels.reference` for what each operation computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba import types

from daskllm.engine.batch import BLOCK_SIZE, Batch
from daskllm.engine.kernels.simd import (
    LANES,
    array,
    load,
    run,
    store,
    take,
    vadd,
    vblend,
    vdiv,
    vexp,
    vfma,
    vload,
    vmax,
    vmul,
    vreduce_add,
    vreduce_max,
    vsplat,
    vstore,
    vsub,
)

__all__ = ["Packed", "activate", "add_norm", "attention", "linear", "pack", "rope_store"]

_SIGNATURE = types.void(types.CPointer(types.int64))
_MASKED = np.float32(-1e30)
_ROWS = 4  # query rows that share each load of K or V: four accumulators of two registers each
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def _bits(value: float) -> int:
    """A float32 as the int64 that carries it among a kernel's arguments."""
    return int(np.float32(value).view(np.int32))


@numba.njit
def _float(bits):  # type: ignore[no-untyped-def]
    return np.int32(bits).view(np.float32)


# --- linear -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in oneDNN's own layout; opaque, and a copy of the block it was made from."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    out_features: int


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
    """Reorder a ``[out, in]`` weight once, so that every product reads it in the machine's best order."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return Packed(packed, None if bias is None else bias.contiguous(), weight.shape[0])


def linear(x: torch.Tensor, weight: Packed) -> torch.Tensor:
    """x @ weight.T + bias, ``[rows, in] -> [rows, out]``."""
    alone = x.shape[0] == 1 and x.dtype == torch.float32
    if alone:  # a single float32 row takes another path in oneDNN, with other bits
        x = x.expand(2, -1).contiguous()
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
    return y[:1] if alone else y


# --- add + norm ---------------------------------------------------------------------------------------


@numba.njit
def _sum_of_squares(row, start, size, mean):  # type: ignore[no-untyped-def]
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


@numba.njit
def _sum(row, start, size):  # type: ignore[no-untyped-def]
    total = vsplat(np.float32(0))
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        total = vadd(total, vload(row, start + i))
    sum_ = vreduce_add(total)
    for i in range(whole, size):
        sum_ += load(row, start + i)
    return sum_


@numba.njit
def _norm_row(item, delta, residual, out, weight, bias, size, eps, layer_norm):  # type: ignore[no-untyped-def]
    start = item * size
    if delta.size:
        for i in range(size):
            store(residual, start + i, load(residual, start + i) + load(delta, start + i))
    mean = np.float32(0)
    if layer_norm:
        mean = _sum(residual, start, size) / np.float32(size)
    variance = _sum_of_squares(residual, start, size, mean) / np.float32(size)
    scale = np.float32(1) / np.float32(math.sqrt(variance + eps))
    for i in range(size):
        x = (load(residual, start + i) - mean) * scale * load(weight, i)
        if bias.size:
            x += load(bias, i)
        store(out, start + i, x)


@numba.njit(inline="always")
def _norm_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (11,), np.int64)
    rows, size = a[1], a[7]
    residual = array(a[3], rows * size, dtype)
    delta = array(a[2], rows * size if a[2] else 0, dtype)
    out = array(a[4], rows * size, dtype)
    weight = array(a[5], size, dtype)
    bias = array(a[6], size if a[6] else 0, dtype)
    while True:
        item = take(a)
        if item >= rows:
            break
        _norm_row(item, delta, residual, out, weight, bias, size, _float(a[8]), a[9] != 0)


@numba.cfunc(_SIGNATURE, cache=True)
def _norm_f32(pointer):  # type: ignore[no-untyped-def]
    _norm_loop(pointer, np.float32)


@numba.cfunc(_SIGNATURE, cache=True)
def _norm_bf16(pointer):  # type: ignore[no-untyped-def]
    _norm_loop(pointer, np.uint16)


def add_norm(
    delta: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
) -> torch.Tensor:
    """``residual += delta`` in place, then its RMS or layer norm; all ``[rows, hidden]``."""
    out = torch.empty_like(residual)
    compiled = _norm_f32 if residual.dtype == torch.float32 else _norm_bf16
    run(
        compiled,
        residual.shape[0],
        _address(delta),
        residual.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        residual.shape[1],
        _bits(eps),
        int(kind == "layer"),
        0,
    )
    return out


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# --- rope + KV store ----------------------------------------------------------------------------------


@numba.njit
def _head(source, start, weight, eps, cos, sin, angle, size, scratch):  # type: ignore[no-untyped-def]
    """One head's vector into scratch: normed when it has a weight, then turned by its position."""
    scale = np.float32(1)
    if weight.size:
        square = _sum_of_squares(source, start, size, np.float32(0)) / np.float32(size)
        scale = np.float32(1) / np.float32(math.sqrt(square + eps))
    for i in range(size):
        scratch[i] = load(source, start + i) * scale
        if weight.size:
            scratch[i] *= load(weight, i)
    if cos.size:
        half = size // 2
        for i in range(half):
            x, y = scratch[i], scratch[half + i]
            c, s = cos[angle + i], sin[angle + i]
            scratch[i] = x * c - y * s
            scratch[half + i] = y * c + x * s


@numba.njit(inline="always")
def _rope_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (20,), np.int64)
    rows, heads, kv_heads, size, padded = a[1], a[13], a[14], a[15], a[16]
    width, half = (heads + 2 * kv_heads) * size, size // 2
    qkv = array(a[2], rows * width, dtype)
    q = array(a[3], rows * heads * size, dtype)
    keys = array(a[4], a[17] * kv_heads * size * BLOCK_SIZE, dtype)
    values = array(a[5], a[17] * kv_heads * padded * BLOCK_SIZE, dtype)
    positions = array(a[6], rows, np.int64)
    slots = array(a[7], rows, np.int64)
    cos = array(a[8], a[18] * half if a[8] else 0, np.float32)
    sin = array(a[9], a[18] * half if a[9] else 0, np.float32)
    q_norm = array(a[10], size if a[10] else 0, dtype)
    k_norm = array(a[11], size if a[11] else 0, dtype)
    eps = _float(a[12])
    scratch = np.empty(size, np.float32)
    while True:
        item = take(a)
        if item >= rows:
            break
        angle = positions[item] * half
        for h in range(heads):
            _head(qkv, item * width + h * size, q_norm, eps, cos, sin, angle, size, scratch)
            for i in range(size):
                store(q, (item * heads + h) * size + i, scratch[i])
        block, offset = slots[item] // BLOCK_SIZE, slots[item] % BLOCK_SIZE
        for h in range(kv_heads):
            start = item * width + (heads + h) * size
            _head(qkv, start, k_norm, eps, cos, sin, angle, size, scratch)
            base = (block * kv_heads + h) * size * BLOCK_SIZE + offset
            for i in range(size):
                store(keys, base + i * BLOCK_SIZE, scratch[i])
            start += kv_heads * size
            base = ((block * kv_heads + h) * BLOCK_SIZE + offset) * padded
            for i in range(size):
                values[base + i] = qkv[start + i]
            for i in range(size, padded):
                values[base + i] = 0


@numba.cfunc(_SIGNATURE, cache=True)
def _rope_f32(pointer):  # type: ignore[no-untyped-def]
    _rope_loop(pointer, np.float32)


@numba.cfunc(_SIGNATURE, cache=True)
def _rope_bf16(pointer):  # type: ignore[no-untyped-def]
    _rope_loop(pointer, np.uint16)


def rope_store(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Norm and turn q and k, write k and v to their slots; returns q ``[rows, heads * head_dim]``."""
    blocks, kv_heads, size, _ = keys.shape
    heads = qkv.shape[1] // size - 2 * kv_heads
    q = torch.empty((qkv.shape[0], heads * size), dtype=qkv.dtype)
    cos, sin = angles or (None, None)
    q_norm, k_norm = norms or (None, None)
    run(
        _rope_f32 if qkv.dtype == torch.float32 else _rope_bf16,
        qkv.shape[0],
        qkv.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        batch.positions.data_ptr(),
        batch.slots.data_ptr(),
        _address(cos),
        _address(sin),
        _address(q_norm),
        _address(k_norm),
        _bits(eps),
        heads,
        kv_heads,
        size,
        values.shape[3],
        blocks,
        0 if cos is None else cos.shape[0],
        0,
    )
    return q


# --- attention ----------------------------------------------------------------------------------------


@numba.njit
def _scores(q, keys, base, out, rows, size):  # type: ignore[no-untyped-def]
    """out[r, t] = q[r] . keys[:, t] for one block, four rows at a time."""
    for r in range(0, rows, _ROWS):
        zero = vsplat(np.float32(0))
        a0, a1, b0, b1, c0, c1, d0, d1 = zero, zero, zero, zero, zero, zero, zero, zero
        row = r * size
        for i in range(size):
            k0 = vload(keys, base + i * BLOCK_SIZE)
            k1 = vload(keys, base + i * BLOCK_SIZE + LANES)
            qa, qb = vsplat(q[row + i]), vsplat(q[row + size + i])
            qc, qd = vsplat(q[row + 2 * size + i]), vsplat(q[row + 3 * size + i])
            a0, a1 = vfma(qa, k0, a0), vfma(qa, k1, a1)
            b0, b1 = vfma(qb, k0, b0), vfma(qb, k1, b1)
            c0, c1 = vfma(qc, k0, c0), vfma(qc, k1, c1)
            d0, d1 = vfma(qd, k0, d0), vfma(qd, k1, d1)
        at = r * BLOCK_SIZE
        vstore(out, at, a0)
        vstore(out, at + LANES, a1)
        vstore(out, at + BLOCK_SIZE, b0)
        vstore(out, at + BLOCK_SIZE + LANES, b1)
        vstore(out, at + 2 * BLOCK_SIZE, c0)
        vstore(out, at + 2 * BLOCK_SIZE + LANES, c1)
        vstore(out, at + 3 * BLOCK_SIZE, d0)
        vstore(out, at + 3 * BLOCK_SIZE + LANES, d1)


@numba.njit
def _softmax(scores, row, first, last, peaks, sums, alphas):  # type: ignore[no-untyped-def]
    """One row of scores into weights, keys first..last-1 of the block alone (Milakov & Gimelshein 2018,
    https://arxiv.org/abs/1805.02867): peaks and sums run on, alphas is what earlier blocks shrink by."""
    at = row * BLOCK_SIZE
    none, zero = vsplat(_MASKED), vsplat(np.float32(0))
    s0 = vblend(vload(scores, at), none, first, last)
    s1 = vblend(vload(scores, at + LANES), none, first - LANES, last - LANES)
    peak = max(peaks[row], vreduce_max(vmax(s0, s1)))
    top = vsplat(peak)
    alpha = vexp(vsplat(peaks[row] - peak))
    e0 = vblend(vexp(vsub(s0, top)), zero, first, last)
    e1 = vblend(vexp(vsub(s1, top)), zero, first - LANES, last - LANES)
    vstore(scores, at, e0)
    vstore(scores, at + LANES, e1)
    vstore(sums, row * LANES, vfma(vload(sums, row * LANES), alpha, vadd(e0, e1)))
    vstore(alphas, row * LANES, alpha)
    peaks[row] = peak


@numba.njit
def _weigh(weights, values, base, out, alphas, rows, keys, padded):  # type: ignore[no-untyped-def]
    """out[r] = out[r] * alphas[r] + sum of weights[r, t] * values[t] over the block's first keys."""
    for r in range(0, rows, _ROWS):
        at, row = r * BLOCK_SIZE, r * padded
        for i in range(0, padded, LANES):
            a = vmul(vload(out, row + i), vload(alphas, r * LANES))
            b = vmul(vload(out, row + padded + i), vload(alphas, (r + 1) * LANES))
            c = vmul(vload(out, row + 2 * padded + i), vload(alphas, (r + 2) * LANES))
            d = vmul(vload(out, row + 3 * padded + i), vload(alphas, (r + 3) * LANES))
            for t in range(keys):
                v = vload(values, base + t * padded + i)
                a = vfma(vsplat(weights[at + t]), v, a)
                b = vfma(vsplat(weights[at + BLOCK_SIZE + t]), v, b)
                c = vfma(vsplat(weights[at + 2 * BLOCK_SIZE + t]), v, c)
                d = vfma(vsplat(weights[at + 3 * BLOCK_SIZE + t]), v, d)
            vstore(out, row + i, a)
            vstore(out, row + padded + i, b)
            vstore(out, row + 2 * padded + i, c)
            vstore(out, row + 3 * padded + i, d)


@numba.njit
def _attend(item, q, keys, values, out, tables, tiles, heads, kv_heads, size, padded, width, window, scale):  # type: ignore[no-untyped-def]
    """One tile of query positions of one sequence, for one key-value head and its group of query heads."""
    tile, head = item // kv_heads * 4, item % kv_heads
    table, token, count, position = tiles[tile] * width, tiles[tile + 1], tiles[tile + 2], tiles[tile + 3]
    group = heads // kv_heads
    rows = count * group
    room = (rows + _ROWS - 1) // _ROWS * _ROWS
    queries = np.zeros(room * size, np.float32)
    for r in range(rows):
        start = ((token + r // group) * heads + head * group + r % group) * size
        for i in range(size):
            queries[r * size + i] = load(q, start + i) * scale
    scores = np.zeros(room * BLOCK_SIZE, np.float32)
    mixed = np.zeros(room * padded, np.float32)
    peaks = np.full(room, _MASKED, np.float32)
    sums = np.zeros(room * LANES, np.float32)
    alphas = np.zeros(room * LANES, np.float32)
    end = position + count
    begin = max(0, position - window + 1) if window else 0
    for j in range(begin // BLOCK_SIZE, (end + BLOCK_SIZE - 1) // BLOCK_SIZE):
        base = (tables[table + j] * kv_heads + head) * BLOCK_SIZE
        _scores(queries, keys, base * size, scores, room, size)
        for r in range(rows):
            here = position + r // group - j * BLOCK_SIZE
            _softmax(scores, r, here - window + 1 if window else 0, here + 1, peaks, sums, alphas)
        for i in range(rows * BLOCK_SIZE, room * BLOCK_SIZE):
            scores[i] = 0
        _weigh(scores, values, base * padded, mixed, alphas, room, min(BLOCK_SIZE, end - j * BLOCK_SIZE), padded)
    for r in range(rows):
        start = ((token + r // group) * heads + head * group + r % group) * size
        total = vreduce_add(vload(sums, r * LANES))
        for i in range(size):
            store(out, start + i, mixed[r * padded + i] / total)


@numba.njit(inline="always")
def _attention_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (19,), np.int64)
    items, heads, kv_heads, size, padded = a[1], a[8], a[9], a[10], a[11]
    blocks, sequences, width = a[12], a[13], a[14]
    q = array(a[2], a[15] * heads * size, dtype)
    keys = array(a[3], blocks * kv_heads * size * BLOCK_SIZE, dtype)
    values = array(a[4], blocks * kv_heads * padded * BLOCK_SIZE, dtype)
    out = array(a[5], a[15] * heads * size, dtype)
    tables = array(a[6], sequences * width, np.int64)
    tiles = array(a[7], items // kv_heads * 4, np.int64)
    while True:
        item = take(a)
        if item >= items:
            break
        _attend(
            item, q, keys, values, out, tables, tiles, heads, kv_heads, size, padded, width, a[16], _float(a[17])
        )


@numba.cfunc(_SIGNATURE, cache=True)
def _attention_f32(pointer):  # type: ignore[no-untyped-def]
    _attention_loop(pointer, np.float32)


@numba.cfunc(_SIGNATURE, cache=True)
def _attention_bf16(pointer):  # type: ignore[no-untyped-def]
    _attention_loop(pointer, np.uint16)


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None, scale: float
) -> torch.Tensor:
    """Causal attention of every query row over its own sequence's blocks; shape and dtype of ``q``."""
    out = torch.empty_like(q)
    blocks, kv_heads, size, _ = keys.shape
    run(
        _attention_f32 if q.dtype == torch.float32 else _attention_bf16,
        batch.tiles.shape[0] * kv_heads,
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        batch.tables.data_ptr(),
        batch.tiles.data_ptr(),
        q.shape[1] // size,
        kv_heads,
        size,
        values.shape[3],
        blocks,
        *batch.tables.shape,
        q.shape[0],
        window or 0,
        _bits(scale),
        0,
    )
    return out


# --- activation ---------------------------------------------------------------------------------------


@numba.njit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    one = vsplat(np.float32(1))
    return vdiv(one, vadd(one, vexp(vsub(vsplat(np.float32(0)), x))))


@numba.njit
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


@numba.njit
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


@numba.njit
def _activate_row(source, start, up, out, at, size, kind, scratch):  # type: ignore[no-untyped-def]
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        y = _apply(vload(source, start + i), kind)
        if up:
            y = vmul(y, vload(source, start + size + i))
        vstore(out, at + i, y)
    if whole < size:
        for i in range(size - whole):
            scratch[i] = load(source, start + whole + i)
        vstore(scratch, 0, _apply(vload(scratch, 0), kind))
        for i in range(size - whole):
            y1 = scratch[i]
            if up:
                y1 *= load(source, start + size + whole + i)
            store(out, at + whole + i, y1)


@numba.njit(inline="always")
def _activate_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (7,), np.int64)
    rows, size, gated = a[1], a[4], a[6]
    width = size * (1 + gated)
    source, out = array(a[2], rows * width, dtype), array(a[3], rows * size, dtype)
    scratch = np.zeros(LANES, np.float32)
    while True:
        item = take(a)
        if item >= rows:
            break
        _activate_row(source, item * width, gated != 0, out, item * size, size, a[5], scratch)


@numba.cfunc(_SIGNATURE, cache=True)
def _activate_f32(pointer):  # type: ignore[no-untyped-def]
    _activate_loop(pointer, np.float32)


@numba.cfunc(_SIGNATURE, cache=True)
def _activate_bf16(pointer):  # type: ignore[no-untyped-def]
    _activate_loop(pointer, np.uint16)


def activate(x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    """act(gate) * up from ``[rows, 2 * size]``, or act(x) from ``[rows, size]``."""
    size = x.shape[1] // 2 if gated else x.shape[1]
    out = torch.empty((x.shape[0], size), dtype=x.dtype)
    compiled: Any = _activate_f32 if x.dtype == torch.float32 else _activate_bf16
    run(compiled, x.shape[0], x.data_ptr(), out.data_ptr(), size, _ACTIVATIONS[kind], int(gated))
    return out
