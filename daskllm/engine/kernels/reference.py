"""The fused operations in plain torch: what they mean, and what runs where there is no faster file.

The other files of this room offer the same names and are tested against this one. It works on any device
torch has; it promises values, not bits.

Shapes: a batch has ``rows`` tokens; a layer's cache is ``keys [blocks, kv_heads, head_dim, BLOCK_SIZE]``
(transposed, so that scores are sums over head_dim of contiguous keys) and
``values [blocks, kv_heads, BLOCK_SIZE, padded head_dim]``; in int8 both are longer by each token's scale, see
`daskllm.engine.kernels.int8.halves`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from daskllm.engine.batch import Batch
from daskllm.engine.kernels.composed import Composed
from daskllm.engine.kernels.int8 import halves, quantised
from daskllm.engine.sizes import SCALE_BYTES

__all__ = [
    "INVARIANT",
    "PACKS",
    "Packed",
    "PackedInt8",
    "activate",
    "add_norm",
    "attention",
    "first_largest",
    "likeliest",
    "linear",
    "load",
    "pack",
    "pack_int8",
    "rope_store",
    "stack",
]

PACKS = False
"""Whether `pack` copies, so that the blocks it was given are not needed any more."""
INVARIANT = False
"""Whether a row's bits are the same whatever rows are beside it."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_STRETCH = 512
"""Logits whose largest is found at once: values alone are compared in vectors, values with their places are
not, so that the places are looked up in one stretch only. 32 rows of 49,152 take 0.5 ms instead of 2."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights ``[out, in]`` and biases ``[out]`` as they are: the blocks stay the only copy."""

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True, slots=True)
class PackedInt8:
    """Weights int8 ``[out, in]``, with the scales and biases of their output channels, float32 ``[out]``."""

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.weight.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)


def load(dtype: torch.dtype, quantized: bool, kv_dtype: torch.dtype, config: Any) -> None:
    """Nothing to compile."""


def pack(
    weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None, laid: object = None
) -> Packed:
    """Nothing to reorder, nor is memory needed for it."""
    return Packed(tuple(weights), None if biases is None else tuple(biases))


