"""GPT-2: learned positions, layer norms, biases everywhere, weights stored ``[in, out]`` and q, k, v fused.

Field and tensor names: https://huggingface.co/docs/transformers/model_doc/gpt2.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from daskllm.models.description import BlockSources, DecoderConfig, TensorSource
from daskllm.models.fields import COMMON, Classified, Fields
from daskllm.models.tensors import find_prefix, settle

__all__ = ["FIELDS", "describe", "sources"]

FIELDS = COMMON | Classified(
    honoured=frozenset(
        {"n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"}
        | {"layer_norm_epsilon", "scale_attn_weights"}
        | {"max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"}
    ),
    neutral=frozenset(
        {"n_ctx", "resid_pdrop", "embd_pdrop", "attn_pdrop", "task_specific_params"}
        # a classifier's head
        | {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"}
        | {"summary_first_dropout"}
        # the same products in another order, in float32: an answer to overflow in float16 training
        | {"reorder_and_upcast_attn"}
    ),
    refused={"scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False)},
)
_IGNORED = r"(.*\.)?attn\.(bias|masked_bias)"


def describe(fields: Fields) -> DecoderConfig:
    """The description of a GPT-2."""
    hidden, heads = fields.size("n_embd", "hidden_size"), fields.size("n_head", "num_attention_heads")
    if hidden % heads:
        fields.refuse("n_head", f"it does not divide n_embd={hidden}")
    layers = fields.size("n_layer", "num_hidden_layers")
    return DecoderConfig(
        family=fields.family,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size_or("n_inner", 4 * hidden),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=fields.size("n_positions", "max_position_embeddings"),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        gated=False,
        rope=None,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        qk_norm=False,
        windows=(None,) * layers,
        attention_scale=(hidden // heads) ** -0.5 if fields.flag("scale_attn_weights", True) else 1.0,
        tied=fields.flag("tie_word_embeddings", True),
        dtype=fields.dtype(),
        bos_token_id=fields.bos(),
        eos_token_ids=fields.eos(),
    )


def sources(config: DecoderConfig, names: Collection[str]) -> BlockSources:
    """Where the blocks of a GPT-2 are."""
    prefix = find_prefix(names, "transformer.", ["wpe.weight"])
    hidden = config.hidden_size
    embedding = TensorSource(f"{prefix}wte.weight", (config.vocab_size, hidden))
    head = TensorSource("lm_head.weight", embedding.shape)
    if config.tied and embedding.name not in names and head.name in names:
        embedding = head  # a tied pair may be saved under either name
    found = {
        "embed": {
            "tokens.weight": embedding,
            "positions.weight": TensorSource(f"{prefix}wpe.weight", (config.max_positions, hidden)),
        },
        **{f"layers.{i}": _layer(config, f"{prefix}h.{i}.") for i in range(config.num_layers)},
        "head": {
            "norm.weight": TensorSource(f"{prefix}ln_f.weight", (hidden,)),
            "norm.bias": TensorSource(f"{prefix}ln_f.bias", (hidden,)),
            "lm_head.weight": embedding if config.tied else head,
        },
    }
    roots = (f"{prefix}wte.", f"{prefix}wpe.", f"{prefix}h.", f"{prefix}ln_f.", "lm_head.")
    tied = "|lm_head\\.weight" if config.tied else ""
    return settle(found, names, roots=roots, ignored=re.compile(_IGNORED + tied))


def _layer(config: DecoderConfig, at: str) -> dict[str, TensorSource]:
    hidden, inner = config.hidden_size, config.intermediate_size
    blocks = {}
    for block, name in (("input_norm", "ln_1"), ("post_norm", "ln_2")):
        blocks[f"{block}.weight"] = TensorSource(f"{at}{name}.weight", (hidden,))
        blocks[f"{block}.bias"] = TensorSource(f"{at}{name}.bias", (hidden,))
    for i, block in enumerate("qkv"):
        rows = (i * hidden, (i + 1) * hidden)
        fused = TensorSource(f"{at}attn.c_attn.weight", (hidden, 3 * hidden), transpose=True, rows=rows)
        blocks[f"{block}.weight"] = fused
        blocks[f"{block}.bias"] = TensorSource(f"{at}attn.c_attn.bias", (3 * hidden,), rows=rows)
    linears = (("o", "attn.c_proj", hidden, hidden), ("up", "mlp.c_fc", hidden, inner))
    for block, name, into, out in (*linears, ("down", "mlp.c_proj", inner, hidden)):
        blocks[f"{block}.weight"] = TensorSource(f"{at}{name}.weight", (into, out), transpose=True)
        blocks[f"{block}.bias"] = TensorSource(f"{at}{name}.bias", (out,))
    return blocks
