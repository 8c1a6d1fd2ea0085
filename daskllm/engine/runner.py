"""The decoder's forward pass over one ragged batch, for any consecutive run of its layers.

It reads a `DecoderConfig` and the weights of its own layers, and knows no family, no request and no block
table beyond the batch's. A runner with all layers turns tokens into logits; one with some of them takes and
gives the residual stream, which is all that passes between stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from daskllm.engine.batch import Batch
from daskllm.engine.kernels import Kernels
from daskllm.engine.kvcache import KVCache
from daskllm.models import DecoderConfig
from daskllm.models.rope import inverse_frequencies

__all__ = ["Runner", "Weights"]


class Weights(Protocol):
    """Where a runner reads its blocks, each once, layer by layer."""

    def read(self, layer: str, name: str) -> torch.Tensor | None:
        """The block in compute dtype; None where the model has no such block."""

    def packed(self, layer: str, names: Sequence[str]) -> None:
        """Told when kernels hold their own copies of these blocks of a layer."""


_ANGLE_PAGE = 1024
_LOGIT_ROWS = 256  # at a time: float32 logits of a large vocabulary are the widest thing a step makes


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer, packed; q, k, v are one product, and so are gate and up."""

    input_norm: _Norm
    qkv: Any
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: Any
    post_norm: _Norm
    gate_up: Any
    down: Any
    window: int | None


class Runner:
    """Layers ready to run.

    Args:
        config: the whole model's description.
        layers: names of the layers to run, consecutive, as `daskllm.models.layer_names` has them.
        weights: where their blocks are read, once.
        cache: keys and values of the decoder layers among them, in order.
        kernels: the operations.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[str],
        weights: Weights,
        cache: KVCache,
        kernels: Kernels,
        device: str = "cpu",
    ) -> None:
        self.config, self.cache, self.kernels, self.device = config, cache, kernels, device
        self._angles = _Angles(config, device)
        self._embedding = self._positions = self._head_norm = self._head = None
        self._layers: list[_Layer] = []
        for layer in layers:
            if layer == "embed":
                self._embedding = weights.read(layer, "tokens.weight")
                self._positions = weights.read(layer, "positions.weight")
            elif layer == "head":
                self._head_norm = _norm(weights, layer, "norm")
                self._head = self._linear(weights, layer, "lm_head")
            else:
                self._layers.append(self._layer(weights, layer))

    def _linear(self, weights: Weights, layer: str, *names: str) -> Any:
        parts = [_needed(weights, layer, f"{name}.weight") for name in names]
        biases = [b for name in names if (b := weights.read(layer, f"{name}.bias")) is not None]
        packed = self.kernels.pack(parts, biases or None)
        if self.kernels.PACKS:
            weights.packed(layer, [f"{name}.weight" for name in names])
        return packed

    def _layer(self, weights: Weights, layer: str) -> _Layer:
        q_norm, k_norm = weights.read(layer, "q_norm.weight"), weights.read(layer, "k_norm.weight")
        mlp = ("gate", "up") if self.config.gated else ("up",)
        return _Layer(
            input_norm=_norm(weights, layer, "input_norm"),
            qkv=self._linear(weights, layer, "q", "k", "v"),
            qk_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
            o=self._linear(weights, layer, "o"),
            post_norm=_norm(weights, layer, "post_norm"),
            gate_up=self._linear(weights, layer, *mlp),
            down=self._linear(weights, layer, "down"),
            window=self.config.windows[int(layer.split(".")[1])],
        )

    @torch.inference_mode()
    def run(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layers over a batch.

        Args:
            batch: on this runner's device.
            hidden: the residual stream ``[rows, hidden]`` from the layers before; None where "embed" is here.
                It is overwritten.

        Returns:
            float32 logits ``[wanted rows, vocab]`` where "head" is here, else the residual stream.
        """
        config, kernels = self.config, self.kernels
        if hidden is None:
            hidden = self._embed(batch)
        angles = self._angles.upto(int(batch.positions.max()) + 1)
        delta = None
        for layer, keys, values in zip(self._layers, self.cache.keys, self.cache.values, strict=True):
            x = self._normed(delta, hidden, layer.input_norm)
            qkv = kernels.linear(x, layer.qkv)
            q = kernels.rope_store(qkv, keys, values, batch, angles, layer.qk_norms, config.norm_eps)
            mixed = kernels.attention(q, keys, values, batch, layer.window, config.attention_scale)
            x = self._normed(kernels.linear(mixed, layer.o), hidden, layer.post_norm)
            inner = kernels.activate(kernels.linear(x, layer.gate_up), config.activation, config.gated)
            delta = kernels.linear(inner, layer.down)
        if self._head is None:
            return hidden if delta is None else hidden.add_(delta)
        return self._logits(batch, hidden, delta)

    def _embed(self, batch: Batch) -> torch.Tensor:
        assert self._embedding is not None, "a stage without 'embed' needs the hidden states before it"
        hidden = F.embedding(batch.tokens, self._embedding)
        if self._positions is not None:
            hidden += F.embedding(batch.positions, self._positions)
        return hidden

    def _normed(self, delta: torch.Tensor | None, hidden: torch.Tensor, norm: _Norm) -> torch.Tensor:
        return self.kernels.add_norm(
            delta, hidden, norm.weight, norm.bias, self.config.norm_eps, self.config.norm
        )

    def _logits(self, batch: Batch, hidden: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
        assert self._head_norm is not None
        rows = batch.logit_rows
        if not rows.numel():
            return torch.empty((0, self.config.vocab_size))
        x = self._normed(None if delta is None else delta[rows], hidden[rows], self._head_norm)
        parts = [self.kernels.linear(part, self._head).float() for part in x.split(_LOGIT_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _needed(weights: Weights, layer: str, name: str) -> torch.Tensor:
    block = weights.read(layer, name)
    assert block is not None, f"{layer} has no block {name!r}"
    return block


def _norm(weights: Weights, layer: str, name: str) -> _Norm:
    return _Norm(_needed(weights, layer, f"{name}.weight"), weights.read(layer, f"{name}.bias"))


class _Angles:
    """cos and sin of every position so far asked for, float32 ``[positions, head_dim / 2]``.

    Angles are float32 products, as transformers has them, and their cosines are taken in float64: a vector
    and a scalar float32 cosine differ in the last bit, and which one an element gets depends on how long the
    table is and how many threads fill it.
    """

    def __init__(self, config: DecoderConfig, device: str) -> None:
        self._device = device
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.rope is not None:
            frequencies, self._factor = inverse_frequencies(
                config.rope, config.head_dim, config.max_positions
            )
            self._frequencies = torch.from_numpy(frequencies)
            self._grow(_ANGLE_PAGE)

    def _grow(self, positions: int) -> None:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._frequencies
        cos, sin = (f(angles.double()) * self._factor for f in (torch.cos, torch.sin))
        self._table = cos.float().to(self._device), sin.float().to(self._device)

    def upto(self, positions: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tables, at least ``positions`` long; None for a model without rotary positions."""
        if self._table is not None and self._table[0].shape[0] < positions:
            self._grow(max(positions, 2 * self._table[0].shape[0]))
        return self._table
