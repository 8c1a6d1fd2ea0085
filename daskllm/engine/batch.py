"""One step's rows as flat tensors: which token, at which position, into which slot, over which blocks.

A batch is ragged: every row is one token, decode rows and the chunks of several prompts side by side,
nothing padded. It is made once per step and read by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from daskllm.engine.sizes import BLOCK_SIZE, TILE

__all__ = ["Batch", "Chunk"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run in this step.

    Attributes:
        tokens: their ids.
        start: the position of the first; all positions before it are in the cache.
        blocks: the sequence's block table, long enough for the last token.
        wanted: which of them somebody waits for, as places in ``tokens``.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wanted: range = range(0)


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of one step; ``rows`` is the sum of the chunks' lengths.

    Attributes:
        tokens: int64 [rows].
        positions: int64 [rows], each token's place in its sequence.
        slots: int64 [rows], block * BLOCK_SIZE + offset where its key and value go.
        tables: int64 [chunks, longest table], block ids, padded with 0 and never read there.
        tiles: int64 [tiles, 4], (chunk, first row, rows, first position): runs of one chunk's rows that
            read keys together.
        wanted: int64 [wanted], rows that somebody waits for behind the last layer, ascending.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    tiles: torch.Tensor
    wanted: torch.Tensor

    @classmethod
    def of(cls, chunks: Sequence[Chunk], device: torch.device | str = "cpu") -> Batch:
        """Lay chunks out one after another.

        >>> Batch.of([Chunk([7, 8], 31, [4, 2])]).slots.tolist()
        [159, 64]
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        wanted: list[int] = []
        for number, chunk in enumerate(chunks):
            row, count = len(tokens), len(chunk.tokens)
            tokens.extend(chunk.tokens)
            places = range(chunk.start, chunk.start + count)
            positions.extend(places)
            blocks = chunk.blocks
            slots.extend(blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in places)
            tiles.extend(
                (number, row + i, min(TILE, count - i), chunk.start + i) for i in range(0, count, TILE)
            )
            wanted.extend(row + place for place in chunk.wanted)
        width = max(len(chunk.blocks) for chunk in chunks)
        tables = [block for c in chunks for block in (*c.blocks, *[0] * (width - len(c.blocks)))]
        parts = (tokens, positions, slots, tables, [n for tile in tiles for n in tile], wanted)
        # One tensor cut into parts: on the way to a device each tensor costs a copy of its own.
        whole = torch.tensor([n for part in parts for n in part], dtype=torch.int64).to(device)
        token, position, slot, table, tile, row_wanted = whole.split([len(part) for part in parts])
        return cls(token, position, slot, table.view(len(chunks), width), tile.view(-1, 4), row_wanted)
