"""All decoder layers of a step in one call: this room's operations, one after the other, by one team.

A step of a small model is some 250 operations of some 50 µs. Called one by one, each is prepared in Python
and wakes the threads again, which costs as much as the work; here the threads go through all of them and
only wait for each other in between. The numbers are those of the operations called one by one, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from daskllm.engine.batch import BLOCK_SIZE, Batch
from daskllm.engine.kernels import padded_head_dim
from daskllm.engine.kernels.cpu import amx
from daskllm.engine.kernels.cpu.attention import attend, attention_scratch
from daskllm.engine.kernels.cpu.gemm import COLUMNS, ROWS, product, rows_together, tile
from daskllm.engine.kernels.cpu.rope import rope_row
from daskllm.engine.kernels.cpu.rows import ACTIVATIONS, activate_row, norm_row
from daskllm.engine.kernels.cpu.simd import LANES, array, as_float
from daskllm.engine.kernels.cpu.team import (
    LINE,
    TEAM_SIZE,
    YIELD,
    Kernel,
    address,
    begin,
    float_bits,
    meet,
    neighbours,
    start,
    take,
    team_size,
    together,
)

__all__ = ["Stack", "attention", "rope", "stack_loop"]

PHASES = ("norm", "qkv", "rope", "attention", "o", "norm", "mlp", "down")
"""What the team does in each layer, in order."""

# Fields of a step's arguments. What ends in _AT is an address.
(
    TEAM_AT, TABLE_AT, COUNTERS_AT, CLOCK_AT, TIMES_AT, LAYERS, ROWS_, TILES, CHUNKS,
    RESIDUAL_AT, NORMED_AT, QKV_AT, Q_AT, MIXED_AT, INNER_AT, DELTA_AT,
    POSITIONS_AT, SLOTS_AT, TABLES_AT, TILES_AT, WIDTH, COS_AT, SIN_AT, ANGLES,
    HIDDEN, HEADS, KV_HEADS, SIZE, PADDED, INNER, BLOCKS, EPS, SCALE, LAYER_NORM, ACTIVATION, GATED, YIELD_AT,
    FIELDS,
) = range(38)  # fmt: skip

# Fields of a layer in the table. A product has four: panels, bias, places, number of panels.
(
    INPUT_NORM, INPUT_BIAS, QKV, QKV_1, QKV_2, QKV_3, Q_NORM, K_NORM, KEYS, VALUES, WINDOW,
    OUT, OUT_1, OUT_2, OUT_3, POST_NORM, POST_BIAS, MLP, MLP_1, MLP_2, MLP_3, DOWN, DOWN_1, DOWN_2, DOWN_3,
    LAYER_FIELDS,
) = range(26)  # fmt: skip

_ROOMS = ("normed", "qkv", "q", "mixed", "inner", "delta")
"""What lies between the operations, in the order of the arguments' fields."""
_CHUNK = 256 if amx.AVAILABLE else 96
"""Rows that a product takes at a time: few enough to stay in a core's cache while all panels pass. Matrix
registers are so fast that weights read again for more rows cost more than rows read from the second cache."""


@numba.njit
def _norm(a, phase, counters, delta_at, weight_at, bias_at, dtype):  # type: ignore[no-untyped-def]
    rows, size = a[ROWS_], a[HIDDEN]
    residual, out = array(a[RESIDUAL_AT], rows * size, dtype), array(a[NORMED_AT], rows * size, dtype)
    delta = array(delta_at, rows * size if delta_at else 0, dtype)
    weight, bias = array(weight_at, size, dtype), array(bias_at, size if bias_at else 0, dtype)
    many = neighbours(rows)
    while True:
        first = take(counters, phase * LINE) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            norm_row(row, delta, residual, out, weight, bias, size, as_float(a[EPS]), a[LAYER_NORM] != 0)


@numba.njit
def _product(a, phase, counters, table, at, x_at, x_size, y_at, y_size, spare, dtype):  # type: ignore[no-untyped-def]
    rows, panels = a[ROWS_], table[at + 3]
    x, y = array(x_at, rows * x_size, dtype), array(y_at, rows * y_size, dtype)
    words = x_size * x.itemsize // 4
    w = array(table[at], panels * COLUMNS * x_size, dtype)
    bias, places = (
        array(table[at + 1], panels * COLUMNS, np.float32),
        array(table[at + 2], 2 * panels, np.int64),
    )
    group = together(rows, panels)
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
            product(panel, last - first, part, x_size, w, bias, places, words, into, y_size, spare)


@numba.njit
def _mlp(a, phase, counters, table, at, spare, scratch, dtype):  # type: ignore[no-untyped-def]
    """Gate and up, panel by panel, and their activation while they are in the cache."""
    rows, size, panels, gated = a[ROWS_], a[HIDDEN], table[at + 3], a[GATED]
    x, y = array(a[NORMED_AT], rows * size, dtype), array(a[INNER_AT], rows * a[INNER], dtype)
    words = size * x.itemsize // 4
    w = array(table[at], panels * COLUMNS * size, dtype)
    bias, places = (
        array(table[at + 1], panels * COLUMNS, np.float32),
        array(table[at + 2], 2 * panels, np.int64),
    )
    each = panels // (1 + gated)
    group = together(rows, each)
    groups = (each + group - 1) // group
    while True:
        item = take(counters, phase * LINE)
        if item >= groups * a[CHUNKS]:
            break
        first, last = item // groups * rows // a[CHUNKS], (item // groups + 1) * rows // a[CHUNKS]
        begin = item % groups * group
        for panel in range(begin, min(begin + group, each)):
            row = first
            while row < last:
                many = rows_together(last - row, x)
                for half in range(1 + gated):
                    p = panel + half * each
                    tile(many, x, row * size, size, w, p * size * COLUMNS, bias, p * COLUMNS, words,
                         spare, half * COLUMNS, 2 * COLUMNS, row == first)  # fmt: skip
                for r in range(many):
                    to = (row + r) * a[INNER] + places[2 * panel]
                    columns = places[2 * panel + 1]
                    activate_row(
                        spare, r * 2 * COLUMNS, gated * COLUMNS, y, to, columns, a[ACTIVATION], scratch
                    )
                row += many


@numba.njit
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


@numba.njit
def attention(a, phase, counters, table, layer, scratch, dtype):  # type: ignore[no-untyped-def]
    """The phase in which rows attend."""
    rows, heads, kv_heads, size, padded = a[ROWS_], a[HEADS], a[KV_HEADS], a[SIZE], a[PADDED]
    q, out = array(a[Q_AT], rows * heads * size, dtype), array(a[MIXED_AT], rows * heads * size, dtype)
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


@numba.njit
def _cache(a, table, layer, dtype):  # type: ignore[no-untyped-def]
    tokens = a[BLOCKS] * a[KV_HEADS] * BLOCK_SIZE
    return array(table[layer + KEYS], tokens * a[SIZE], dtype), array(
        table[layer + VALUES], tokens * a[PADDED], dtype
    )


