"""The cosines and sines that rotary embeddings turn queries and keys by."""

from __future__ import annotations

import threading

import torch

from daskllm.models import DecoderConfig
from daskllm.models.rope import inverse_frequencies

__all__ = ["Angles"]

_FIRST = 1024


class Angles:
    """cos and sin of every position so far asked for, float32 ``[positions, head_dim / 2]``.

    Angles are float32 products, as transformers has them, and their cosines are taken in float64: a vector
    and a scalar float32 cosine differ in the last bit, and which one an element gets depends on how long the
    table is and how many threads fill it.
    """

    def __init__(self, config: DecoderConfig, device: str) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._rotary = config.rope is not None
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.rope is not None:
            frequencies, self._factor = inverse_frequencies(
                config.rope, config.head_dim, config.max_positions
            )
            self._frequencies = torch.from_numpy(frequencies)

    def _made(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._frequencies
        cos, sin = (f(angles.double()) * self._factor for f in (torch.cos, torch.sin))
        return cos.float().to(self._device), sin.float().to(self._device)

    def upto(self, positions: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tables, at least ``positions`` long; None for a model without rotary positions."""
        if not self._rotary:
            return None
        with self._lock:
            # Made by who runs the layers: OpenMP threads of whoever opens the model would stay beside theirs.
            known = 0 if self._table is None else self._table[0].shape[0]
            if self._table is None or known < positions:
                self._table = self._made(max(positions, 2 * known, _FIRST))
            return self._table