def pack_int8(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> PackedInt8:
    """Quantise ``[out, in]`` weights by output channel, as one."""
    parts, scales = zip(*map(quantised, weights), strict=True)
    return PackedInt8(
        torch.cat(parts), torch.cat(scales), None if biases is None else torch.cat(tuple(biases)).float()
    )


def linear(x: torch.Tensor, weight: Packed | PackedInt8, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x @ weight.T + bias of every weight, side by side: ``[rows, in] -> [rows, sum of out]``.

    In ``x``'s type, or in float32 where ``dtype`` asks for it. With int8 weights every row of ``x`` is
    quantised too, by a scale of its own, and the sums are exact.
    """
    if isinstance(weight, PackedInt8):
        q, scales = quantised(x)
        sums = (q.double() @ weight.weight.double().T).float()  # whole numbers, which a double holds
        y = sums * scales[:, None] * weight.scales
        return (y if weight.bias is None else y + weight.bias).to(dtype or x.dtype)
    biases = weight.biases or (None,) * len(weight.weights)
    parts = [F.linear(x, w, b) for w, b in zip(weight.weights, biases, strict=True)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if dtype is None else y.to(dtype)


def likeliest(x: torch.Tensor, weight: Packed | PackedInt8) -> torch.Tensor:
    """Where each row of `linear`'s float32 product is largest, the first of equals: int64 ``[rows]``."""
    return first_largest(linear(x, weight, torch.float32))


def first_largest(logits: torch.Tensor) -> torch.Tensor:
    """Where each row is largest, int64 ``[rows]``; of equals the first, as argmax."""
    rows, size = logits.shape
    whole = size // _STRETCH * _STRETCH
    if not whole:
        return logits.max(-1).indices
    stretches = logits[:, :whole].unflatten(1, (-1, _STRETCH))
    top, at = stretches.amax(-1).max(-1)
    tokens = at * _STRETCH + stretches[torch.arange(rows, device=logits.device), at].max(-1).indices
    if whole < size:
        last = logits[:, whole:].max(-1)
        # "Not at most" instead of "more": a row with a NaN has it found, as argmax does.
        tokens = torch.where((last.values <= top) | top.isnan(), tokens, whole + last.indices)
    return tokens


def add_norm(
    delta: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
) -> torch.Tensor:
    """``residual += delta`` in place, then its RMS norm (Zhang & Sennrich 2019) or layer norm, in float32."""
    if delta is not None:
        residual += delta
    x = residual.float()
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (x if bias is None else x + bias.float()).to(residual.dtype)


def rope_store(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Norm and turn q and k, write k and v to their slots.

    Args:
        qkv: ``[rows, (heads + 2 * kv_heads) * head_dim]``, queries, then keys, then values.
        angles: cos and sin, float32 ``[positions, head_dim / 2]``, of the rotary embedding (Su et al. 2021,
            in the half-split layout of GPT-NeoX); None leaves q and k unturned.
        norms: RMS weights ``[head_dim]`` of q and k, applied per head before turning.

    Returns:
        q ``[rows, heads * head_dim]``.
    """
    kv_heads, size, block = _sizes(keys)
    heads = qkv.shape[1] // size - 2 * kv_heads
    q, k, v = qkv.view(qkv.shape[0], -1, size).split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = (
            (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * w.float())
            for x, w in zip((q, k), norms, strict=True)
        )
    if angles is not None:
        cos, sin = (a[batch.positions].unsqueeze(1) for a in angles)
        q, k = (
            torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
            for x1, x2 in (x.float().chunk(2, -1) for x in (q, k))
        )
    at, offset = batch.slots // block, batch.slots % block
    if keys.dtype == torch.int8:
        (keys, key_scales), (values, value_scales) = halves(keys, size), halves(values, block)
        k, key_scales[at, :, offset] = quantised(k)
        v, value_scales[at, :, offset] = quantised(v)
    keys[at, :, :, offset] = k.to(keys.dtype)
    values[at, :, offset, :size] = v
    values[at, :, offset, size:] = 0
    return q.reshape(qkv.shape[0], -1).to(qkv.dtype)


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None, scale: float
) -> torch.Tensor:
    """softmax(scale * q . k) . v of every query row over the positions up to its own.

    ``window`` is how many most recent positions count, the row's own included. Returns the shape and dtype
    of ``q``.
    """
    kv_heads, size, block = _sizes(keys)
    group = q.shape[1] // size // kv_heads
    out = torch.empty_like(q)
    for table, row, count, start in batch.tiles.tolist():
        end = start + count
        used = batch.tables[table, : (end + block - 1) // block]
        held_keys, held_values = keys[used], values[used]
        if keys.dtype == torch.int8:
            whole, scales = halves(held_keys, size)
            held_keys = whole * scales.unsqueeze(2)
            whole, scales = halves(held_values, block)
            held_values = whole * scales.unsqueeze(3)
        k = held_keys.permute(1, 2, 0, 3).reshape(kv_heads, size, -1)[..., :end].float()
        v = held_values.permute(1, 0, 2, 3).reshape(kv_heads, -1, held_values.shape[3])
        v = v[:, :end, :size].float()
        x = q[row : row + count].view(count, kv_heads, group, size).permute(1, 2, 0, 3).float() * scale
        scores = x.reshape(kv_heads, group * count, size) @ k
        key, query = torch.arange(end, device=q.device), torch.arange(start, end, device=q.device)[:, None]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        scores = scores.view(kv_heads, group, count, end).masked_fill(hidden, float("-inf")).softmax(-1)
        mixed = scores.view(kv_heads, group * count, end) @ v
        mixed = mixed.view(kv_heads, group, count, size).permute(2, 0, 1, 3)
        out[row : row + count] = mixed.reshape(count, -1).to(q.dtype)
    return out


def _sizes(keys: torch.Tensor) -> tuple[int, int, int]:
    """KV heads, head_dim and tokens of a layer's blocks."""
    _, kv_heads, size, block = keys.shape
    return kv_heads, size - SCALE_BYTES * (keys.dtype == torch.int8), block


def activate(x: torch.Tensor, kind: str, gated: bool) -> torch.Tensor:
    """act(gate) * up from ``[rows, 2 * size]`` (Shazeer 2020), or act(x) from ``[rows, size]``."""
    act = _ACTIVATIONS[kind]
    if not gated:
        return act(x.float()).to(x.dtype)
    gate, up = x.float().chunk(2, -1)
    return (act(gate) * up).to(x.dtype)


def stack(
    layers: Sequence[Any], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], config: Any
) -> Composed:
    """Decoder layers ready to run together."""
    return Composed(sys.modules[__name__], layers, keys, values, config)
