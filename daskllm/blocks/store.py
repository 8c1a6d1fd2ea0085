"""The blocks that a process holds, by model, version, layer and name.

It keeps and drops arrays and counts their bytes. It refuses to know where they come from or what they are
for; loading is `daskllm.blocks.load`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

from daskllm.blocks.array import Block, nbytes

__all__ = ["STORE", "BlockKey", "BlockStore"]


class BlockKey(NamedTuple):
    """Which block: a model's identity, the version of its weights, a layer's and a block's name."""

    model: str
    version: int
    layer: str
    name: str


class BlockStore:
    """A thread-safe mapping of keys to blocks. A dropped block's memory is free once no view is left.

    Example:
        >>> import numpy as np
        >>> store = BlockStore()
        >>> store.put(BlockKey("m", 0, "head", "norm.weight"), np.ones(4, np.float32))
        >>> store.nbytes("m"), store.drop("m"), store.nbytes()
        (16, 1, 0)
    """

    def __init__(self) -> None:
        self._blocks: dict[BlockKey, Block] = {}
        self._lock = threading.Lock()

    def put(self, key: BlockKey, array: Block) -> None:
        """Hold one block, in place of any under the same key."""
        self.put_all({key: array})

    def put_all(self, blocks: Mapping[BlockKey, Block]) -> None:
        """Hold several blocks at once: another thread sees all of them or none."""
        with self._lock:
            self._blocks.update(blocks)

    def get(self, key: BlockKey) -> Block:
        """One block.

        Raises:
            KeyError: it is not held.
        """
        with self._lock:
            try:
                return self._blocks[key]
            except KeyError:
                raise KeyError(
                    f"block {key.name!r} of {key.layer!r} (model {key.model!r}, version {key.version}) is "
                    "not held in this process; load its layer first"
                ) from None

    def find(self, key: BlockKey) -> Block | None:
        """One block, None where it is not held."""
        with self._lock:
            return self._blocks.get(key)

    def keys(self, model: str | None = None) -> list[BlockKey]:
        """What is held, of one model or of all, in the order of loading."""
        with self._lock:
            return [key for key in self._blocks if model is None or key.model == model]

    def nbytes(self, model: str | None = None, layer: str | None = None) -> int:
        """Bytes held, of one model or layer or of all; a block under two keys (a tied head) counts once."""
        with self._lock:
            held = {
                id(b): b
                for key, b in self._blocks.items()
                if model in (None, key.model) and layer in (None, key.layer)
            }
        return sum(nbytes(block) for block in held.values())

    def drop_block(self, key: BlockKey) -> None:
        """Let go of one block."""
        with self._lock:
            self._blocks.pop(key, None)

    def drop(self, model: str, version: int | None = None, layer: str | None = None) -> int:
        """Let go of a model's blocks, of one version or one layer alone if asked; returns how many."""
        with self._lock:
            gone = [
                key
                for key in self._blocks
                if key.model == model and version in (None, key.version) and layer in (None, key.layer)
            ]
            for key in gone:
                del self._blocks[key]
        return len(gone)


STORE = BlockStore()
"""The process's own."""
