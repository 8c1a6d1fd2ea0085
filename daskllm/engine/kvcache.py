"""The KV cache: which blocks are free, which can be found by what they hold, and the tensors they stand for.

`BlockPool` is the book: it counts references and knows no tensor. A full block may have a key, made of its
tokens and of all before them, since keys and values depend on those alone; whoever reads the same tokens
finds it, while it is held and after that until the pool needs it. `KVCache` is the memory: keys and values
of every layer in blocks of `BLOCK_SIZE` tokens, so that a sequence grows without moving and sequences share
what they have in common.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from daskllm.engine.kernels import padded_head_dim
from daskllm.engine.sizes import BLOCK_SIZE, SCALE_BYTES

__all__ = ["BlockPool", "KVCache", "block_key", "blocks_for", "bytes_per_block"]

_KEY_BYTES = 16
_KEPT_FREELY = 256
"""Blocks that are touched for the sake of what others keep; beyond, what nobody holds gives way before new
memory is used, so that the cache takes no more of it than the fullest batch did."""


def blocks_for(tokens: int) -> int:
    """Blocks that hold ``tokens`` tokens.

    >>> blocks_for(33)
    2
    """
    return -(-tokens // BLOCK_SIZE)


def bytes_per_block(layers: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one block over all layers, keys and values together; scales beside numbers of one byte."""
    scales = 2 * SCALE_BYTES if itemsize == 1 else 0
    return layers * kv_heads * BLOCK_SIZE * ((head_dim + padded_head_dim(head_dim)) * itemsize + scales)


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """What a full block is found by: BLAKE2b, 128 bits, of the key before it (b"" at the start) and its ids.

    >>> block_key(b"", [1, 2]) == block_key(b"", [1, 2]) != block_key(block_key(b"", [3]), [1, 2])
    True
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=_KEY_BYTES).digest()


class BlockPool:
    """Block ids 0 … size-1 with reference counts, and keys of those that can be found.

    A free block with a key counts as free like any other. The longest unused gives way first; of blocks let
    go together the last, which without those before it is of no use.

    Example:
        >>> pool = BlockPool(2)
        >>> first = pool.take()
        >>> pool.share([first]); pool.release([first]); pool.free
        1
        >>> pool.publish(first, block_key(b"", range(32)))
        >>> pool.release([first]); pool.free
        2
        >>> pool.find(block_key(b"", range(32))) == first
        True
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._references = [0] * size
        # Last in, first out: memory that was touched before is used again before new pages are.
        self._free: list[int] = []
        self._touched = 0
        self._keys: list[bytes | None] = [None] * size
        self._found: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, with a key; the longest unused first

    @property
    def free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free) + len(self._kept) + self.size - self._touched

    @property
    def used(self) -> int:
        """How many blocks somebody holds."""
        return self.size - self.free

    def take(self) -> int:
        """A free block, now held once; IndexError when there is none."""
        if self._free:
            block = self._free.pop()
        elif self._touched < self.size and (self._touched < _KEPT_FREELY or not self._kept):
            block = self._touched
            self._touched += 1
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._drop_key(block)
        else:
            raise IndexError(f"all {self.size} KV blocks are held")
        self._references[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more."""
        for block in blocks:
            if self._references[block] == 0:
                del self._kept[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let a sequence's blocks go; those that nobody holds any more are free."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def held(self, blocks: Iterable[int]) -> int:
        """How many of these somebody holds."""
        return sum(self._references[block] > 0 for block in blocks)

    def publish(self, block: int, key: bytes) -> None:
        """Let a full block be found. It must not be written any more while it has a key.

        Where another one has the key already, this one stays its holder's alone.
        """
        if key not in self._found:
            self._found[key] = block
            self._keys[block] = key

    def find(self, key: bytes) -> int | None:
        """The block with a key, to be held by `share`."""
        return self._found.get(key)

    def forget(self) -> None:
        """No block can be found any more."""
        self._found.clear()
        self._keys = [None] * self.size
        self._free.extend(self._kept)
        self._kept.clear()

    def _drop_key(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], None
        if key is not None:
            del self._found[key]


class KVCache:
    """Keys and values of every layer.

    Attributes:
        keys: per layer ``[blocks, kv_heads, head_dim, BLOCK_SIZE]``.
        values: per layer ``[blocks, kv_heads, BLOCK_SIZE, padded head_dim]``.

    In int8 ``head_dim`` and ``padded head_dim`` are 4 more: the bytes of each token's scale.
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
        scale = SCALE_BYTES if dtype == torch.int8 else 0
        padded = padded_head_dim(head_dim) + scale
        self.keys = [
            torch.empty((blocks, kv_heads, head_dim + scale, BLOCK_SIZE), dtype=dtype, device=device)
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
