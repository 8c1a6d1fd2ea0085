"""Qwen3: Qwen2's windows, normalised queries and keys, biases by choice, and its own head_dim.

Field names: https://huggingface.co/docs/transformers/model_doc/qwen3.
"""

from __future__ import annotations

from daskllm.models.description import DecoderConfig
from daskllm.models.fields import Classified, Fields
from daskllm.models.llama import describe_rotary, sources
from daskllm.models.qwen2 import WINDOWED, windows

__all__ = ["FIELDS", "describe", "sources"]

FIELDS = WINDOWED | Classified(frozenset({"attention_bias"}), frozenset(), {})


def describe(fields: Fields) -> DecoderConfig:
    """The description of a Qwen3, whose head_dim never follows from the other sizes."""
    fields.size("head_dim")
    bias = fields.flag("attention_bias")
    return describe_rotary(
        fields,
        kv_heads=fields.size("num_key_value_heads", "num_attention_heads"),
        windows=windows(fields),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )
