"""Decoder layers taken one operation at a time, with whatever operations there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from daskllm.engine.batch import Batch

__all__ = ["Composed"]


class Composed:
    """Consecutive decoder layers with their keys and values, ready to run together.

    Args:
        operations: see `daskllm.engine.kernels`.
        layers: as `daskllm.engine.layers` has them, packed by the same operations.
        keys, values: each layer's cache.
        config: the model's description.
    """

    def __init__(
        self,
        operations: Any,
        layers: Sequence[Any],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        config: Any,
    ) -> None:
        self.operations, self.config = operations, config
        self._layers = list(zip(layers, keys, values, strict=True))

    def __call__(
        self, hidden: torch.Tensor, batch: Batch, angles: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Take a step through the layers.

        Args:
            hidden: the residual stream ``[rows, hidden]``, contiguous; overwritten.
            angles: cos and sin of the positions, float32 ``[positions, head_dim / 2]``.

        Returns:
            What the last layer adds to ``hidden``, ``[rows, hidden]``, valid until the next call.
        """
        ops, config = self.operations, self.config
        delta = None
        for layer, keys, values in self._layers:
            x = self._normed(delta, hidden, layer.input_norm)
            qkv = ops.linear(x, layer.qkv)
            q = ops.rope_store(qkv, keys, values, batch, angles, layer.qk_norms, config.norm_eps)
            mixed = ops.attention(q, keys, values, batch, layer.window, config.attention_scale)
            x = self._normed(ops.linear(mixed, layer.o), hidden, layer.post_norm)
            inner = ops.activate(ops.linear(x, layer.gate_up), config.activation, config.gated)
            delta = ops.linear(inner, layer.down)
        assert delta is not None, "there is at least one layer"
        return delta

    def _normed(self, delta: torch.Tensor | None, hidden: torch.Tensor, norm: Any) -> torch.Tensor:
        return self.operations.add_norm(
            delta, hidden, norm.weight, norm.bias, self.config.norm_eps, self.config.norm
        )
