"""Llama 1 to 3.x, and the shape that its relatives share: RMS norms, rotary positions, a gated feed-forward.

Field and tensor names: https://huggingface.co/docs/transformers/model_doc/llama.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from daskllm.models.description import BlockSources, DecoderConfig, TensorSource
from daskllm.models.fields import COMMON, Classified, Fields
from daskllm.models.tensors import find_prefix, settle
from daskllm.types import ModelError

__all__ = ["FIELDS", "ROTARY", "describe", "describe_rotary", "sources"]

ROTARY = COMMON | Classified(
    honoured=frozenset(
        {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"}
        | {"num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"}
        | {"rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"}
    ),
    neutral=frozenset({"attention_dropout"}),
    refused={},
)
FIELDS = ROTARY | Classified(
    honoured=frozenset({"attention_bias", "mlp_bias", "layer_types"}),
    # splits the same products over devices; the sums are the same
    neutral=frozenset({"pretraining_tp"}),
    refused={"sliding_window": (None,)},
)
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def describe(fields: Fields) -> DecoderConfig:
    """The description of a Llama."""
    layers = fields.size("num_hidden_layers")
    if set(fields.get("layer_types", ())) - {"full_attention"}:
        fields.refuse("layer_types", "only 'full_attention' is supported")
    bias = fields.flag("attention_bias")
    return describe_rotary(
        fields,
        kv_heads=fields.size_or("num_key_value_heads", fields.size("num_attention_heads")),
        windows=[None] * layers,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )


def describe_rotary(
    fields: Fields,
    *,
    kv_heads: int,
    windows: Sequence[int | None],
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderConfig:
    """The description of any model of this shape; the arguments are where relatives differ."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if fields.get("head_dim") is None and hidden % heads:
        fields.refuse("num_attention_heads", f"it does not divide hidden_size={hidden}")
    head_dim = fields.size_or("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"it does not divide num_attention_heads={heads}")
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim={head_dim} is odd, which rotary positions cannot use")
    return DecoderConfig(
        family=fields.family,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=len(windows),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=fields.size("max_position_embeddings"),
        norm="rms",
        norm_eps=fields.number("rms_norm_eps"),
        activation=fields.activation("hidden_act", "silu"),
        gated=True,
        rope=fields.rope(),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=tuple(windows),
        attention_scale=head_dim**-0.5,
        tied=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        bos_token_id=fields.bos(),
        eos_token_ids=fields.eos(),
    )


def sources(config: DecoderConfig, names: Collection[str]) -> BlockSources:
    """Where the blocks of a model of this shape are; the names are the same for all relatives."""
    prefix = find_prefix(names, "model.", ["norm.weight", "layers.0.input_layernorm.weight"])
    embedding = TensorSource(f"{prefix}embed_tokens.weight", (config.vocab_size, config.hidden_size))
    head = TensorSource("lm_head.weight", embedding.shape)
    if config.tied and embedding.name not in names and head.name in names:
        embedding = head  # a tied pair may be saved under either name
    found = {
        "embed": {"tokens.weight": embedding},
        **{f"layers.{i}": _layer(config, f"{prefix}layers.{i}.") for i in range(config.num_layers)},
        "head": {
            "norm.weight": TensorSource(f"{prefix}norm.weight", (config.hidden_size,)),
            "lm_head.weight": embedding if config.tied else head,
        },
    }
    roots = (f"{prefix}embed_tokens.", f"{prefix}layers.", f"{prefix}norm.", "lm_head.")
    tied = "|lm_head\\.weight" if config.tied else ""
    return settle(found, names, roots=roots, ignored=re.compile(_IGNORED.pattern + tied))


def _layer(config: DecoderConfig, at: str) -> dict[str, TensorSource]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (
        ("q", "self_attn.q_proj", (queries, hidden), config.qkv_bias),
        ("k", "self_attn.k_proj", (keys, hidden), config.qkv_bias),
        ("v", "self_attn.v_proj", (keys, hidden), config.qkv_bias),
        ("o", "self_attn.o_proj", (hidden, queries), config.o_bias),
        ("gate", "mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("up", "mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("down", "mlp.down_proj", (hidden, inner), config.mlp_bias),
    )
    blocks = {
        "input_norm.weight": TensorSource(f"{at}input_layernorm.weight", (hidden,)),
        "post_norm.weight": TensorSource(f"{at}post_attention_layernorm.weight", (hidden,)),
    }
    for block, name, shape, bias in linears:
        blocks[f"{block}.weight"] = TensorSource(f"{at}{name}.weight", shape)
        if bias:
            blocks[f"{block}.bias"] = TensorSource(f"{at}{name}.bias", shape[:1])
    if config.qk_norm:
        for block in ("q_norm", "k_norm"):
            blocks[f"{block}.weight"] = TensorSource(f"{at}self_attn.{block}.weight", (config.head_dim,))
    return blocks
