"""The layers of a step, as each thread of the team goes through them; see `daskllm.engine.kernels.cpu.stack`.

Threads take shares of a phase and wait for each other behind it. The phases of other weights and caches
(`stack_int8`, `stack_kv8`) take the place of those here.
"""

from __future__ import annotations

import numba
import numpy as np

from daskllm.engine.kernels.cpu.code import amx
from daskllm.engine.kernels.cpu.code.attention import attend, attention_scratch
from daskllm.engine.kernels.cpu.code.gemm import (
    INPUTS,
    PARTS,
    ahead_of,
    product,
    rows_together,
    tile,
    tiles_of,
)
from daskllm.engine.kernels.cpu.code.memory import array, as_float, cleared, workspace
from daskllm.engine.kernels.cpu.code.rope import rope_row
from daskllm.engine.kernels.cpu.code.rows import activate_row, norm_row
from daskllm.engine.kernels.cpu.code.simd import compiled, inlined
from daskllm.engine.kernels.cpu.code.team import (
    begin,
    fetched_by,
    meet,
    neighbours,
    take,
    team_size,
    together,
)
from daskllm.engine.kernels.cpu.fields import (
    ACTIVATION,
    ANGLES,
    BLOCKS,
    CHUNKS,
    CLOCK_AT,
    COS_AT,
    COUNTERS_AT,
    DELTA_AT,
    DOWN,
    EPS,
    FIELDS,
    GATED,
    HEADS,
    HIDDEN,
    INNER,
    INNER_AT,
    INPUT_BIAS,
    INPUT_NORM,
    K_NORM,
    KEYS,
    KV_HEADS,
    LAYER_FIELDS,
    LAYER_NORM,
    LAYERS,
    LINE,
    MIXED_AT,
    MLP,
    NORMED_AT,
    OUT,
    PADDED,
    PHASES,
    POSITIONS_AT,
    POST_BIAS,
    POST_NORM,
    Q_AT,
    Q_NORM,
    QKV,
    QKV_AT,
    RESIDUAL_AT,
    ROWS_,
    SCALE,
    SIN_AT,
    SIZE,
    SLOTS_AT,
    TABLE_AT,
    TABLES_AT,
    TEAM_AT,
    TILES,
    TILES_AT,
    TIMES_AT,
    VALUES,
    WIDTH,
    WINDOW,
    YIELD_AT,
)
from daskllm.engine.kernels.cpu.registers import COLUMNS, LANES, ROWS
from daskllm.engine.sizes import BLOCK_SIZE

__all__ = ["attention", "rope", "stack_bf16", "stack_f32", "stack_loop"]


@compiled
def _norm(a, phase, counters, delta_at, weight_at, bias_at, dtype, inputs):  # type: ignore[no-untyped-def]
    rows, size = a[ROWS_], a[HIDDEN]
    residual, out = array(a[RESIDUAL_AT], rows * size, dtype), array(a[NORMED_AT], rows * size, inputs)
    delta = array(delta_at, rows * size if delta_at else 0, dtype)
    weight, bias = array(weight_at, size, dtype), array(bias_at, size if bias_at else 0, dtype)
    many = neighbours(rows)
    while True:
        first = take(counters, phase * LINE) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            norm_row(row, delta, residual, out, weight, bias, size, as_float(a[EPS]), a[LAYER_NORM] != 0)


