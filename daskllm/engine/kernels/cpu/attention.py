"""Keys and values into the cache, and attention over it."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from daskllm.engine.batch import BLOCK_SIZE, TILE, Batch
from daskllm.engine.kernels.cpu.rows import sum_of_squares
from daskllm.engine.kernels.cpu.simd import (
    LANES,
    array,
    as_float,
    load,
    store,
    vadd,
    vblend,
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
from daskllm.engine.kernels.cpu.team import SIGNATURE, address, float_bits, run, take

__all__ = ["attend", "attention", "attention_scratch", "rope_row", "rope_store"]

_MASKED = np.float32(-1e30)
_ROWS = 4  # query rows that share each load of K or V: four accumulators of two registers each


@numba.njit
def _head(source, start, weight, eps, cos, sin, angle, size, scratch):  # type: ignore[no-untyped-def]
    """One head's vector into scratch: normed when it has a weight, then turned by its position."""
    scale = np.float32(1)
    if weight.size:
        square = sum_of_squares(source, start, size, np.float32(0)) / np.float32(size)
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


@numba.njit
def rope_row(  # type: ignore[no-untyped-def]
    item, qkv, q, keys, values, positions, slots, cos, sin, q_norm, k_norm, eps,
    heads, kv_heads, size, padded, scratch
):  # fmt: skip
    """One row's heads: normed, turned, and its keys and values written to their slot."""
    width = (heads + 2 * kv_heads) * size
    angle = positions[item] * (size // 2)
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
    scratch = np.empty(size, np.float32)
    while True:
        item = take(a, 0)
        if item >= rows:
            break
        rope_row(
            item, qkv, q, keys, values, positions, slots, cos, sin, q_norm, k_norm, as_float(a[12]),
            heads, kv_heads, size, padded, scratch,
        )  # fmt: skip


@numba.cfunc(SIGNATURE, cache=True)
def _rope_f32(pointer):  # type: ignore[no-untyped-def]
    _rope_loop(pointer, np.float32)


@numba.cfunc(SIGNATURE, cache=True)
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
        address(cos),
        address(sin),
        address(q_norm),
        address(k_norm),
        float_bits(eps),
        heads,
        kv_heads,
        size,
        values.shape[3],
        blocks,
        0 if cos is None else cos.shape[0],
        0,
    )
    return q


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
def attention_scratch(group, size, padded):  # type: ignore[no-untyped-def]
    """Room for one thread's `attend`: queries, scores, sums of values, peaks, sums of weights, shrinkages."""
    room = (TILE * group + _ROWS - 1) // _ROWS * _ROWS
    return (
        np.empty(room * size, np.float32),
        np.empty(room * BLOCK_SIZE, np.float32),
        np.empty(room * padded, np.float32),
        np.empty(room, np.float32),
        np.empty(room * LANES, np.float32),
        np.empty(room * LANES, np.float32),
    )


@numba.njit
def attend(  # type: ignore[no-untyped-def]
    item, q, keys, values, out, tables, tiles, heads, kv_heads, size, padded, width, window, scale, scratch
):  # fmt: skip
    """One tile of query positions of one sequence, for one key-value head and its group of query heads."""
    tile, head = item // kv_heads * 4, item % kv_heads
    table, token, count, position = tiles[tile] * width, tiles[tile + 1], tiles[tile + 2], tiles[tile + 3]
    group = heads // kv_heads
    rows = count * group
    room = (rows + _ROWS - 1) // _ROWS * _ROWS
    queries, scores, mixed, peaks, sums, alphas = scratch
    queries[: room * size] = 0
    scores[: room * BLOCK_SIZE] = 0
    mixed[: room * padded] = 0
    peaks[:room] = _MASKED
    sums[: room * LANES] = 0
    alphas[: room * LANES] = 0
    for r in range(rows):
        start = ((token + r // group) * heads + head * group + r % group) * size
        for i in range(size):
            queries[r * size + i] = load(q, start + i) * scale
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
        _weigh(
            scores, values, base * padded, mixed, alphas, room, min(BLOCK_SIZE, end - j * BLOCK_SIZE), padded
        )
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
    scratch = attention_scratch(heads // kv_heads, size, padded)
    while True:
        item = take(a, 0)
        if item >= items:
            break
        attend(
            item, q, keys, values, out, tables, tiles, heads, kv_heads, size, padded, width,
            a[16], as_float(a[17]), scratch,
        )  # fmt: skip


@numba.cfunc(SIGNATURE, cache=True)
def _attention_f32(pointer):  # type: ignore[no-untyped-def]
    _attention_loop(pointer, np.float32)


@numba.cfunc(SIGNATURE, cache=True)
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
        float_bits(scale),
        0,
    )
    return out