@numba.njit(inline="always")
def stack_loop(pointer, dtype, rope, attention, attention_scratch):  # type: ignore[no-untyped-def]
    """All layers of a step, by one thread of the team; the functions are those for the cache's type."""
    a = numba.carray(pointer, (FIELDS,), np.int64)
    counters = array(a[COUNTERS_AT], a[LAYERS] * len(PHASES) * LINE, np.int64)
    clock, times = array(a[CLOCK_AT], 1, np.int64), array(a[TIMES_AT], len(PHASES), np.int64)
    table = array(a[TABLE_AT], a[LAYERS] * LAYER_FIELDS, np.int64)
    team = team_size(a[TEAM_AT])
    begin(clock)
    heads, kv_heads, size = a[HEADS], a[KV_HEADS], a[SIZE]
    spare = np.empty(2 * ROWS * COLUMNS, dtype)
    lanes = np.zeros(max(size, LANES), np.float32)
    scratch = attention_scratch(heads // kv_heads, size, a[PADDED], dtype)
    hidden, give_way = a[HIDDEN], a[YIELD_AT]
    amx.configure()
    for layer in range(a[LAYERS]):
        at, phase = layer * LAYER_FIELDS, layer * len(PHASES)
        delta = a[DELTA_AT] if layer else 0
        _norm(a, phase, counters, delta, table[at + INPUT_NORM], table[at + INPUT_BIAS], dtype)
        meet(counters, phase, team, give_way, clock, times, 0)
        width = (heads + 2 * kv_heads) * size
        _product(
            a, phase + 1, counters, table, at + QKV, a[NORMED_AT], hidden, a[QKV_AT], width, spare, dtype
        )
        meet(counters, phase + 1, team, give_way, clock, times, 1)
        rope(a, phase + 2, counters, table, at, lanes, dtype)
        meet(counters, phase + 2, team, give_way, clock, times, 2)
        attention(a, phase + 3, counters, table, at, scratch, dtype)
        meet(counters, phase + 3, team, give_way, clock, times, 3)
        x, y, width = a[MIXED_AT], a[DELTA_AT], heads * size
        _product(a, phase + 4, counters, table, at + OUT, x, width, y, hidden, spare, dtype)
        meet(counters, phase + 4, team, give_way, clock, times, 4)
        _norm(a, phase + 5, counters, y, table[at + POST_NORM], table[at + POST_BIAS], dtype)
        meet(counters, phase + 5, team, give_way, clock, times, 5)
        _mlp(a, phase + 6, counters, table, at + MLP, spare, lanes, dtype)
        meet(counters, phase + 6, team, give_way, clock, times, 6)
        _product(a, phase + 7, counters, table, at + DOWN, a[INNER_AT], a[INNER], y, hidden, spare, dtype)
        meet(counters, phase + 7, team, give_way, clock, times, 7)
    amx.release()


@Kernel
def _stack_f32(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.float32, rope, attention, attention_scratch)


@Kernel
def _stack_bf16(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.uint16, rope, attention, attention_scratch)


class Stack:
    """As `daskllm.engine.kernels.composed.Composed`.

    Attributes:
        phases: what is done in each layer, in order.
        kernels: for float32 and for bfloat16.
        seconds: spent in each phase so far.
        layers: each layer with its keys and values.
    """

    phases: tuple[str, ...] = PHASES
    kernels = (_stack_f32, _stack_bf16)

    def __init__(
        self, layers: Sequence[Any], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], config: Any
    ) -> None:
        count = len(self.phases)
        self.seconds = np.zeros(count)
        self._cycles, self._clock = np.zeros(count, np.int64), np.zeros(1, np.int64)
        self.layers = list(zip(layers, keys, values, strict=True))  # what the table points to
        rows = [self._fields(*each) for each in self.layers]
        self._table = np.array(rows, np.int64).reshape(-1)
        self._config, self._dtype = config, layers[0].input_norm.weight.dtype
        self._counters = np.zeros(len(layers) * count * LINE, np.int64)
        self._room: dict[str, torch.Tensor] = {}
        self._same = self._constants()

    def __call__(
        self, hidden: torch.Tensor, batch: Batch, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        self._counters[:] = self._cycles[:] = self._clock[:] = 0
        a = self._arguments(hidden, batch, angles)
        began = time.perf_counter()
        start(self.kernel(self._dtype), a, torch.get_num_threads())
        self.seconds += self._cycles * ((time.perf_counter() - began) / self._cycles.sum())
        return self._room["delta"][: hidden.shape[0]]

    @classmethod
    def kernel(cls, dtype: torch.dtype) -> Kernel:
        """What a step runs."""
        single, half = cls.kernels
        return single if dtype == torch.float32 else half

    def _constants(self) -> np.ndarray[Any, Any]:
        """The arguments that are the same in every step."""
        config, (_, keys, _) = self._config, self.layers[0]
        a = np.zeros(FIELDS, np.int64)
        a[[TEAM_AT, YIELD_AT, TABLE_AT, COUNTERS_AT, CLOCK_AT, TIMES_AT]] = (
            TEAM_SIZE,
            YIELD,
            *(one.ctypes.data for one in (self._table, self._counters, self._clock, self._cycles)),
        )
        a[[LAYERS, HIDDEN, INNER]] = len(self.layers), config.hidden_size, config.intermediate_size
        a[[HEADS, KV_HEADS]] = config.num_heads, config.num_kv_heads
        a[[SIZE, PADDED, BLOCKS]] = config.head_dim, padded_head_dim(config.head_dim), keys.shape[0]
        a[[EPS, SCALE]] = float_bits(config.norm_eps), float_bits(config.attention_scale)
        a[[LAYER_NORM, ACTIVATION, GATED]] = (
            config.norm == "layer",
            ACTIVATIONS[config.activation],
            config.gated,
        )
        return a

    def _arguments(
        self, hidden: torch.Tensor, batch: Batch, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> np.ndarray[Any, Any]:
        rows = hidden.shape[0]
        room = self._buffers(rows)
        cos, sin = angles or (None, None)
        a = self._same.copy()
        a[[ROWS_, TILES, CHUNKS]] = rows, len(batch.tiles), -(-rows // _CHUNK)
        a[RESIDUAL_AT] = hidden.data_ptr()
        a[NORMED_AT : DELTA_AT + 1] = [room[name].data_ptr() for name in _ROOMS]
        a[[POSITIONS_AT, SLOTS_AT, TABLES_AT, TILES_AT]] = [
            one.data_ptr() for one in (batch.positions, batch.slots, batch.tables, batch.tiles)
        ]
        a[[WIDTH, COS_AT, SIN_AT]] = batch.tables.shape[1], address(cos), address(sin)
        a[ANGLES] = 0 if cos is None else len(cos)
        return a

    def _buffers(self, rows: int) -> dict[str, torch.Tensor]:
        """What lies between the operations, for so many rows; kept, since fresh memory costs page faults."""
        if not self._room or len(self._room["delta"]) < rows + amx.SLACK:
            self._room = self._made(rows)
        return self._room

    def _made(self, rows: int) -> dict[str, torch.Tensor]:
        config = self._config
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        qkv = heads + 2 * config.num_kv_heads * config.head_dim
        widths = (hidden, qkv, heads, heads, config.intermediate_size, hidden)
        return {
            name: torch.empty((rows + amx.SLACK, width), dtype=self._dtype)
            for name, width in zip(_ROOMS, widths, strict=True)
        }

    def _fields(self, layer: Any, keys: torch.Tensor, values: torch.Tensor) -> list[int]:
        """A layer's row of the table."""
        norms = layer.qk_norms or (None, None)
        return [
            *_norm_fields(layer.input_norm),
            *self._packed_fields(layer.qkv),
            *map(address, norms),
            keys.data_ptr(),
            values.data_ptr(),
            layer.window or 0,
            *self._packed_fields(layer.o),
            *_norm_fields(layer.post_norm),
            *self._packed_fields(layer.gate_up),
            *self._packed_fields(layer.down),
        ]

    @staticmethod
    def _packed_fields(weight: Any) -> Sequence[int]:
        panels, bias, places = weight.panels, weight.bias, weight.places
        return panels.data_ptr(), bias.data_ptr(), places.data_ptr(), len(places)


def _norm_fields(norm: Any) -> list[int]:
    return [norm.weight.data_ptr(), address(norm.bias)]
