"""Sizes that the batch, the cache and compiled code share; nothing is imported to know them."""

from __future__ import annotations

__all__ = ["BLOCK_SIZE", "SCALE_BYTES", "TILE"]

BLOCK_SIZE = 32
"""Tokens per KV block: two SIMD registers of keys; on average half a block per sequence is unused."""

TILE = 8
"""Rows of one chunk that read keys together, at most."""

SCALE_BYTES = 4
"""Of each token's scale in a block of eight bits: what a key and a value are longer than their numbers."""
