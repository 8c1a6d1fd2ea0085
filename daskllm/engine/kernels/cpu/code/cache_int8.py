"""The cache in eight bits: keys and values quantised as they are stored, and attention over them.

A head's part of a block is its numbers as weights of integer products (keys as columns, 128 higher as
unsigned bytes; values as inputs, in panels of 32 columns), then its tokens' scales. Nothing is made wider
again: queries and softmax weights, whose scale is their row's own, are taken in sixteen bits, as a high and
a low byte that are multiplied as two rows. The sums are whole numbers, so that a row's bits depend neither on
its company nor on the order of additions.
"""

from __future__ import annotations

import numba
import numpy as np

from daskllm.engine.kernels.cpu.code.attention import MASKED
from daskllm.engine.kernels.cpu.code.memory import (
    array,
    as_float,
    cleared,
    load,
    rounded,
    store,
    vload,
    vstore,
    workspace,
)
from daskllm.engine.kernels.cpu.code.rope import turned_head
from daskllm.engine.kernels.cpu.code.simd import (
    compiled,
    inlined,
    vadd,
    vblend,
    vexp,
    vfma,
    vmax,
    vmul,
    vreduce_add,
    vreduce_max,
    vround,
    vsplat,
    vsub,
)
from daskllm.engine.kernels.cpu.code.team import neighbours, take
from daskllm.engine.kernels.cpu.code.vnni import BLOCK_ROWS, dot_rows
from daskllm.engine.kernels.cpu.registers import LANES
from daskllm.engine.sizes import BLOCK_SIZE, SCALE_BYTES, TILE

__all__ = [
    "KEY",
    "VALUE",
    "attend",
    "attention_bf16",
    "attention_f32",
    "attention_scratch",
    "blocks_at",
    "rope_bf16",
    "rope_f32",
    "rope_row",
]

KEY, VALUE = np.uint8, np.int8
"""Of the two factors of a product one is unsigned: a key 128 higher, and the weight of a value."""
_COLUMNS = 2 * LANES
_HIGHEST = np.float32(127 * 256)
"""Of a query in sixteen bits: its high byte, the nearest one, is then at most 127."""
_UNSIGNED = np.float32(255 * 256)


# --- storing --------------------------------------------------------------------------------------------


@compiled
def _peak(x, start, size):  # type: ignore[no-untyped-def]
    peak = np.float32(0)
    for i in range(size):
        peak = max(peak, abs(load(x, start + i)))
    return peak


