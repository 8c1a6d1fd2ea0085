"""What eight bits mean here: whole numbers in -127 … 127 and one float32 scale for each vector.

The scale of a vector is its largest magnitude over 127, so that it depends on that vector alone: a weight's
output channel, an activation's row. Kernels give these very bits.
"""

from __future__ import annotations

import torch

__all__ = ["quantised"]


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
