"""All decoder layers of a step in one call, with int8 weights; see `daskllm.engine.kernels.cpu.stack`.

What a product reads is quantised row by row, in the phase that made it or in one of its own behind attention.
The numbers are those of the operations called one by one, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from daskllm.engine.batch import Batch
from daskllm.engine.kernels.cpu import amx
from daskllm.engine.kernels.cpu.attention import attention_scratch
from daskllm.engine.kernels.cpu.int8 import (
    PackedInt8,
    padded_inputs,
    padded_rows,
    panels_of,
    product,
    product_scratch,
    quantise_row,
)
from daskllm.engine.kernels.cpu.rows import activate_row, norm_row
from daskllm.engine.kernels.cpu.simd import LANES, array, as_float
from daskllm.engine.kernels.cpu.stack import (
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
    KV_HEADS,
    LAYER_FIELDS,
    LAYER_NORM,
    LAYERS,
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
    SIZE,
    TABLE_AT,
    TEAM_AT,
    TIMES_AT,
    YIELD_AT,
    Stack,
    attention,
    rope,
)
from daskllm.engine.kernels.cpu.stack import FIELDS as STACK_FIELDS
from daskllm.engine.kernels.cpu.team import (
    LINE,
    Kernel,
    address,
    begin,
    meet,
    neighbours,
    take,
    team_size,
    together,
)
from daskllm.engine.kernels.cpu.vnni import TILE_ROWS

__all__ = ["StackInt8", "stack_loop"]

PHASES = ("norm", "qkv", "rope", "attention", "quantise", "o", "norm", "mlp", "activation", "down")
"""What the team does in each layer, in order."""

# Fields of a step's arguments behind `stack`'s: a product's quantised inputs, the MLP before its activation.
INT8_AT, SCALES_AT, MINUS_AT, WIDE_AT, FIELDS = range(STACK_FIELDS, STACK_FIELDS + 5)


@numba.njit
def _inputs(a, size):  # type: ignore[no-untyped-def]
    """Room for quantised rows of so many inputs."""
    rows = a[ROWS_] + TILE_ROWS - 1
    return (
        array(a[INT8_AT], rows * padded_inputs(size), np.int8),
        array(a[SCALES_AT], rows, np.float32),
        array(a[MINUS_AT], rows, np.int32),
    )


@numba.njit
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


@numba.njit
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


@numba.njit
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


@numba.njit
def _product(a, phase, counters, table, at, size, y_at, out, scratch, dtype):  # type: ignore[no-untyped-def]
    rows, chunks, sixteens = a[ROWS_], a[CHUNKS], table[at + 3]
    panels, channels, quads = panels_of(sixteens), sixteens * LANES, padded_inputs(size) // 4
    q, scales, minus = _inputs(a, size)
    w, w_scales = array(table[at], channels * 4 * quads, np.uint8), array(table[at + 2], channels, np.float32)
    bias = array(table[at + 1], channels if table[at + 1] else 0, np.float32)
    y = array(y_at, rows * out, dtype)
    group = together(rows, panels)
    groups = (panels + group - 1) // group
    while True:
        item = take(counters, phase * LINE)
        if item >= groups * chunks:
            break
        first, last = item // groups * rows // chunks, (item // groups + 1) * rows // chunks
        begin = item % groups * group
        for panel in range(begin, min(begin + group, panels)):
            product(panel, first, last, q, scales, minus, w, w_scales, bias, y, out, sixteens, quads, scratch)


@numba.njit(inline="always")
def stack_loop(pointer, dtype, rope, attention, attention_scratch):  # type: ignore[no-untyped-def]
    """As `daskllm.engine.kernels.cpu.stack.stack_loop`."""
    a = numba.carray(pointer, (FIELDS,), np.int64)
    counters = array(a[COUNTERS_AT], a[LAYERS] * len(PHASES) * LINE, np.int64)
    clock, times = array(a[CLOCK_AT], 1, np.int64), array(a[TIMES_AT], len(PHASES), np.int64)
    table = array(a[TABLE_AT], a[LAYERS] * LAYER_FIELDS, np.int64)
    team = team_size(a[TEAM_AT])
    begin(clock)
    heads, kv_heads, size = a[HEADS], a[KV_HEADS], a[SIZE]
    tile = product_scratch()
    lanes = np.zeros(max(size, LANES), np.float32)
    scratch = attention_scratch(heads // kv_heads, size, a[PADDED], dtype)
    hidden, inner, give_way = a[HIDDEN], a[INNER], a[YIELD_AT]
    amx.configure()
    for layer in range(a[LAYERS]):
        at, phase = layer * LAYER_FIELDS, layer * len(PHASES)
        delta, y = a[DELTA_AT] if layer else 0, a[DELTA_AT]
        _norm(a, phase, counters, delta, table[at + INPUT_NORM], table[at + INPUT_BIAS], dtype)
        meet(counters, phase, team, give_way, clock, times, 0)
        width = (heads + 2 * kv_heads) * size
        _product(a, phase + 1, counters, table, at + QKV, hidden, a[QKV_AT], width, tile, dtype)
        meet(counters, phase + 1, team, give_way, clock, times, 1)
        rope(a, phase + 2, counters, table, at, lanes, dtype)
        meet(counters, phase + 2, team, give_way, clock, times, 2)
        attention(a, phase + 3, counters, table, at, scratch, dtype)
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


@Kernel
def _stack_f32(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.float32, rope, attention, attention_scratch)


@Kernel
def _stack_bf16(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.uint16, rope, attention, attention_scratch)


class StackInt8(Stack):
    """As `Stack`, of layers whose weights are int8."""

    phases = PHASES
    kernels = (_stack_f32, _stack_bf16)

    def _arguments(
        self, hidden: torch.Tensor, batch: Batch, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> np.ndarray[Any, Any]:
        room = self._buffers(hidden.shape[0])
        a = np.zeros(FIELDS, np.int64)
        a[:STACK_FIELDS] = super()._arguments(hidden, batch, angles)
        a[INT8_AT:FIELDS] = [room[name].data_ptr() for name in ("int8", "scales", "minus", "wide")]
        return a

    def _made(self, rows: int) -> dict[str, torch.Tensor]:
        config, room = self._config, padded_rows(rows)
        widest = max(config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
        return {
            **super()._made(rows),
            "int8": torch.empty((room, padded_inputs(widest)), dtype=torch.int8),
            "scales": torch.empty(room),
            "minus": torch.empty(room, dtype=torch.int32),
            "wide": torch.empty((rows, config.intermediate_size * (1 + config.gated)), dtype=self._dtype),
        }

    @staticmethod
    def _packed_fields(weight: PackedInt8) -> Sequence[int]:
        return weight.weight.data_ptr(), address(weight.bias), weight.scales.data_ptr(), len(weight.weight)
