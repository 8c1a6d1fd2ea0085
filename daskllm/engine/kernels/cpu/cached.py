"""The operations over the cache, whichever type it has, one call each."""

from __future__ import annotations

import torch

from daskllm.engine.batch import Batch
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.team import address, float_bits, run
from daskllm.engine.sizes import SCALE_BYTES

__all__ = ["attention", "cache_kernels", "rope_store"]


_WIDE, _NARROW = (
    {
        dtype: (Kernel(rope, f"rope_{name}"), Kernel(attention, f"attention_{name}"))
        for dtype, name in ((torch.float32, "f32"), (torch.bfloat16, "bf16"))
    }
    for rope, attention in (("rope", "attention"), ("cache_int8", "cache_int8"))
)


def cache_kernels(dtype: torch.dtype, kv_dtype: torch.dtype) -> tuple[Kernel, Kernel]:
    """What `rope_store` and `attention` run, for rows of one type and a cache of another."""
    return (_NARROW if kv_dtype == torch.int8 else _WIDE)[dtype]


def _scale_bytes(keys: torch.Tensor) -> int:
    """Bytes of scales that a cache has for each token."""
    return SCALE_BYTES if keys.dtype == torch.int8 else 0


def rope_store(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """Norm and turn q and k, write k and v to their slots; returns q ``[rows, heads * head_dim]``."""
    scales = _scale_bytes(keys)
    blocks, kv_heads, size, _ = keys.shape
    size -= scales
    if size % (4 // keys.itemsize):
        raise ValueError(
            f"head_dim={size} is no multiple of {4 // keys.itemsize}, as {keys.dtype} needs it here"
        )
    heads = qkv.shape[1] // size - 2 * kv_heads
    q = torch.empty((qkv.shape[0], heads * size), dtype=qkv.dtype)
    cos, sin = angles or (None, None)
    q_norm, k_norm = norms or (None, None)
    rope, _ = cache_kernels(qkv.dtype, keys.dtype)
    run(
        rope,
        qkv.shape[0],
        qkv.data_ptr(),
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        batch.positions.data_ptr(),
        batch.slots.data_ptr(),
        address(cos),
        address(sin),
        address(q_norm),
        address(k_norm),
        float_bits(eps),
        heads,
        kv_heads,
        size,
        values.shape[3] - scales,
        blocks,
        0 if cos is None else cos.shape[0],
    )
    return q


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None, scale: float
) -> torch.Tensor:
    """Causal attention of every query row over its own sequence's blocks; shape and dtype of ``q``."""
    scales = _scale_bytes(keys)
    blocks, kv_heads, size, _ = keys.shape
    size -= scales
    out = torch.empty_like(q)
    _, attend = cache_kernels(q.dtype, keys.dtype)
    run(
        attend,
        batch.tiles.shape[0] * kv_heads,
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        batch.tables.data_ptr(),
        batch.tiles.data_ptr(),
        q.shape[1] // size,
        kv_heads,
        size,
        values.shape[3] - scales,
        blocks,
        *batch.tables.shape,
        q.shape[0],
        window or 0,
        float_bits(scale),
    )
    return out
