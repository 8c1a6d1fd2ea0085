"""Where each row of a product is largest, without the product: what `code.largest` keeps, and its meaning."""

from __future__ import annotations

import numpy as np
import torch

from daskllm.engine.kernels.cpu.registers import LANES

__all__ = ["NOT_ASKED", "Lanes"]

NOT_ASKED = (0, 0, 0)
"""The arguments of a product that is kept as it is."""


class Lanes:
    """Of each thread and row, the largest outputs that its lanes have seen, and where."""

    def __init__(self, rows: int) -> None:
        shape = (torch.get_num_threads(), rows, LANES)
        self._best, self._where = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.float32)

    @property
    def arguments(self) -> tuple[int, int, int]:
        """For a kernel: both arrays, and a counter by which each thread takes its part of them."""
        return self._best.ctypes.data, self._where.ctypes.data, 0

    def outputs(self) -> torch.Tensor:
        """Int64 ``[rows]``: the first of a row's largest outputs, or the first that is no number."""
        best, where = (one.swapaxes(0, 1).reshape(one.shape[1], -1) for one in (self._best, self._where))
        where = where + np.tile(np.arange(LANES, dtype=np.float32), len(self._best))
        top = best.max(-1, keepdims=True)
        largest = (best == top) | np.isnan(best)
        return torch.from_numpy(np.where(largest, where, np.inf).min(-1).astype(np.int64))
