"""All decoder layers of a step in one call: this room's operations, one after the other, by one team.

A step of a small model is some 250 operations of some 50 µs. Called one by one, each is prepared in Python
and wakes the threads again, which costs as much as the work; here the threads go through all of them and
only wait for each other in between. The numbers are those of the operations called one by one, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from daskllm.engine.batch import Batch
from daskllm.engine.kernels import padded_head_dim
from daskllm.engine.kernels.cpu import registers
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.fields import (
    ACTIVATION,
    ANGLES,
    BLOCKS,
    CHUNKS,
    CLOCK_AT,
    COS_AT,
    COUNTERS_AT,
    DELTA_AT,
    EPS,
    FIELDS,
    GATED,
    HEADS,
    HIDDEN,
    INNER,
    INT8_AT,
    INT8_FIELDS,
    INT8_PHASES,
    KV_HEADS,
    LAYER_NORM,
    LAYERS,
    LINE,
    NORMED_AT,
    PADDED,
    PHASES,
    POSITIONS_AT,
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
    WIDTH,
    YIELD_AT,
    padded_inputs,
)
from daskllm.engine.kernels.cpu.int8 import PackedInt8, padded_rows
from daskllm.engine.kernels.cpu.registers import AMX, SLACK
from daskllm.engine.kernels.cpu.rows import ACTIVATIONS
from daskllm.engine.kernels.cpu.team import TEAM_SIZE, YIELD, address, float_bits, start

__all__ = ["Stack", "StackInt8", "StackInt8KV8", "StackKV8"]

_ROOMS = ("normed", "qkv", "q", "mixed", "inner", "delta")
"""What lies between the operations, in the order of the arguments' fields."""
_READ = ("normed", "mixed", "inner")
"""What products read of it."""
_CHUNK = 256 if AMX else 96
"""Rows that a product takes at a time: few enough to stay in a core's cache while all panels pass. Matrix
registers are so fast that weights read again for more rows cost more than rows read from the second cache."""


def _kernels(module: str) -> tuple[Kernel, Kernel]:
    return Kernel(module, "stack_f32"), Kernel(module, "stack_bf16")


class Stack:
    """As `daskllm.engine.kernels.composed.Composed`.

    Attributes:
        phases: what is done in each layer, in order.
        kernels: for float32 and for bfloat16.
        seconds: spent in each phase so far.
        layers: each layer with its keys and values.
    """

    phases: tuple[str, ...] = PHASES
    kernels = _kernels("stack")

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
        self.seconds += self._cycles * ((time.perf_counter() - began) / max(1, self._cycles.sum()))
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
        if not self._room or len(self._room["delta"]) < rows + SLACK:
            self._room = self._made(rows)
        return self._room

    def _made(self, rows: int) -> dict[str, torch.Tensor]:
        config = self._config
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        qkv = heads + 2 * config.num_kv_heads * config.head_dim
        widths = (hidden, qkv, heads, heads, config.intermediate_size, hidden)
        return {
            name: torch.empty((rows + SLACK, width), dtype=self._read_dtype if name in _READ else self._dtype)
            for name, width in zip(_ROOMS, widths, strict=True)
        }

    @property
    def _read_dtype(self) -> torch.dtype:
        """In which products are given rows."""
        return torch.float32 if registers.WIDENED else self._dtype

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


class StackKV8(Stack):
    """As `Stack`, over a cache in eight bits."""

    kernels = _kernels("stack_kv8")


class StackInt8(Stack):
    """As `Stack`, of layers whose weights are int8."""

    phases = INT8_PHASES
    kernels = _kernels("stack_int8")

    @property
    def _read_dtype(self) -> torch.dtype:
        """In which rows are given to be quantised."""
        return self._dtype

    def _arguments(
        self, hidden: torch.Tensor, batch: Batch, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> np.ndarray[Any, Any]:
        room = self._buffers(hidden.shape[0])
        a = np.zeros(INT8_FIELDS, np.int64)
        a[:FIELDS] = super()._arguments(hidden, batch, angles)
        a[INT8_AT:INT8_FIELDS] = [room[name].data_ptr() for name in ("int8", "scales", "minus", "wide")]
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


class StackInt8KV8(StackInt8):
    """As `StackInt8`, over a cache in eight bits."""

    kernels = _kernels("stack_int8_kv8")


def _norm_fields(norm: Any) -> list[int]:
    return [norm.weight.data_ptr(), address(norm.bias)]
