"""All decoder layers of a step in one call over a cache in eight bits; see `stack`.

It owns the two phases that touch the cache; the others are those of a wider one.
"""

from __future__ import annotations

import numpy as np

from daskllm.engine.kernels.cpu.code.cache_int8 import (
    KEY,
    VALUE,
    attend,
    attention_scratch,
    blocks_at,
    rope_row,
)
from daskllm.engine.kernels.cpu.code.gemm import INPUTS
from daskllm.engine.kernels.cpu.code.memory import array, as_float
from daskllm.engine.kernels.cpu.code.simd import compiled
from daskllm.engine.kernels.cpu.code.stack import stack_loop
from daskllm.engine.kernels.cpu.code.team import neighbours, take
from daskllm.engine.kernels.cpu.fields import (
    ANGLES,
    BLOCKS,
    COS_AT,
    EPS,
    HEADS,
    K_NORM,
    KEYS,
    KV_HEADS,
    LINE,
    MIXED_AT,
    PADDED,
    POSITIONS_AT,
    Q_AT,
    Q_NORM,
    QKV_AT,
    ROWS_,
    SCALE,
    SIN_AT,
    SIZE,
    SLOTS_AT,
    TABLES_AT,
    TILES,
    TILES_AT,
    VALUES,
    WIDTH,
    WINDOW,
)

__all__ = ["attention", "rope", "stack_bf16", "stack_f32"]


@compiled
def rope(a, phase, counters, table, layer, scratch, dtype):  # type: ignore[no-untyped-def]
    """The phase in which keys and values are stored."""
    rows, heads, kv_heads, size, padded = a[ROWS_], a[HEADS], a[KV_HEADS], a[SIZE], a[PADDED]
    qkv = array(a[QKV_AT], rows * (heads + 2 * kv_heads) * size, dtype)
    q = array(a[Q_AT], rows * heads * size, dtype)
    keys, key_scales = blocks_at(table[layer + KEYS], a[BLOCKS], kv_heads, size, KEY)
    values, value_scales = blocks_at(table[layer + VALUES], a[BLOCKS], kv_heads, padded, VALUE)
    positions, slots = array(a[POSITIONS_AT], rows, np.int64), array(a[SLOTS_AT], rows, np.int64)
    angles = a[ANGLES] * (size // 2)
    cos, sin = array(a[COS_AT], angles, np.float32), array(a[SIN_AT], angles, np.float32)
    q_norm = array(table[layer + Q_NORM], size if table[layer + Q_NORM] else 0, dtype)
    k_norm = array(table[layer + K_NORM], size if table[layer + K_NORM] else 0, dtype)
    many = neighbours(rows)
    while True:
        first = take(counters, phase * LINE) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            rope_row(
                row, qkv, q, keys, key_scales, values, value_scales, positions, slots, cos, sin, q_norm,
                k_norm, as_float(a[EPS]), heads, kv_heads, size, padded, scratch,
            )  # fmt: skip


@compiled
def attention(a, phase, counters, table, layer, scratch, dtype, mixed):  # type: ignore[no-untyped-def]
    """The phase in which rows attend."""
    rows, heads, kv_heads, size, padded = a[ROWS_], a[HEADS], a[KV_HEADS], a[SIZE], a[PADDED]
    q, out = array(a[Q_AT], rows * heads * size, dtype), array(a[MIXED_AT], rows * heads * size, mixed)
    keys, key_scales = blocks_at(table[layer + KEYS], a[BLOCKS], kv_heads, size, KEY)
    values, value_scales = blocks_at(table[layer + VALUES], a[BLOCKS], kv_heads, padded, VALUE)
    # No tensor of a step is longer than its rows times its widest block table.
    tables, tiles = array(a[TABLES_AT], rows * a[WIDTH], np.int64), array(a[TILES_AT], 4 * a[TILES], np.int64)
    while True:
        item = take(counters, phase * LINE)
        if item >= a[TILES] * kv_heads:
            break
        attend(
            item, q, keys, key_scales, values, value_scales, out, tables, tiles, heads, kv_heads, size,
            padded, a[WIDTH], table[layer + WINDOW], as_float(a[SCALE]), scratch,
        )  # fmt: skip


def stack_f32(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.float32, np.float32, rope, attention, attention_scratch)


def stack_bf16(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.uint16, INPUTS, rope, attention, attention_scratch)
