"""Mistral: Llama's shape without biases, with one sliding window for all layers.

Field names: https://huggingface.co/docs/transformers/model_doc/mistral.
"""

from __future__ import annotations

from daskllm.models.description import DecoderConfig
from daskllm.models.fields import Classified, Fields
from daskllm.models.llama import ROTARY, describe_rotary, sources

__all__ = ["FIELDS", "describe", "sources"]

FIELDS = ROTARY | Classified(
    honoured=frozenset({"sliding_window", "layer_types"}),
    neutral=frozenset(),
    refused={"attention_bias": (None, False), "mlp_bias": (None, False)},
)


def describe(fields: Fields) -> DecoderConfig:
    """The description of a Mistral. Without the field the window is 4096, as in its first release."""
    window = fields.size_or("sliding_window", 4096)
    windowed = not fields.has("sliding_window") or fields.get("sliding_window") is not None
    kind = "sliding_attention" if windowed else "full_attention"
    if set(fields.get("layer_types", ())) - {kind}:
        fields.refuse("layer_types", f"with this sliding_window all layers are {kind!r}")
    layers = fields.size("num_hidden_layers")
    return describe_rotary(
        fields,
        kv_heads=fields.size("num_key_value_heads"),
        windows=[window if windowed else None] * layers,
    )
