"""Attention over the cache's blocks, as products with them."""

from __future__ import annotations

import numba
import numpy as np

from daskllm.engine.kernels.cpu import registers
from daskllm.engine.kernels.cpu.code import amx
from daskllm.engine.kernels.cpu.code.gemm import INPUTS, rows_together, tile
from daskllm.engine.kernels.cpu.code.memory import (
    array,
    as_float,
    cleared,
    fetch,
    load,
    rounded,
    store,
    vload,
    vstore,
    workspace,
)
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
    vsplat,
    vsub,
)
from daskllm.engine.kernels.cpu.code.team import take
from daskllm.engine.kernels.cpu.registers import COLUMNS, LANES, SLACK
from daskllm.engine.sizes import BLOCK_SIZE, TILE

__all__ = ["MASKED", "attend", "attention_bf16", "attention_f32", "attention_scratch"]

_LINE_BYTES = 64
_KEY_PANELS = BLOCK_SIZE // COLUMNS
MASKED = np.float32(-1e30)
"""The score of a key that a row does not see."""


@compiled
def _products(rows, x, width, w, base, zeros, words, out, at, stride):  # type: ignore[no-untyped-def]
    """``out[r, at :] = x[r] . w`` for one panel."""
    row = 0
    while row < rows:
        many = rows_together(rows - row, x)
        tile(many, x, row * width, width, w, base, zeros, 0, words, out, row * stride + at, stride, False,
             None)  # fmt: skip
        row += many


@compiled
def _softmax(scores, weights, row, first, last, scale, peaks, sums, alphas):  # type: ignore[no-untyped-def]
    """One row of scores into weights, keys first..last-1 of the block alone (Milakov & Gimelshein 2018,
    https://arxiv.org/abs/1805.02867): peaks and sums run on, alphas is what earlier blocks shrink by."""
    at = row * BLOCK_SIZE
    none, zero, factor = vsplat(MASKED), vsplat(np.float32(0)), vsplat(scale)
    s0 = vblend(vmul(vload(scores, at), factor), none, first, last)
    s1 = vblend(vmul(vload(scores, at + LANES), factor), none, first - LANES, last - LANES)
    peak = max(peaks[row], vreduce_max(vmax(s0, s1)))
    top = vsplat(peak)
    alpha = vexp(vsplat(peaks[row] - peak))
    e0 = vblend(vexp(vsub(s0, top)), zero, first, last)
    e1 = vblend(vexp(vsub(s1, top)), zero, first - LANES, last - LANES)
    vstore(weights, at, e0)
    vstore(weights, at + LANES, e1)
    vstore(sums, row * LANES, vfma(vload(sums, row * LANES), alpha, vadd(e0, e1)))
    vstore(alphas, row * LANES, alpha)
    peaks[row] = peak