@compiled
def _product(  # type: ignore[no-untyped-def]
    a, phase, counters, table, at, x_at, x_size, y_at, y_size, spare, dtype, inputs
):  # fmt: skip
    rows, panels = a[ROWS_], table[at + 3]
    x, y = array(x_at, rows * x_size, inputs), array(y_at, rows * y_size, dtype)
    w = array(table[at], panels * COLUMNS * x_size, dtype)
    words = x_size * w.itemsize // 4
    bias, places = (
        array(table[at + 1], panels * COLUMNS, np.float32),
        array(table[at + 2], 2 * panels, np.int64),
    )
    group, team = together(rows, panels), team_size(a[TEAM_AT])
    groups = (panels + group - 1) // group
    while True:
        item = take(counters, phase * LINE)
        if item >= groups * a[CHUNKS]:
            break
        first = item // groups * rows // a[CHUNKS]
        last = (item // groups + 1) * rows // a[CHUNKS]
        part, into = x[first * x_size : last * x_size], y[first * y_size : last * y_size]
        begin = item % groups * group
        for panel in range(begin, min(begin + group, panels)):
            place, count = places[2 * panel], places[2 * panel + 1]
            product(
                panel, last - first, part, x_size, w, bias, place, count, words, into, y_size, spare, team
            )  # fmt: skip


@compiled
def _mlp(a, phase, counters, table, at, spare, scratch, dtype, inputs):  # type: ignore[no-untyped-def]
    """Gate and up, panel by panel, and their activation while they are in the cache."""
    rows, size, panels, gated = a[ROWS_], a[HIDDEN], table[at + 3], a[GATED]
    x, y = array(a[NORMED_AT], rows * size, inputs), array(a[INNER_AT], rows * a[INNER], inputs)
    w = array(table[at], panels * COLUMNS * size, dtype)
    words = size * w.itemsize // 4
    bias, places = (
        array(table[at + 1], panels * COLUMNS, np.float32),
        array(table[at + 2], 2 * panels, np.int64),
    )
    each = panels // (1 + gated)
    group, team = together(rows, each), team_size(a[TEAM_AT])
    groups = (each + group - 1) // group
    while True:
        item = take(counters, phase * LINE)
        if item >= groups * a[CHUNKS]:
            break
        first, last = item // groups * rows // a[CHUNKS], (item // groups + 1) * rows // a[CHUNKS]
        begin = item % groups * group
        for panel in range(begin, min(begin + group, each)):
            row, number, tiles, ahead = first, 0, tiles_of(last - first), ahead_of(last - first, w)
            while row < last:
                many = rows_together(last - row, x)
                for half in range(1 + gated):
                    p = panel + half * each
                    fetched = fetched_by(
                        number, tiles, PARTS, p, team, (1 + half) * each, size * COLUMNS, ahead
                    )  # fmt: skip
                    tile(many, x, row * size, size, w, p * size * COLUMNS, bias, p * COLUMNS, words, spare,
                         half * COLUMNS, 2 * COLUMNS, row == first, fetched)  # fmt: skip
                for r in range(many):
                    to = (row + r) * a[INNER] + places[2 * panel]
                    columns = places[2 * panel + 1]
                    activate_row(
                        spare, r * 2 * COLUMNS, gated * COLUMNS, y, to, columns, a[ACTIVATION], scratch
                    )
                row += many
                number += 1


@compiled
def rope(a, phase, counters, table, layer, scratch, dtype):  # type: ignore[no-untyped-def]
    """The phase in which keys and values are stored."""
    rows, heads, kv_heads, size, padded = a[ROWS_], a[HEADS], a[KV_HEADS], a[SIZE], a[PADDED]
    qkv = array(a[QKV_AT], rows * (heads + 2 * kv_heads) * size, dtype)
    q = array(a[Q_AT], rows * heads * size, dtype)
    keys, values = _cache(a, table, layer, dtype)
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
                row, qkv, q, keys, values, positions, slots, cos, sin, q_norm, k_norm, as_float(a[EPS]),
                heads, kv_heads, size, padded, scratch,
            )  # fmt: skip


@compiled
def attention(a, phase, counters, table, layer, scratch, dtype, mixed):  # type: ignore[no-untyped-def]
    """The phase in which rows attend."""
    rows, heads, kv_heads, size, padded = a[ROWS_], a[HEADS], a[KV_HEADS], a[SIZE], a[PADDED]
    q, out = array(a[Q_AT], rows * heads * size, dtype), array(a[MIXED_AT], rows * heads * size, mixed)
    keys, values = _cache(a, table, layer, dtype)
    # No tensor of a step is longer than its rows times its widest block table.
    tables, tiles = array(a[TABLES_AT], rows * a[WIDTH], np.int64), array(a[TILES_AT], 4 * a[TILES], np.int64)
    # One thread takes a tile's heads where there are tiles for all: it knows what it will read next.
    many = kv_heads if a[TILES] >= 4 * team_size(a[TEAM_AT]) else 1
    while True:
        first = take(counters, phase * LINE) * many
        if first >= a[TILES] * kv_heads:
            break
        for item in range(first, first + many):
            following = item + 1 if item + 1 < first + many else -1
            attend(
                item, following, q, keys, values, out, tables, tiles, heads, kv_heads, size, padded,
                a[WIDTH], table[layer + WINDOW], as_float(a[SCALE]), scratch,
            )  # fmt: skip


