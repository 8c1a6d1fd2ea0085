"""Queries and keys normed and turned; keys and values into the cache.

A block is laid out as `daskllm.engine.kernels.cpu.gemm` lays out weights, so that attention is products: keys
are columns (panels of tokens, then head_dim, then tokens), values are inputs (panels of head_dim, then
tokens, then head_dim). To everyone else a block is so many numbers.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from daskllm.engine.kernels.cpu.code.memory import (
    array,
    as_float,
    load,
    store,
    vload,
    vstore,
    workspace,
)
from daskllm.engine.kernels.cpu.code.rows import sum_of_squares
from daskllm.engine.kernels.cpu.code.simd import compiled, inlined, vadd, vmul, vsplat, vsub
from daskllm.engine.kernels.cpu.code.team import neighbours, take
from daskllm.engine.kernels.cpu.registers import COLUMNS, LANES
from daskllm.engine.sizes import BLOCK_SIZE

__all__ = ["rope_bf16", "rope_f32", "rope_row", "turned_head"]


@compiled
def turned_head(source, start, weight, eps, cos, sin, angle, size, scratch):  # type: ignore[no-untyped-def]
    """One head's vector into scratch: normed when it has a weight, then turned by its position."""
    scale = np.float32(1)
    if weight.size:
        square = sum_of_squares(source, start, size, np.float32(0)) / np.float32(size)
        scale = np.float32(1) / np.float32(math.sqrt(square + eps))
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        x = vmul(vload(source, start + i), vsplat(scale))
        vstore(scratch, i, vmul(x, vload(weight, i)) if weight.size else x)
    for i in range(whole, size):
        scratch[i] = load(source, start + i) * scale
        if weight.size:
            scratch[i] *= load(weight, i)
    if cos.size:
        half = size // 2
        whole = half // LANES * LANES
        for i in range(0, whole, LANES):
            x, y = vload(scratch, i), vload(scratch, half + i)
            c, s = vload(cos, angle + i), vload(sin, angle + i)
            vstore(scratch, i, vsub(vmul(x, c), vmul(y, s)))
            vstore(scratch, half + i, vadd(vmul(y, c), vmul(x, s)))
        for i in range(whole, half):
            x1, y1 = scratch[i], scratch[half + i]
            c1, s1 = cos[angle + i], sin[angle + i]
            scratch[i] = x1 * c1 - y1 * s1
            scratch[half + i] = y1 * c1 + x1 * s1


@compiled
def _store_key(key, keys, base, offset, size):  # type: ignore[no-untyped-def]
    """A key into its block, which is a weight for products with queries: token by token a column."""
    each = 4 // keys.itemsize
    step = COLUMNS * each
    at = base + offset // COLUMNS * COLUMNS * size + offset % COLUMNS * each
    for i in range(0, size, each):
        for j in range(each):
            store(keys, at + j, key[i + j])
        at += step


@compiled
def _store_value(source, start, values, base, offset, size, padded):  # type: ignore[no-untyped-def]
    """A value into its block, a weight for products with softmax weights: token by token an input."""
    each = 4 // values.itemsize
    at = base + offset // each * COLUMNS * each + offset % each
    for first in range(0, padded, COLUMNS):
        for i in range(COLUMNS):
            values[at + i * each] = source[start + first + i] if first + i < size else 0
        at += COLUMNS * BLOCK_SIZE


@compiled
def _is_end(item, slots):  # type: ignore[no-untyped-def]
    """Whether this row ends what its block holds, and what is behind it may not be cleared yet."""
    block = slots[item] // BLOCK_SIZE
    goes_on = item + 1 < slots.size and slots[item + 1] // BLOCK_SIZE == block
    alone = item == 0 or slots[item - 1] // BLOCK_SIZE != block
    return not goes_on and (slots[item] % BLOCK_SIZE == 0 or not alone)


@compiled
def _clear_behind(values, base, offset, padded):  # type: ignore[no-untyped-def]
    """Zero in place of the values that are to come: they meet weights of zero before they are written."""
    each = 4 // values.itemsize
    word = offset // each
    for panel in range(base, base + padded * BLOCK_SIZE, COLUMNS * BLOCK_SIZE):
        for i in range(offset % each + 1, each):
            for column in range(COLUMNS):
                values[panel + (word * COLUMNS + column) * each + i] = 0
        values[panel + (word + 1) * COLUMNS * each : panel + COLUMNS * BLOCK_SIZE] = 0


@compiled
def rope_row(  # type: ignore[no-untyped-def]
    item, qkv, q, keys, values, positions, slots, cos, sin, q_norm, k_norm, eps,
    heads, kv_heads, size, padded, scratch
):  # fmt: skip
    """One row's heads: normed, turned, and its keys and values written to their slot."""
    width = (heads + 2 * kv_heads) * size
    angle = positions[item] * (size // 2)
    for h in range(heads):
        turned_head(qkv, item * width + h * size, q_norm, eps, cos, sin, angle, size, scratch)
        to, whole = (item * heads + h) * size, size // LANES * LANES
        for i in range(0, whole, LANES):
            vstore(q, to + i, vload(scratch, i))
        for i in range(whole, size):
            store(q, to + i, scratch[i])
    block, offset = slots[item] // BLOCK_SIZE, slots[item] % BLOCK_SIZE
    end = _is_end(item, slots)
    for h in range(kv_heads):
        start = item * width + (heads + h) * size
        turned_head(qkv, start, k_norm, eps, cos, sin, angle, size, scratch)
        base = (block * kv_heads + h) * BLOCK_SIZE
        _store_key(scratch, keys, base * size, offset, size)
        _store_value(qkv, start + kv_heads * size, values, base * padded, offset, size, padded)
        if end:
            _clear_behind(values, base * padded, offset, padded)


@inlined
def _rope_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (19,), np.int64)
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
    scratch = workspace(size, np.float32)
    many = neighbours(rows)
    while True:
        first = take(a, 0) * many
        if first >= rows:
            break
        for item in range(first, min(first + many, rows)):
            rope_row(
                item, qkv, q, keys, values, positions, slots, cos, sin, q_norm, k_norm, as_float(a[12]),
                heads, kv_heads, size, padded, scratch,
            )  # fmt: skip


def rope_f32(pointer):  # type: ignore[no-untyped-def]
    """`rope_row` of all rows, float32."""
    _rope_loop(pointer, np.float32)


def rope_bf16(pointer):  # type: ignore[no-untyped-def]
    """`rope_row` of all rows, bfloat16."""
    _rope_loop(pointer, np.uint16)
