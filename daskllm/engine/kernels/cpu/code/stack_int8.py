"""All decoder layers of a step in one call, with int8 weights; see `daskllm.engine.kernels.cpu.code.stack`.

What a product reads is quantised row by row, in the phase that made it or in one of its own behind attention.
The numbers are those of the operations called one by one, to the bit.
"""

from __future__ import annotations

import numba
import numpy as np

from daskllm.engine.kernels.cpu.code import amx
from daskllm.engine.kernels.cpu.code.attention import attention_scratch
from daskllm.engine.kernels.cpu.code.gemm import INPUTS
from daskllm.engine.kernels.cpu.code.int8 import (
    padded_inputs,
    panels_of,
    product,
    product_scratch,
    quantise_row,
)
from daskllm.engine.kernels.cpu.code.memory import array, as_float, cleared
from daskllm.engine.kernels.cpu.code.rows import activate_row, norm_row
from daskllm.engine.kernels.cpu.code.simd import compiled, inlined
from daskllm.engine.kernels.cpu.code.stack import attention, rope
from daskllm.engine.kernels.cpu.code.team import begin, meet, neighbours, take, team_size, together
from daskllm.engine.kernels.cpu.fields import (
    ACTIVATION,
    CHUNKS,
    CLOCK_AT,
    COUNTERS_AT,
    DELTA_AT,
    DOWN,
    EPS,
    GATED,
    HEADS,
    HIDDEN,
    INNER,
    INNER_AT,
    INPUT_BIAS,
    INPUT_NORM,
    INT8_AT,
    INT8_FIELDS,
    INT8_PHASES,
    KV_HEADS,
    LAYER_FIELDS,
    LAYER_NORM,
    LAYERS,
    LINE,
    MINUS_AT,
    MIXED_AT,
    MLP,
    NORMED_AT,
    OUT,
    PADDED,
    POST_BIAS,
    POST_NORM,
    QKV,
    QKV_AT,
    RESIDUAL_AT,
    ROWS_,
    SCALES_AT,
    SIZE,
    TABLE_AT,
    TEAM_AT,
    TIMES_AT,
    WIDE_AT,
    YIELD_AT,
)
from daskllm.engine.kernels.cpu.registers import INT8_ROWS, LANES

__all__ = ["stack_bf16", "stack_f32", "stack_loop"]


@compiled
def _inputs(a, size):  # type: ignore[no-untyped-def]
    """Room for quantised rows of so many inputs."""
    rows = a[ROWS_] + INT8_ROWS - 1
    return (
        array(a[INT8_AT], rows * padded_inputs(size), np.int8),
        array(a[SCALES_AT], rows, np.float32),
        array(a[MINUS_AT], rows, np.int32),
    )


@compiled
def _norm(a, phase, counters, delta_at, weight_at, bias_at, dtype):  # type: ignore[no-untyped-def]
    rows, size = a[ROWS_], a[HIDDEN]
    residual, out = (
        array(a[RESIDUAL_AT], rows * size, dtype),
        array(a[NORMED_AT], rows * size, dtype),
    )
    delta = array(delta_at, rows * size if delta_at else 0, dtype)
    weight, bias = array(weight_at, size, dtype), array(bias_at, size if bias_at else 0, dtype)
    q, scales, minus = _inputs(a, size)
    many = neighbours(rows)
    while True:
        first = take(counters, phase * LINE) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            norm_row(row, delta, residual, out, weight, bias, size, as_float(a[EPS]), a[LAYER_NORM] != 0)
            quantise_row(out, row, size, q, scales, minus)


@compiled
def _quantise(a, phase, counters, x_at, size, dtype):  # type: ignore[no-untyped-def]
    rows = a[ROWS_]
    x = array(x_at, rows * size, dtype)
    q, scales, minus = _inputs(a, size)
    many = neighbours(rows)
    while True:
        first = take(counters, phase * LINE) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            quantise_row(x, row, size, q, scales, minus)


@compiled
def _activation(a, phase, counters, lanes, dtype):  # type: ignore[no-untyped-def]
    rows, size, gated = a[ROWS_], a[INNER], a[GATED]
    width = size * (1 + gated)
    x, y = array(a[WIDE_AT], rows * width, dtype), array(a[INNER_AT], rows * size, dtype)
    q, scales, minus = _inputs(a, size)
    many = neighbours(rows)
    while True:
        first = take(counters, phase * LINE) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            activate_row(x, row * width, gated * size, y, row * size, size, a[ACTIVATION], lanes)
            quantise_row(y, row, size, q, scales, minus)


