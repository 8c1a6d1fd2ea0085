"""All decoder layers of a step in one call, with int8 weights and over a cache in eight bits."""

from __future__ import annotations

import numpy as np

from daskllm.engine.kernels.cpu.code.cache_int8 import attention_scratch
from daskllm.engine.kernels.cpu.code.stack_int8 import stack_loop
from daskllm.engine.kernels.cpu.code.stack_kv8 import attention, rope

__all__ = ["stack_bf16", "stack_f32"]


def stack_f32(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.float32, np.float32, rope, attention, attention_scratch)


def stack_bf16(pointer):  # type: ignore[no-untyped-def]
    stack_loop(pointer, np.uint16, np.uint16, rope, attention, attention_scratch)