@compiled
def _cache(a, table, layer, dtype):  # type: ignore[no-untyped-def]
    tokens = a[BLOCKS] * a[KV_HEADS] * BLOCK_SIZE
    return array(table[layer + KEYS], tokens * a[SIZE], dtype), array(
        table[layer + VALUES], tokens * a[PADDED], dtype
    )


@inlined
def stack_loop(pointer, dtype, inputs, rope, attention, attention_scratch):  # type: ignore[no-untyped-def]
    """All layers of a step, by one thread of the team; the functions are those for the cache's type, and
    ``inputs`` is in which products are given rows."""
    a = numba.carray(pointer, (FIELDS,), np.int64)
    counters = array(a[COUNTERS_AT], a[LAYERS] * len(PHASES) * LINE, np.int64)
    clock, times = array(a[CLOCK_AT], 1, np.int64), array(a[TIMES_AT], len(PHASES), np.int64)
    table = array(a[TABLE_AT], a[LAYERS] * LAYER_FIELDS, np.int64)
    team = team_size(a[TEAM_AT])
    begin(clock)
    heads, kv_heads, size = a[HEADS], a[KV_HEADS], a[SIZE]
    spare = workspace(2 * ROWS * COLUMNS, dtype)
    lanes = cleared(max(size, LANES), np.float32)
    room = attention_scratch(heads // kv_heads, size, a[PADDED], inputs)
    hidden, give_way = a[HIDDEN], a[YIELD_AT]
    amx.configure()
    for layer in range(a[LAYERS]):
        at, phase = layer * LAYER_FIELDS, layer * len(PHASES)
        delta = a[DELTA_AT] if layer else 0
        _norm(a, phase, counters, delta, table[at + INPUT_NORM], table[at + INPUT_BIAS], dtype, inputs)
        meet(counters, phase, team, give_way, clock, times, 0)
        width = (heads + 2 * kv_heads) * size
        _product(
            a,
            phase + 1,
            counters,
            table,
            at + QKV,
            a[NORMED_AT],
            hidden,
            a[QKV_AT],
            width,
            spare,
            dtype,
            inputs,
        )
        meet(counters, phase + 1, team, give_way, clock, times, 1)
        rope(a, phase + 2, counters, table, at, lanes, dtype)
        meet(counters, phase + 2, team, give_way, clock, times, 2)
        attention(a, phase + 3, counters, table, at, room, dtype, inputs)
        meet(counters, phase + 3, team, give_way, clock, times, 3)
        x, y, width = a[MIXED_AT], a[DELTA_AT], heads * size
        _product(a, phase + 4, counters, table, at + OUT, x, width, y, hidden, spare, dtype, inputs)
        meet(counters, phase + 4, team, give_way, clock, times, 4)
        _norm(a, phase + 5, counters, y, table[at + POST_NORM], table[at + POST_BIAS], dtype, inputs)
        meet(counters, phase + 5, team, give_way, clock, times, 5)
        _mlp(a, phase + 6, counters, table, at + MLP, spare, lanes, dtype, inputs)
        meet(counters, phase + 6, team, give_way, clock, times, 6)
        x, width = a[INNER_AT], a[INNER]
        _product(a, phase + 7, counters, table, at + DOWN, x, width, y, hidden, spare, dtype, inputs)
        meet(counters, phase + 7, team, give_way, clock, times, 7)
    amx.release()


def stack_f32(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.float32, np.float32, rope, attention, attention_scratch)


def stack_bf16(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.uint16, INPUTS, rope, attention, attention_scratch)
