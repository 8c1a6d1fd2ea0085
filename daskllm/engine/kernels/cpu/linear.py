"""Products with packed weights, by oneDNN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Packed", "linear", "pack"]


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in oneDNN's own layout; opaque, and a copy of the block it was made from."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    out_features: int


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Packed:
    """Reorder a ``[out, in]`` weight once, so that every product reads it in the machine's best order."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return Packed(packed, None if bias is None else bias.contiguous(), weight.shape[0])


def linear(x: torch.Tensor, weight: Packed) -> torch.Tensor:
    """x @ weight.T + bias, ``[rows, in] -> [rows, out]``."""
    alone = x.shape[0] == 1 and x.dtype == torch.float32
    if alone:  # a single float32 row takes another path in oneDNN, with other bits
        x = x.expand(2, -1).contiguous()
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
    return y[:1] if alone else y
