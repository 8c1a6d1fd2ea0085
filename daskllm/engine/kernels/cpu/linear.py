"""Products with packed weights, by oneDNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["PACKS", "Packed", "linear", "pack"]

PACKS = True


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in oneDNN's own layout; opaque, and a copy of the blocks it was made from."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def pack(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> Packed:
    """Reorder ``[out, in]`` weights once, as one, into the layout that products read fastest."""
    weight = weights[0].contiguous() if len(weights) == 1 else torch.cat(tuple(weights))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return Packed(packed, None if biases is None else torch.cat(tuple(biases)))


def linear(x: torch.Tensor, weight: Packed) -> torch.Tensor:
    """x @ weight.T + bias, ``[rows, in] -> [rows, out]``."""
    alone = x.shape[0] == 1 and x.dtype == torch.float32
    if alone:  # a single float32 row takes another path in oneDNN, with other bits
        x = x.expand(2, -1).contiguous()
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], "")
    return y[:1] if alone else y
