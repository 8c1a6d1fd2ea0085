"""No field of a family's config goes unread: it is honoured, known to be neutral, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers

from daskllm.models import FAMILIES, describe
from daskllm.types import ModelError
from tests.tiny import CONFIGS

ORACLES = {
    "gpt2": transformers.GPT2Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
LLAMA, GPT2 = CONFIGS["llama-gqa"], CONFIGS["gpt2"]
QWEN2, QWEN3, MISTRAL = CONFIGS["qwen2-layer-types"], CONFIGS["qwen3"], CONFIGS["mistral-window"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_oracle_is_classified(family: str) -> None:
    classified = FAMILIES[family].FIELDS
    known = classified.honoured | classified.neutral | set(classified.refused)
    assert {field.name for field in dataclasses.fields(ORACLES[family])} - known == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_classified_twice(family: str) -> None:
    honoured, neutral, refused = dataclasses.astuple(FAMILIES[family].FIELDS)
    assert not honoured & neutral
    assert not (honoured | neutral) & set(refused)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracles_own_config_is_understood(family: str) -> None:
    """What transformers writes for a family, with all of its defaults spelled out, can be described."""
    changes = {"head_dim": 64} if family == "llama" else {}
    config = ORACLES[family](**changes).to_dict()
    described = describe(config)
    assert described.family == family
    assert described.num_layers == config.get("num_hidden_layers", config.get("n_layer"))


@pytest.mark.parametrize(
    ("base", "change", "field"),
    [
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA, {"sliding_window": 8}, "sliding_window"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "warp": 3}}, "warp"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor"),
        (
            LLAMA,
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "high_freq_factor",
        ),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "two"}}, "factor"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        (LLAMA, {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA, {"hidden_size": 62}, "num_attention_heads"),
        (LLAMA, {"head_dim": 15}, "head_dim=15"),
        (LLAMA, {"torch_dtype": "int8", "dtype": None}, "torch_dtype"),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id"),
        (LLAMA, {"attention_bias": "yes"}, "attention_bias"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers"),
        (LLAMA, {"vocab_size": 1.5}, "vocab_size"),
        (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps"),
        (LLAMA, {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"activation_function": "tanh"}, "activation_function='tanh'"),
        (GPT2, {"n_head": 5}, "n_head"),
        (GPT2, {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN2, {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        (QWEN2, {"use_sliding_window": False}, "sliding_attention"),
        (QWEN2, {"attention_bias": False}, "attention_bias"),
        (QWEN3, {"mlp_bias": True}, "mlp_bias"),
        (MISTRAL, {"attention_bias": True}, "attention_bias"),
        (MISTRAL, {"layer_types": ["full_attention"] * 2}, "layer_types"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window"),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(
    base: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    describe(base)
    with pytest.raises(ModelError, match=f"(?s){field}"):
        describe(base | change)


@pytest.mark.parametrize(
    ("base", "field"),
    [
        *((LLAMA, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
        *((LLAMA, name) for name in ("num_attention_heads", "max_position_embeddings", "rms_norm_eps")),
        *((GPT2, name) for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")),
        (QWEN3, "head_dim"),
        (MISTRAL, "num_key_value_heads"),
        (LLAMA, "model_type"),
    ],
)
def test_a_needed_field_that_is_missing_is_named(base: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError, match=f"no {field}"):
        describe({name: value for name, value in base.items() if name != field})


def test_unknown_architecture_and_remote_code() -> None:
    with pytest.raises(ModelError, match="'mamba' is not supported; known: gpt2, llama"):
        describe({"model_type": "mamba"})
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    with pytest.raises(ModelError, match=r"remote code \(auto_map\)"):
        describe({"model_type": "mine", **remote})
    assert describe(LLAMA | remote) == describe(LLAMA)


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 9], (7, 9)), (None, ()), ([], ())])
def test_end_tokens_are_one_or_several_or_none(eos: Any, ids: tuple[int, ...]) -> None:
    assert describe(LLAMA | {"eos_token_id": eos}).eos_token_ids == ids


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "float16", "torch.bfloat16"])
def test_both_spellings_of_the_type(spelling: str, value: str) -> None:
    config = {name: v for name, v in LLAMA.items() if name not in ("dtype", "torch_dtype")}
    assert describe(config | {spelling: value}).dtype == value.removeprefix("torch.")
    assert describe(config).dtype == "float32"


def test_windows() -> None:
    assert describe(MISTRAL).windows == (16, 16)
    assert describe(MISTRAL | {"sliding_window": None}).windows == (None, None)
    assert describe({k: v for k, v in MISTRAL.items() if k != "sliding_window"}).windows == (4096, 4096)
    assert describe(QWEN2).windows == (8, None, 8)
    assert describe(QWEN2 | {"layer_types": None, "max_window_layers": 1}).windows == (None, 8, 8)
    off = {"layer_types": None, "max_window_layers": 0, "use_sliding_window": False}
    assert describe(QWEN2 | off).windows == (None,) * 3


def test_gpt2_under_the_common_spellings() -> None:
    renamed = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    assert describe({renamed.get(k, k): v for k, v in GPT2.items()}) == describe(GPT2)