@compiled
def _store_key(x, keys, scales, base, offset, size):  # type: ignore[no-untyped-def]
    """A key into its block: four inputs of a token side by side."""
    peak = _peak(x, 0, size)
    inverse = np.float32(127) / peak if peak > 0 else np.float32(0)
    for i in range(size):
        at = base + (i // 4 * BLOCK_SIZE + offset) * 4 + i % 4
        keys[at] = np.uint8(np.int32(np.rint(x[i] * inverse)) + 128)
    scales[(base + size * BLOCK_SIZE) // SCALE_BYTES + offset] = peak / np.float32(127)


@compiled
def _store_value(x, start, values, scales, base, offset, size, padded):  # type: ignore[no-untyped-def]
    """A value into its block: panel by panel, four tokens of a column side by side."""
    peak = _peak(x, start, size)
    inverse = np.float32(127) / peak if peak > 0 else np.float32(0)
    at = base + offset // 4 * _COLUMNS * 4 + offset % 4
    for i in range(padded):
        to = at + i // _COLUMNS * _COLUMNS * BLOCK_SIZE + i % _COLUMNS * 4
        values[to] = np.int8(np.rint(load(x, start + i) * inverse)) if i < size else np.int8(0)
    scales[(base + padded * BLOCK_SIZE) // SCALE_BYTES + offset] = peak / np.float32(127)


@compiled
def rope_row(  # type: ignore[no-untyped-def]
    item, qkv, q, keys, key_scales, values, value_scales, positions, slots, cos, sin, q_norm, k_norm, eps,
    heads, kv_heads, size, padded, scratch
):  # fmt: skip
    """As `daskllm.engine.kernels.cpu.code.rope.rope_row`."""
    width = (heads + 2 * kv_heads) * size
    angle = positions[item] * (size // 2)
    for h in range(heads):
        turned_head(qkv, item * width + h * size, q_norm, eps, cos, sin, angle, size, scratch)
        for i in range(size):
            store(q, (item * heads + h) * size + i, scratch[i])
    block, offset = slots[item] // BLOCK_SIZE, slots[item] % BLOCK_SIZE
    for h in range(kv_heads):
        start = item * width + (heads + h) * size
        turned_head(qkv, start, k_norm, eps, cos, sin, angle, size, scratch)
        base = (block * kv_heads + h) * BLOCK_SIZE
        _store_key(scratch, keys, key_scales, base * (size + SCALE_BYTES), offset, size)
        at = base * (padded + SCALE_BYTES)
        _store_value(qkv, start + kv_heads * size, values, value_scales, at, offset, size, padded)


# --- attending ------------------------------------------------------------------------------------------


@compiled
def _products(rows, x, stride, w, base, quads, start, out):  # type: ignore[no-untyped-def]
    tiles = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    row = 0
    for i in range(tiles):
        many = rows // tiles + (i < rows % tiles)
        dot_rows(many, x, row * stride, stride, w, base, quads, start, row, out)
        row += many


@compiled
def _queries(q, at, r, size, room, scale, wide, queries, starts, factors):  # type: ignore[no-untyped-def]
    """One query as two rows of bytes; what their sums start from, since keys are 128 too high; and what a
    score of theirs is multiplied with."""
    peak = np.float32(0)
    for i in range(size):
        wide[i] = load(q, at + i)
        peak = max(peak, abs(wide[i]))
    inverse = vsplat(_HIGHEST / peak if peak > 0 else np.float32(0))
    # A quarter more, so that a low half of exactly 128 belongs to the next high byte.
    quarter, down, up = vsplat(np.float32(0.25)), vsplat(np.float32(1 / 256)), vsplat(np.float32(-256))
    highs, lows = vsplat(np.float32(0)), vsplat(np.float32(0))
    for i in range(0, room, LANES):
        whole = vround(vmul(vload(wide, i), inverse))
        high = vround(vmul(vadd(whole, quarter), down))
        low = vfma(high, up, whole)
        vstore(queries, 2 * r * room + i, high)
        vstore(queries, (2 * r + 1) * room + i, low)
        highs, lows = vadd(highs, high), vadd(lows, low)
    starts[2 * r] = -128 * np.int32(vreduce_add(highs))
    starts[2 * r + 1] = -128 * np.int32(vreduce_add(lows))
    factors[r] = peak / _HIGHEST * scale


@compiled
def _joined(sums, row, i):  # type: ignore[no-untyped-def]
    """The sums of a row's high and low bytes as one, sixteen columns from ``i`` on."""
    at = 2 * row * _COLUMNS + i
    return vfma(vload(sums, at), vsplat(np.float32(256)), vload(sums, at + _COLUMNS))


@compiled
def _softmax(  # type: ignore[no-untyped-def]
    scores, weights, row, first, last, factor, key_scales, key, value_scales, value, peaks, sums, alphas,
    parts,
):  # fmt: skip
    """As `daskllm.engine.kernels.cpu.code.attention`'s; weights times their values' scales, in sixteen bits
    of a scale in ``parts``. What lies in places that were never written, a scale or a number, may be
    anything."""
    none, zero, each = vsplat(MASKED), vsplat(np.float32(0)), vsplat(factor)
    s0 = vmul(vmul(_joined(scores, row, 0), each), vload(key_scales, key))
    s1 = vmul(vmul(_joined(scores, row, LANES), each), vload(key_scales, key + LANES))
    s0 = vblend(s0, none, first, last)
    s1 = vblend(s1, none, first - LANES, last - LANES)
    peak = max(peaks[row], vreduce_max(vmax(s0, s1)))
    top = vsplat(peak)
    alpha = vexp(vsplat(peaks[row] - peak))
    e0, e1 = vexp(vsub(s0, top)), vexp(vsub(s1, top))
    w0 = vblend(vmul(e0, vload(value_scales, value)), zero, first, last)
    w1 = vblend(vmul(e1, vload(value_scales, value + LANES)), zero, first - LANES, last - LANES)
    e0, e1 = vblend(e0, zero, first, last), vblend(e1, zero, first - LANES, last - LANES)
    vstore(sums, row * LANES, vfma(vload(sums, row * LANES), alpha, vadd(e0, e1)))
    vstore(alphas, row * LANES, alpha)
    peaks[row] = peak
    most = vreduce_max(vmax(w0, w1))
    inverse = vsplat(_UNSIGNED / most if most > 0 else np.float32(0))
    parts[row] = most / _UNSIGNED
    down, at = vsplat(np.float32(1 / 256)), 2 * row * BLOCK_SIZE
    u0, u1 = vround(vmul(w0, inverse)), vround(vmul(w1, inverse))
    vstore(weights, at, vmul(u0, down))
    vstore(weights, at + LANES, vmul(u1, down))
    vstore(weights, at + BLOCK_SIZE, u0)
    vstore(weights, at + BLOCK_SIZE + LANES, u1)


@compiled
def _weigh(weights, values, base, mixed, alphas, parts, rows, keys, padded, zeros, part):  # type: ignore[no-untyped-def]
    """mixed[r] = mixed[r] * alphas[r] + sum of weights[r, t] * values[t] over the block's first keys."""
    quads = (keys + 3) // 4
    for panel in range(padded // _COLUMNS):
        start = base + panel * _COLUMNS * BLOCK_SIZE
        _products(2 * rows, weights, BLOCK_SIZE, values, start, quads, zeros, part)
        for r in range(rows):
            alpha, scale = vload(alphas, r * LANES), vsplat(parts[r])
            for i in range(0, _COLUMNS, LANES):
                at = r * padded + panel * _COLUMNS + i
                vstore(mixed, at, vfma(vload(mixed, at), alpha, vmul(_joined(part, r, i), scale)))


@inlined
def attention_scratch(group, size, padded, inputs):  # type: ignore[no-untyped-def]
    """Room for one thread's `attend`, the same for all ``inputs``."""
    rows, room = TILE * group, (size + LANES - 1) // LANES * LANES
    return (
        workspace(2 * rows * room, np.int8),  # queries, high and low bytes
        workspace(2 * rows, np.int32),  # what their sums start from
        workspace(rows, np.float32),  # and are multiplied with
        cleared(room, np.float32),  # one query
        workspace(2 * rows * BLOCK_SIZE, np.int32),  # scores
        workspace(2 * rows * BLOCK_SIZE, np.uint8),  # softmax weights, high and low bytes
        workspace(rows, np.float32),  # their scales
        workspace(rows * padded, np.float32),  # sums of weighted values
        workspace(rows, np.float32),  # peaks
        workspace(rows * LANES, np.float32),  # sums of weights
        workspace(rows * LANES, np.float32),  # what earlier sums shrink by
        workspace(2 * rows * _COLUMNS, np.int32),  # one panel of a product
        cleared(2 * rows, np.int32),
    )


@compiled
def attend(  # type: ignore[no-untyped-def]
    item, q, keys, key_scales, values, value_scales, out, tables, tiles, heads, kv_heads, size, padded, width,
    window, scale, scratch
):  # fmt: skip
    """One tile of query positions of one sequence, for one key-value head and its group of query heads."""
    at, head = item // kv_heads * 4, item % kv_heads
    table, token, count, position = tiles[at] * width, tiles[at + 1], tiles[at + 2], tiles[at + 3]
    group = heads // kv_heads
    rows = count * group
    queries, starts, factors, wide, scores, weights, parts, mixed, peaks, sums, alphas, part, zeros = scratch
    room = wide.size
    mixed[: rows * padded] = 0
    peaks[:rows] = MASKED
    sums[: rows * LANES] = 0
    for r in range(rows):
        start = ((token + r // group) * heads + head * group + r % group) * size
        _queries(q, start, r, size, room, scale, wide, queries, starts, factors)
    end = position + count
    begin = max(0, position - window + 1) if window else 0
    for j in range(begin // BLOCK_SIZE, (end + BLOCK_SIZE - 1) // BLOCK_SIZE):
        base = (tables[table + j] * kv_heads + head) * BLOCK_SIZE
        key, value = base * (size + SCALE_BYTES), base * (padded + SCALE_BYTES)
        _products(2 * rows, queries, room, keys, key, size // 4, starts, scores)
        key_scale = (key + size * BLOCK_SIZE) // SCALE_BYTES
        value_scale = (value + padded * BLOCK_SIZE) // SCALE_BYTES
        for r in range(rows):
            here = position + r // group - j * BLOCK_SIZE
            first = here - window + 1 if window else 0
            _softmax(
                scores, weights, r, first, here + 1, factors[r], key_scales, key_scale, value_scales,
                value_scale, peaks, sums, alphas, parts,
            )  # fmt: skip
        there = min(BLOCK_SIZE, end - j * BLOCK_SIZE)
        _weigh(weights, values, value, mixed, alphas, parts, rows, there, padded, zeros, part)
    for r in range(rows):
        start = ((token + r // group) * heads + head * group + r % group) * size
        total = vreduce_add(vload(sums, r * LANES))
        for i in range(size):
            store(out, start + i, rounded(mixed[r * padded + i] / total, q, out))


# --- one operation at a time ----------------------------------------------------------------------------


@compiled
def blocks_at(pointer, blocks, kv_heads, width, dtype):  # type: ignore[no-untyped-def]
    """A layer's keys or values: as bytes, and as the float32 that the scales among them are."""
    count = blocks * kv_heads * BLOCK_SIZE * (width + SCALE_BYTES)
    return array(pointer, count, dtype), array(pointer, count // SCALE_BYTES, np.float32)


@inlined
def _rope_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (19,), np.int64)
    rows, heads, kv_heads, size, padded = a[1], a[13], a[14], a[15], a[16]
    half = size // 2
    qkv = array(a[2], rows * (heads + 2 * kv_heads) * size, dtype)
    q = array(a[3], rows * heads * size, dtype)
    keys, key_scales = blocks_at(a[4], a[17], kv_heads, size, KEY)
    values, value_scales = blocks_at(a[5], a[17], kv_heads, padded, VALUE)
    positions, slots = array(a[6], rows, np.int64), array(a[7], rows, np.int64)
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
                item, qkv, q, keys, key_scales, values, value_scales, positions, slots, cos, sin, q_norm,
                k_norm, as_float(a[12]), heads, kv_heads, size, padded, scratch,
            )  # fmt: skip


def rope_f32(pointer):  # type: ignore[no-untyped-def]
    """`rope_row` of all rows, float32."""
    _rope_loop(pointer, np.float32)


def rope_bf16(pointer):  # type: ignore[no-untyped-def]
    """`rope_row` of all rows, bfloat16."""
    _rope_loop(pointer, np.uint16)


@inlined
def _attention_loop(pointer, dtype):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (18,), np.int64)
    items, heads, kv_heads, size, padded = a[1], a[8], a[9], a[10], a[11]
    q, out = array(a[2], a[15] * heads * size, dtype), array(a[5], a[15] * heads * size, dtype)
    keys, key_scales = blocks_at(a[3], a[12], kv_heads, size, KEY)
    values, value_scales = blocks_at(a[4], a[12], kv_heads, padded, VALUE)
    tables = array(a[6], a[13] * a[14], np.int64)
    tiles = array(a[7], items // kv_heads * 4, np.int64)
    room = attention_scratch(heads // kv_heads, size, padded, dtype)
    while True:
        item = take(a, 0)
        if item >= items:
            break
        attend(
            item, q, keys, key_scales, values, value_scales, out, tables, tiles, heads, kv_heads, size,
            padded, a[14], a[16], as_float(a[17]), room,
        )  # fmt: skip


def attention_f32(pointer):  # type: ignore[no-untyped-def]
    """`attend` of all tiles, float32."""
    _attention_loop(pointer, np.float32)


def attention_bf16(pointer):  # type: ignore[no-untyped-def]
    """`attend` of all tiles, bfloat16."""
    _attention_loop(pointer, np.uint16)
