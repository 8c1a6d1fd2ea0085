"""Products of rows with packed weights: how weights are laid out, and the call.

A weight is packed into panels of `COLUMNS` outputs, so that one step of the inner loop reads one stretch of
memory: for bfloat16 two inputs of every output side by side, for float32 one. `code.gemm` multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from daskllm.blocks.regions import room
from daskllm.engine.kernels.cpu import registers
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.fields import FILL_FIELDS, FILL_TABLE, IN_MEMORY
from daskllm.engine.kernels.cpu.largest import NOT_ASKED, Lanes
from daskllm.engine.kernels.cpu.panels import FILL, panels_of, strips_of
from daskllm.engine.kernels.cpu.registers import AMX, COLUMNS, SLACK
from daskllm.engine.kernels.cpu.team import TEAM_SIZE, run

if TYPE_CHECKING:
    from daskllm.engine.kernels.cpu.int8 import PackedInt8

__all__ = ["Packed", "likeliest", "linear", "linear_kernel", "pack"]

_LINEAR_F32, _LINEAR_BF16, _LOGITS_BF16 = (
    Kernel("gemm", name) for name in ("linear_f32", "linear_bf16", "logits_bf16")
)


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights side by side, in panels.

    Attributes:
        panels: ``[panels, words, COLUMNS, inputs per word]``, zeros beyond the last input and output.
        bias: float32 ``[panels * COLUMNS]``, zeros where there is none.
        places: int64 ``[panels, 2]``: a panel's first column in the product, and how many of its columns are
            real. Each weight begins a panel of its own.
        inputs, outputs: sizes of the product.
    """

    panels: torch.Tensor
    bias: torch.Tensor
    places: torch.Tensor
    inputs: int
    outputs: int

    @property
    def words(self) -> int:
        """Inputs in fours of bytes."""
        return self.panels.shape[1]

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rows of the only weight as they were before it was packed, ``[count, in]``."""
        words = self.panels.view(torch.int32)[..., 0]
        found = words[outputs // COLUMNS, :, outputs % COLUMNS]
        return found.view(self.panels.dtype)[:, : self.inputs].contiguous()


def pack(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    laid: tuple[memoryview, bool] | None = None,
) -> Packed:
    """Lay ``[out, in]`` weights out in panels, once.

    Args:
        laid: memory for the panels, and whether they are there already; None has memory found for them.
    """
    dtype, inputs, outputs = weights[0].dtype, weights[0].shape[1], [len(w) for w in weights]
    per_word = 4 // weights[0].itemsize
    counts, words = [panels_of(n) for n in outputs], -(-inputs // per_word)
    shape = sum(counts), words, COLUMNS, per_word
    panels = room(shape, dtype) if laid is None else torch.frombuffer(laid[0], dtype=dtype).view(shape)
    if laid is None or not laid[1]:
        _lay(weights, panels)
    bias = torch.zeros(sum(counts) * COLUMNS)
    places = np.empty((sum(counts), 2), np.int64)
    first = place = 0
    for i, count in enumerate(counts):
        columns = np.arange(0, outputs[i], COLUMNS)
        places[first : first + count, 0] = place + columns
        places[first : first + count, 1] = np.minimum(COLUMNS, outputs[i] - columns)
        if biases is not None:
            bias[first * COLUMNS :][: outputs[i]] = biases[i]
        first, place = first + count, place + outputs[i]
    return Packed(panels, bias, torch.from_numpy(places), inputs, place)


def _lay(weights: Sequence[torch.Tensor], panels: torch.Tensor) -> None:
    words, strips, to, kept = panels.shape[1], [], panels.data_ptr(), []
    for weight in weights:
        if missing := words * panels.shape[3] - weight.shape[1]:
            weight = F.pad(weight, (0, missing))
        weight = weight.contiguous()
        kept.append(weight)
        strips += strips_of(IN_MEMORY, weight.data_ptr(), len(weight), words, to)
        to += panels_of(len(weight)) * COLUMNS * words * 4
    table = np.array(strips, np.int64)
    run(FILL, len(strips), table.ctypes.data, *[0] * (FILL_FIELDS - FILL_TABLE - 1))


def linear_kernel(given: torch.dtype, made: torch.dtype) -> Kernel:
    """What `linear` runs."""
    if given == torch.float32:
        return _LINEAR_F32
    return _LINEAR_BF16 if made == given else _LOGITS_BF16


def linear(x: torch.Tensor, weight: Packed | PackedInt8, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x @ weight.T + bias, ``[rows, in] -> [rows, out]``; in ``x``'s type, or in float32 if asked."""
    if not isinstance(weight, Packed):
        return weight.product(x, dtype)
    y = torch.empty((x.shape[0], weight.outputs), dtype=dtype or x.dtype)
    _multiply(linear_kernel(x.dtype, y.dtype), x, weight, y.data_ptr(), NOT_ASKED)
    return y


def likeliest(x: torch.Tensor, weight: Packed | PackedInt8) -> torch.Tensor:
    """Where each row of the float32 product is largest, the first of equals: int64 ``[rows]``.

    The product is not kept: of 32 rows and 49,152 outputs it would be 6 MB to be written and read again.
    """
    lanes = Lanes(x.shape[0])
    if isinstance(weight, Packed):
        _multiply(linear_kernel(x.dtype, torch.float32), x, weight, 0, lanes.arguments)
    else:
        weight.multiply(x, torch.float32, 0, lanes.arguments)
    return lanes.outputs()


def _multiply(kernel: Kernel, x: torch.Tensor, weight: Packed, y: int, largest: tuple[int, int, int]) -> None:
    rows = x.shape[0]
    if x.shape[1] % (4 // x.itemsize):
        x = F.pad(x, (0, 1))
    x = x.contiguous()
    if registers.WIDENED:
        x = x.float()
    if AMX and x.dtype == torch.bfloat16:
        x = F.pad(x, (0, 0, 0, SLACK))
    run(
        kernel,
        len(weight.places),
        x.data_ptr(),
        weight.panels.data_ptr(),
        weight.bias.data_ptr(),
        weight.places.data_ptr(),
        y,
        rows,
        x.shape[1],
        weight.words,
        weight.outputs,
        weight.panels.numel(),
        TEAM_SIZE,
        *largest,
    )