@compiled
def _product(a, phase, counters, table, at, size, y_at, out, scratch, dtype):  # type: ignore[no-untyped-def]
    rows, chunks, sixteens = a[ROWS_], a[CHUNKS], table[at + 3]
    panels, channels, quads = panels_of(sixteens), sixteens * LANES, padded_inputs(size) // 4
    q, scales, minus = _inputs(a, size)
    w, w_scales = array(table[at], channels * 4 * quads, np.uint8), array(table[at + 2], channels, np.float32)
    bias = array(table[at + 1], channels if table[at + 1] else 0, np.float32)
    y = array(y_at, rows * out, dtype)
    group, team = together(rows, panels), team_size(a[TEAM_AT])
    groups = (panels + group - 1) // group
    while True:
        item = take(counters, phase * LINE)
        if item >= groups * chunks:
            break
        first, last = item // groups * rows // chunks, (item // groups + 1) * rows // chunks
        begin = item % groups * group
        for panel in range(begin, min(begin + group, panels)):
            product(
                panel, first, last, q, scales, minus, w, w_scales, bias, y, out, 0, out, sixteens, quads,
                scratch, team,
            )  # fmt: skip


@inlined
def stack_loop(pointer, dtype, inputs, rope, attention, attention_scratch):  # type: ignore[no-untyped-def]
    """As `daskllm.engine.kernels.cpu.code.stack.stack_loop`."""
    a = numba.carray(pointer, (INT8_FIELDS,), np.int64)
    counters = array(a[COUNTERS_AT], a[LAYERS] * len(INT8_PHASES) * LINE, np.int64)
    clock, times = array(a[CLOCK_AT], 1, np.int64), array(a[TIMES_AT], len(INT8_PHASES), np.int64)
    table = array(a[TABLE_AT], a[LAYERS] * LAYER_FIELDS, np.int64)
    team = team_size(a[TEAM_AT])
    begin(clock)
    heads, kv_heads, size = a[HEADS], a[KV_HEADS], a[SIZE]
    tile = product_scratch()
    lanes = cleared(max(size, LANES), np.float32)
    room = attention_scratch(heads // kv_heads, size, a[PADDED], inputs)
    hidden, inner, give_way = a[HIDDEN], a[INNER], a[YIELD_AT]
    amx.configure()
    for layer in range(a[LAYERS]):
        at, phase = layer * LAYER_FIELDS, layer * len(INT8_PHASES)
        delta, y = a[DELTA_AT] if layer else 0, a[DELTA_AT]
        _norm(a, phase, counters, delta, table[at + INPUT_NORM], table[at + INPUT_BIAS], dtype)
        meet(counters, phase, team, give_way, clock, times, 0)
        width = (heads + 2 * kv_heads) * size
        _product(a, phase + 1, counters, table, at + QKV, hidden, a[QKV_AT], width, tile, dtype)
        meet(counters, phase + 1, team, give_way, clock, times, 1)
        rope(a, phase + 2, counters, table, at, lanes, dtype)
        meet(counters, phase + 2, team, give_way, clock, times, 2)
        attention(a, phase + 3, counters, table, at, room, dtype, dtype)
        meet(counters, phase + 3, team, give_way, clock, times, 3)
        _quantise(a, phase + 4, counters, a[MIXED_AT], heads * size, dtype)
        meet(counters, phase + 4, team, give_way, clock, times, 4)
        _product(a, phase + 5, counters, table, at + OUT, heads * size, y, hidden, tile, dtype)
        meet(counters, phase + 5, team, give_way, clock, times, 5)
        _norm(a, phase + 6, counters, y, table[at + POST_NORM], table[at + POST_BIAS], dtype)
        meet(counters, phase + 6, team, give_way, clock, times, 6)
        width = inner * (1 + a[GATED])
        _product(a, phase + 7, counters, table, at + MLP, hidden, a[WIDE_AT], width, tile, dtype)
        meet(counters, phase + 7, team, give_way, clock, times, 7)
        _activation(a, phase + 8, counters, lanes, dtype)
        meet(counters, phase + 8, team, give_way, clock, times, 8)
        _product(a, phase + 9, counters, table, at + DOWN, inner, y, hidden, tile, dtype)
        meet(counters, phase + 9, team, give_way, clock, times, 9)
    amx.release()


def stack_f32(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.float32, np.float32, rope, attention, attention_scratch)


def stack_bf16(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.uint16, INPUTS, rope, attention, attention_scratch)
