"""Qwen2 and Qwen2.5: Llama's shape with query, key and value biases, and windows from some layer on.

Field names: https://huggingface.co/docs/transformers/model_doc/qwen2.
"""

from __future__ import annotations

from daskllm.models.description import DecoderConfig
from daskllm.models.fields import Classified, Fields
from daskllm.models.llama import ROTARY, describe_rotary, sources
from daskllm.types import ModelError

__all__ = ["FIELDS", "WINDOWED", "describe", "sources", "windows"]

WINDOWED = ROTARY | Classified(
    honoured=frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    neutral=frozenset(),
    refused={"mlp_bias": (None, False)},
)
FIELDS = WINDOWED | Classified(frozenset(), frozenset(), {"attention_bias": (None, True)})


def describe(fields: Fields) -> DecoderConfig:
    """The description of a Qwen2."""
    return describe_rotary(
        fields,
        kv_heads=fields.size("num_key_value_heads", "num_attention_heads"),
        windows=windows(fields),
        qkv_bias=True,
    )


def windows(fields: Fields) -> list[int | None]:
    """Each layer's window: as ``layer_types`` lists them, else from layer ``max_window_layers`` on."""
    layers = fields.size("num_hidden_layers")
    used = fields.flag("use_sliding_window")
    # a null turns windows off; an absent field has the default of the first release
    present = not fields.has("sliding_window") or fields.get("sliding_window") is not None
    window = fields.size_or("sliding_window", 4096) if used and present else None
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.number("max_window_layers", 28)
        return [window if i >= first else None for i in range(layers)]
    if len(kinds) != layers:
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            fields.refuse("layer_types", f"{kind!r} is not supported, only full_ and sliding_attention")
        if kind == "sliding_attention" and window is None:
            fields.refuse("layer_types", "'sliding_attention' needs use_sliding_window and sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds]
