"""The fused operations on a CPU: Numba SIMD kernels on torch's threads.

Every operation treats a row by itself and in one order of operations, so that a row's bits do not depend
on its company, on how its prompt was cut into chunks, or on the number of threads:

- a product adds a row's inputs in one order, whatever tile the row is in: one after another in vectors, 32
  at a time in matrix registers;
- attention walks a sequence's blocks from its first key to its last and treats keys beyond a row's own as
  exact zeros, so that a prefill tile and a decode step add the same numbers in the same order.

See `daskllm.engine.kernels.reference` for what each operation computes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from daskllm.engine.kernels.composed import Composed
from daskllm.engine.kernels.cpu.cached import attention, cache_kernels, rope_store
from daskllm.engine.kernels.cpu.gemm import Packed, likeliest, linear, linear_kernel, pack
from daskllm.engine.kernels.cpu.int8 import PackedInt8, product_kernels
from daskllm.engine.kernels.cpu.panels import FILL
from daskllm.engine.kernels.cpu.registers import DENIED
from daskllm.engine.kernels.cpu.rows import activate, activate_kernel, add_norm, norm_kernel
from daskllm.engine.kernels.cpu.stack import Stack, StackInt8, StackInt8KV8, StackKV8

__all__ = [
    "DENIED",
    "INVARIANT",
    "PACKS",
    "Packed",
    "activate",
    "add_norm",
    "attention",
    "likeliest",
    "linear",
    "load",
    "pack",
    "pack_int8",
    "rope_store",
    "stack",
]

PACKS = INVARIANT = True


def pack_int8(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None) -> Any:
    """Quantise ``[out, in]`` weights by output channel, as one."""
    return PackedInt8.of(weights, biases)


def load(dtype: torch.dtype, quantized: bool, kv_dtype: torch.dtype, config: Any) -> None:
    """Have what a model's steps run ready: compiled where this machine has not done it before."""
    needed = [norm_kernel(dtype)]
    if quantized:
        needed += product_kernels(dtype, torch.float32)
    else:
        needed += [FILL, linear_kernel(dtype, torch.float32)]
    if not quantized and _is_odd(dtype, config):
        needed += [linear_kernel(dtype, dtype), activate_kernel(dtype), *cache_kernels(dtype, kv_dtype)]
    else:
        needed.append(_stack_of(not quantized, kv_dtype == torch.int8).kernel(dtype))
    for kernel in needed:
        kernel.load()


def stack(
    layers: Sequence[Any], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], config: Any
) -> Stack | Composed:
    """Decoder layers ready to run together."""
    qkv = layers[0].qkv
    wide = isinstance(qkv, Packed)
    if wide and _is_odd(qkv.panels.dtype, config):
        return Composed(sys.modules[__name__], layers, keys, values, config)
    return _stack_of(wide, keys[0].dtype == torch.int8)(layers, keys, values, config)


def _is_odd(dtype: torch.dtype, config: Any) -> bool:
    """Whether layers with wide weights go one operation at a time: a product of bfloat16 reads inputs two by
    two, and only `linear` makes room for the last one's neighbour."""
    widths = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    return dtype == torch.bfloat16 and any(width % 2 for width in widths)


def _stack_of(wide: bool, narrow_cache: bool) -> type[Stack]:
    """The stack for weights that are wide or int8, and such a cache."""
    if wide:
        return StackKV8 if narrow_cache else Stack
    return StackInt8KV8 if narrow_cache else StackInt8
