"""The decoder's forward pass over one ragged batch, for any consecutive run of its layers.

It reads a `DecoderConfig` and its own layers, and knows no family, no request and no block table beyond the
batch's. A runner with all layers turns tokens into the last hidden states of the rows that are wanted, and
those into logits where somebody asks. In each layer the keys and values of all rows are stored before any row
attends: a chunk may read blocks that another chunk of the same step fills. A runner with some of the layers
takes and gives the residual stream, which is all that passes between stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from daskllm.engine.angles import Angles
from daskllm.engine.batch import Batch
from daskllm.engine.kernels import Kernels
from daskllm.engine.kvcache import KVCache
from daskllm.engine.layers import DecoderLayer, Embedding, Head, Layer, Norm
from daskllm.models import DecoderConfig

__all__ = ["LOGIT_ROWS", "Runner"]

LOGIT_ROWS = 256
"""Rows at a time: float32 logits of a large vocabulary are the widest thing a step makes."""


class Runner:
    """Layers ready to run.

    Args:
        config: the whole model's description.
        layers: consecutive ones, in the order in which a token passes them.
        cache: keys and values of the decoder layers among them, in order.
        kernels: the operations.
        angles: of the model's rotary positions.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[Layer],
        cache: KVCache,
        kernels: Kernels,
        angles: Angles,
        device: str = "cpu",
    ) -> None:
        self.config, self.cache, self.kernels, self.device = config, cache, kernels, device
        self._angles = angles
        first, last = layers[0], layers[-1]
        self.embedding = first if isinstance(first, Embedding) else None
        self._head = last if isinstance(last, Head) else None
        decoder = [layer for layer in layers if isinstance(layer, DecoderLayer)]
        self.stack = kernels.stack(decoder, cache.keys, cache.values, config) if decoder else None

    @torch.inference_mode()
    def run(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layers over a batch.

        Args:
            batch: on this runner's device.
            hidden: the residual stream ``[rows, hidden]`` from the layers before; None where "embed" is here.
                It is overwritten.

        Returns:
            The wanted rows behind the model's last norm, ``[wanted, hidden]``, where "head" is here; else the
            residual stream. Both in the type that the model computes in.
        """
        if hidden is None:
            assert self.embedding is not None, "a stage without 'embed' needs the hidden states before it"
            hidden = self.embedding.rows(batch)
        delta = None
        if self.stack is not None:
            angles = self._angles.upto(int(batch.positions.max()) + 1)
            delta = self.stack(hidden, batch, angles)
        if self._head is None:
            return hidden if delta is None else hidden.add_(delta)
        rows = batch.wanted
        if not rows.numel():
            return hidden[:0]
        if len(rows) < len(hidden):  # in a decode step there is nothing to leave out
            delta, hidden = None if delta is None else delta[rows], hidden[rows]
        return self._normed(delta, hidden, self._head.norm)

    @torch.inference_mode()
    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Float32 logits ``[rows, vocab]`` of rows that `run` gave, by the runner that has "head"."""
        assert self._head is not None, "a stage without 'head' has no logits"
        if len(normed) <= LOGIT_ROWS:
            return self.kernels.linear(normed, self._head.lm_head, torch.float32)
        logits = torch.empty((len(normed), self.config.vocab_size), device=normed.device)
        for part, out in zip(normed.split(LOGIT_ROWS), logits.split(LOGIT_ROWS), strict=True):
            out.copy_(self.kernels.linear(part, self._head.lm_head, torch.float32))
        return logits

    @torch.inference_mode()
    def likeliest(self, normed: torch.Tensor) -> torch.Tensor:
        """Where `logits` would be largest, the first of equals: int64 ``[rows]``."""
        assert self._head is not None, "a stage without 'head' has no logits"
        parts = [self.kernels.likeliest(part, self._head.lm_head) for part in normed.split(LOGIT_ROWS)]
        return torch.cat(parts)

    def _normed(self, delta: torch.Tensor | None, hidden: torch.Tensor, norm: Norm) -> torch.Tensor:
        return self.kernels.add_norm(
            delta, hidden, norm.weight, norm.bias, self.config.norm_eps, self.config.norm
        )
