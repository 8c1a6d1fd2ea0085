"""Products with int8 weights: how weights are laid out, and the call.

A row is quantised by a scale of its own and its sums are whole numbers, so that its bits depend neither on
its company nor on the order of additions. Weights are kept 128 higher, as unsigned bytes (the instructions
multiply unsigned by signed), which each row's sum of inputs takes off again. `code.int8` multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from daskllm.blocks.regions import room
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.largest import NOT_ASKED
from daskllm.engine.kernels.cpu.registers import INT8_COLUMNS, INT8_ROWS, LANES
from daskllm.engine.kernels.cpu.team import TEAM_SIZE, address, run
from daskllm.engine.kernels.int8 import quantised

__all__ = ["PackedInt8", "padded_rows", "product_kernels"]

_PANEL = INT8_COLUMNS * LANES
_AT_ONCE = 4096  # channels quantised at once: their float32 form is never large

_QUANTISE_F32, _QUANTISE_BF16, _LINEAR_F32, _LINEAR_BF16 = (
    Kernel("int8", name) for name in ("quantise_f32", "quantise_bf16", "linear_f32", "linear_bf16")
)


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """Weights as uint8 ``[channels / 16, in / 4, 16, 4]``, 128 above what they are, filled up with zeros;
    scales and biases float32 ``[channels]``."""

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    outputs: int

    @property
    def inputs(self) -> int:
        """Of each channel, those that fill it up included."""
        return 4 * self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.weight.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> PackedInt8:
        """Quantise ``[out, in]`` weights, side by side as one, by output channel."""
        out, size = sum(map(len, weights)), weights[0].shape[1]
        channels, inputs = max(_PANEL, -(-out // LANES) * LANES), -(-size // 4) * 4
        whole = torch.full((channels, inputs), 128, dtype=torch.uint8)
        scales = torch.zeros(channels)
        at = 0
        for part in (part for weight in weights for part in weight.split(_AT_ONCE)):
            q, scale = quantised(part)
            whole[at : at + len(q), :size] = q.view(torch.uint8) ^ 128
            scales[at : at + len(q)] = scale
            at += len(q)
        packed = room((channels // LANES, inputs // 4, LANES, 4), torch.uint8)
        packed.copy_(whole.view(channels // LANES, LANES, inputs // 4, 4).transpose(1, 2))
        bias = None
        if biases is not None:
            bias = torch.zeros(channels)
            bias[:out] = torch.cat(tuple(biases))
        return cls(packed, scales, bias, out)

    def product(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x @ weight.T + bias, ``[rows, in] -> [rows, out]``, in the type of ``x`` or another."""
        y = torch.empty((x.shape[0], self.outputs), dtype=dtype or x.dtype)
        self.multiply(x, y.dtype, y.data_ptr(), NOT_ASKED)
        return y

    def multiply(self, x: torch.Tensor, dtype: torch.dtype, y: int, largest: tuple[int, int, int]) -> None:
        """The product to address ``y``, or what is `largest.Lanes` of it."""
        rows, size = x.shape
        x = x.contiguous()
        sixteens, quads = self.weight.shape[:2]
        q = torch.empty((padded_rows(rows), 4 * quads), dtype=torch.int8)
        scales, minus = torch.empty(len(q)), torch.empty(len(q), dtype=torch.int32)
        given = (q.data_ptr(), scales.data_ptr(), minus.data_ptr())
        quantise, product = product_kernels(x.dtype, dtype)
        run(quantise, rows, x.data_ptr(), *given, size, numbers=x.numel())
        run(
            product,
            -(-sixteens // INT8_COLUMNS),
            *given,
            self.weight.data_ptr(),
            self.scales.data_ptr(),
            address(self.bias),
            y,
            rows,
            self.outputs,
            sixteens,
            quads,
            TEAM_SIZE,
            *largest,
        )


def product_kernels(given: torch.dtype, made: torch.dtype) -> tuple[Kernel, Kernel]:
    """What `PackedInt8.product` runs, first on its rows and then on them and its weights."""
    quantise = _QUANTISE_F32 if given == torch.float32 else _QUANTISE_BF16
    return quantise, _LINEAR_F32 if made == torch.float32 else _LINEAR_BF16


def padded_rows(rows: int) -> int:
    """Rows that there must be room for: a tile reads whole ones, wherever it begins."""
    return rows + INT8_ROWS - 1