@compiled
def _weigh(  # type: ignore[no-untyped-def]
    weights, keys, values, base, mixed, alphas, rows, count, size, padded, zeros, part, ahead
):  # fmt: skip
    """mixed[r] = mixed[r] * alphas[r] + sum of weights[r, t] * values[t] over the block's first tokens.

    Values behind them have a weight of zero, and are numbers: `rope` makes them so.
    """
    each = 4 // values.itemsize
    words = (count + each - 1) // each
    if registers.AMX and each == 2:
        words = BLOCK_SIZE // 2  # as many inputs as a register takes: others would have it shaped anew
    for panel in range(padded // COLUMNS):
        _fetch(keys, values, ahead, size, padded, _KEY_PANELS + 1 + panel)
        start = base + panel * COLUMNS * BLOCK_SIZE
        _products(rows, weights, BLOCK_SIZE, values, start, zeros, words, part, 0, COLUMNS)
        for r in range(rows):
            alpha = vload(alphas, r * LANES)
            for i in range(0, COLUMNS, LANES):
                at = r * padded + panel * COLUMNS + i
                vstore(mixed, at, vfma(vload(mixed, at), alpha, vload(part, r * COLUMNS + i)))


@compiled
def _fetch(keys, values, block, size, padded, part):  # type: ignore[no-untyped-def]
    """One part of a block of one head, as many as there are calls to a block; nothing of block -1.

    Blocks lie anywhere, so that no CPU guesses which one is read next. All of one at once would be more than
    a core has under way, and what is computed meanwhile would wait: two Zen 3 cores took 20 ms for what they
    do in 15 ms now, all layers of 32 rows of 128 tokens.
    """
    if block >= 0:
        parts, line = _KEY_PANELS + 1 + padded // COLUMNS, _LINE_BYTES // keys.itemsize
        begin, lines = block * BLOCK_SIZE * size, BLOCK_SIZE * size // line
        for i in range(lines * part // parts, lines * (part + 1) // parts):
            fetch(keys, begin + i * line)
        begin, lines = block * BLOCK_SIZE * padded, BLOCK_SIZE * padded // line
        for i in range(lines * part // parts, lines * (part + 1) // parts):
            fetch(values, begin + i * line)


@compiled
def _first_block(item, tables, tiles, kv_heads, width, window):  # type: ignore[no-untyped-def]
    """Where an item begins: a block of one head."""
    at, head = item // kv_heads * 4, item % kv_heads
    begin = max(0, tiles[at + 3] - window + 1) if window else 0
    return tables[tiles[at] * width + begin // BLOCK_SIZE] * kv_heads + head


@inlined
def attention_scratch(group, size, padded, inputs):  # type: ignore[no-untyped-def]
    """Room for one thread's `attend`, whose products take such ``inputs``."""
    rows = TILE * group
    read = rows + SLACK
    return (
        workspace(read * size, inputs),  # queries
        workspace(rows * BLOCK_SIZE, np.float32),  # scores
        workspace(read * BLOCK_SIZE, inputs),  # softmax weights
        workspace(rows * padded, np.float32),  # sums of weighted values
        workspace(rows, np.float32),  # peaks
        workspace(rows * LANES, np.float32),  # sums of weights
        workspace(rows * LANES, np.float32),  # what earlier sums shrink by
        workspace(rows * COLUMNS, np.float32),  # one panel of a product
        cleared(COLUMNS, np.float32),
    )


@compiled
def attend(  # type: ignore[no-untyped-def]
    item, following, q, keys, values, out, tables, tiles, heads, kv_heads, size, padded, width, window,
    scale, scratch
):  # fmt: skip
    """One tile of query positions of one sequence, for one key-value head and its group of query heads.

    ``following`` is the item that this thread does next, or -1. The thread has called `amx.configure`.
    """
    at, head = item // kv_heads * 4, item % kv_heads
    table, token, count, position = tiles[at] * width, tiles[at + 1], tiles[at + 2], tiles[at + 3]
    group = heads // kv_heads
    rows = count * group
    queries, scores, weights, mixed, peaks, sums, alphas, part, zeros = scratch
    mixed[: rows * padded] = 0
    peaks[:rows] = MASKED
    sums[: rows * LANES] = 0
    for r in range(rows):
        start = ((token + r // group) * heads + head * group + r % group) * size
        if queries.itemsize == q.itemsize:
            for i in range(size):
                queries[r * size + i] = q[start + i]
        else:
            for i in range(size):
                store(queries, r * size + i, load(q, start + i))
    end = position + count
    begin = max(0, position - window + 1) if window else 0
    words = size * keys.itemsize // 4
    last = (end + BLOCK_SIZE - 1) // BLOCK_SIZE
    for j in range(begin // BLOCK_SIZE, last):
        base = (tables[table + j] * kv_heads + head) * BLOCK_SIZE
        ahead = -1
        if j + 1 < last:
            ahead = tables[table + j + 1] * kv_heads + head
        elif following >= 0:
            ahead = _first_block(following, tables, tiles, kv_heads, width, window)
        for panel in range(_KEY_PANELS):
            _fetch(keys, values, ahead, size, padded, panel)
            first = panel * COLUMNS
            key = (base + first) * size
            _products(rows, queries, size, keys, key, zeros, words, scores, first, BLOCK_SIZE)
        _fetch(keys, values, ahead, size, padded, _KEY_PANELS)
        for r in range(rows):
            here = position + r // group - j * BLOCK_SIZE
            first = here - window + 1 if window else 0
            _softmax(scores, weights, r, first, here + 1, scale, peaks, sums, alphas)
        there = min(BLOCK_SIZE, end - j * BLOCK_SIZE)
        _weigh(
            weights, keys, values, base * padded, mixed, alphas, rows, there, size, padded, zeros, part, ahead
        )
    for r in range(rows):
        start = ((token + r // group) * heads + head * group + r % group) * size
        total = vreduce_add(vload(sums, r * LANES))
        for i in range(size):
            store(out, start + i, rounded(mixed[r * padded + i] / total, q, out))


@inlined
def _attention_loop(pointer, dtype, inputs):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (18,), np.int64)
    items, heads, kv_heads, size, padded = a[1], a[8], a[9], a[10], a[11]
    blocks, sequences, width = a[12], a[13], a[14]
    q = array(a[2], a[15] * heads * size, dtype)
    keys = array(a[3], blocks * kv_heads * size * BLOCK_SIZE, dtype)
    values = array(a[4], blocks * kv_heads * padded * BLOCK_SIZE, dtype)
    out = array(a[5], a[15] * heads * size, dtype)
    tables = array(a[6], sequences * width, np.int64)
    tiles = array(a[7], items // kv_heads * 4, np.int64)
    room = attention_scratch(heads // kv_heads, size, padded, inputs)
    amx.configure()
    while True:
        item = take(a, 0)
        if item >= items:
            break
        attend(
            item, -1, q, keys, values, out, tables, tiles, heads, kv_heads, size, padded, width,
            a[16], as_float(a[17]), room,
        )  # fmt: skip
    amx.release()


def attention_f32(pointer):  # type: ignore[no-untyped-def]
    """`attend` of all tiles, float32."""
    _attention_loop(pointer, np.float32, np.float32)


def attention_bf16(pointer):  # type: ignore[no-untyped-def]
    """`attend` of all tiles, bfloat16."""
    _attention_loop(pointer, np.uint16, INPUTS)
