"""The KV cache: which blocks are free, and the tensors they stand for.

`BlockPool` is the book: it counts references and knows no tensor. `KVCache` is the memory: keys and values
of every layer in blocks of `BLOCK_SIZE` tokens, so that a sequence grows without moving and n samples of
one prompt share the prompt's blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from daskllm.engine.batch import BLOCK_SIZE
from daskllm.engine.kernels import padded_head_dim

__all__ = ["BlockPool", "KVCache", "blocks_for", "bytes_per_block"]


def blocks_for(tokens: int) -> int:
    """Blocks that hold ``tokens`` tokens.

    >>> blocks_for(33)
    2
    """
    return -(-tokens // BLOCK_SIZE)


def bytes_per_block(layers: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one block over all layers, keys and values together."""
    return layers * kv_heads * BLOCK_SIZE * (head_dim + padded_head_dim(head_dim)) * itemsize


class BlockPool:
    """Block ids 0 … size-1 with reference counts.

    Example:
        >>> pool = BlockPool(2)
        >>> first = pool.take()
        >>> pool.share([first]); pool.release([first]); pool.free
        1
        >>> pool.release([first]); pool.free
        2
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # Last in, first out: memory that was touched before is used again before new pages are.
        self._free = list(range(size - 1, -1, -1))
        self._references = [0] * size

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many blocks somebody holds."""
        return self.size - len(self._free)

    def take(self) -> int:
        """A free block, now held once; IndexError when there is none."""
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more."""
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let blocks go; those that nobody holds any more are free."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)


class KVCache:
    """Keys and values of every layer.

    Attributes:
        keys: per layer ``[blocks, kv_heads, head_dim, BLOCK_SIZE]``.
        values: per layer ``[blocks, kv_heads, BLOCK_SIZE, padded head_dim]``.
    """

    def __init__(
        self,
        blocks: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        # Not filled: the system hands out pages as blocks are first written, so a large cache costs
        # memory only when it is used.
        padded = padded_head_dim(head_dim)
        self.keys = [
            torch.empty((blocks, kv_heads, head_dim, BLOCK_SIZE), dtype=dtype, device=device)
            for _ in range(layers)
        ]
        self.values = [
            torch.empty((blocks, kv_heads, BLOCK_SIZE, padded), dtype=dtype, device=device)
            for _ in range(layers)
        ]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to)."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                for source, target in pairs:
                    tensor[target] = tensor[source]
