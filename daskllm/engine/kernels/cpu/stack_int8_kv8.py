"""All decoder layers of a step in one call, with int8 weights and over a cache in eight bits."""

from __future__ import annotations

import numpy as np

from daskllm.engine.kernels.cpu.cache_int8 import attention_scratch
from daskllm.engine.kernels.cpu.stack_int8 import StackInt8, stack_loop
from daskllm.engine.kernels.cpu.stack_kv8 import attention, rope
from daskllm.engine.kernels.cpu.team import Kernel

__all__ = ["StackInt8KV8"]


@Kernel
def _stack_f32(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.float32, rope, attention, attention_scratch)


@Kernel
def _stack_bf16(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.uint16, rope, attention, attention_scratch)


class StackInt8KV8(StackInt8):
    """As `StackInt8`, over a cache in eight bits."""

    kernels = (_stack_f32, _stack_bf16)
