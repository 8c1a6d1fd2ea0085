"""What eight bits mean here: whole numbers in -127 … 127 and one float32 scale for each vector.

The scale of a vector is its largest magnitude over 127, so that it depends on that vector alone: a weight's
output channel, an activation's row, a token's key or value of one head. Kernels give these very bits.

A block of the KV cache in eight bits holds, for each head, its numbers and behind them its tokens' scales.
"""

from __future__ import annotations

import torch

from daskllm.engine.sizes import BLOCK_SIZE, SCALE_BYTES

__all__ = ["halves", "quantised"]


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every vector along the last dimension as int8, and the float32 scales, without that dimension.

    >>> whole, scales = quantised(torch.tensor([[1.0, -2.54], [0.0, 0.0]]))
    >>> whole.tolist(), scales.tolist()
    ([[50, -127], [0, 0]], [0.019999999552965164, 0.0])
    """
    x = x.float()
    peak = x.abs().amax(-1)
    most = peak.new_tensor(127)  # a tensor: torch divides a Python number by a reciprocal, rounded twice
    inverse = torch.where(peak > 0, most / peak, 0)
    return (x * inverse.unsqueeze(-1)).round_().to(torch.int8), peak / most


def halves(cache: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers int8 ``[blocks, heads, rows, ...]`` and the scales float32 ``[blocks, heads, tokens]`` of a
    layer's keys or values, as views.

    >>> whole, scales = halves(torch.zeros(7, 2, 32, 68, dtype=torch.int8), 32)
    >>> whole.shape, scales.shape
    (torch.Size([7, 2, 32, 64]), torch.Size([7, 2, 32]))
    """
    flat = cache.flatten(2)
    behind = BLOCK_SIZE * SCALE_BYTES
    whole, scales = flat.split((flat.shape[2] - behind, behind), 2)
    return whole.unflatten(2, (rows, -1)), scales.view(torch.float32)
