"""Tiny random models of every family and option, and transformers as the oracle that reads them.

`make_model` writes a directory as a user would have one: ``config.json`` (exactly the entry of `CONFIGS`,
old or new spelling), safetensors, a byte-level ``tokenizer.json`` and ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

__all__ = ["BOS", "CONFIGS", "EOS", "build", "make_model", "oracle"]

logging.disable_progress_bar()

SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
BOS, EOS = 256, 257
CONTEXT = 256

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_IDS: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS}


def _rotary(model_type: str, **changes: Any) -> dict[str, Any]:
    """A config of Llama's shape: 2 layers, 4 query heads on 2 key heads of 16."""
    config = {
        "model_type": model_type,
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **_IDS,
    }
    return config | changes


def _gpt2(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "gpt2",
        "vocab_size": 288,
        "n_positions": CONTEXT,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **_IDS,
    }
    return config | changes


def _theta(theta: float = 10000.0, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **rest}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(dtype="float32"),
    "gpt2-untied-gelu-odd": _gpt2(
        vocab_size=271, n_embd=36, n_head=3, n_inner=50, activation_function="gelu", tie_word_embeddings=False
    ),
    "gpt2-relu-unscaled": _gpt2(activation_function="relu", scale_attn_weights=False, n_layer=2),
    "gpt2-upcast-tanh": _gpt2(activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True),
    "llama-old": _rotary("llama", num_key_value_heads=4, rope_theta=10000.0, torch_dtype="float32"),
    "llama-gqa": _rotary("llama", num_hidden_layers=3, **_theta(500000.0), dtype="float32"),
    "llama-mqa": _rotary("llama", num_key_value_heads=1, **_theta()),
    "llama-no-kv-field": {
        k: v for k, v in _rotary("llama", rope_theta=1e4).items() if k != "num_key_value_heads"
    },
    "llama-head-dim": _rotary("llama", head_dim=24, **_theta()),
    "llama-biases-gelu": _rotary("llama", attention_bias=True, mlp_bias=True, hidden_act="gelu", **_theta()),
    "llama-mlp-bias-relu": _rotary("llama", mlp_bias=True, hidden_act="relu", rope_theta=1e4),
    "llama-tied-odd": _rotary(
        "llama", tie_word_embeddings=True, vocab_size=269, hidden_size=44, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=70, eos_token_id=[257, 260], **_theta(),
    ),
    "llama-linear-old": _rotary("llama", rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-llama3": _rotary(
        "llama", tie_word_embeddings=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 64,
                         **_LLAMA3},
    ),
    "llama-llama3-old": _rotary(
        "llama", rope_theta=5e5, torch_dtype="float32",
        rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": 64, **_LLAMA3},
    ),
    "llama-yarn-mscale": _rotary(
        "llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "mscale": 1.2,
                                  "mscale_all_dim": 0.8, "beta_fast": 16.0, "beta_slow": 2.0,
                                  "truncate": False, **_YARN},
    ),
    "qwen2": _rotary("qwen2", **_theta(1e6), use_sliding_window=False, max_window_layers=28),
    "qwen2-tied-window-from": _rotary(
        "qwen2", tie_word_embeddings=True, num_hidden_layers=3, use_sliding_window=True, sliding_window=12,
        max_window_layers=1, rope_theta=1e6, torch_dtype="float32",
    ),
    "qwen2-layer-types": _rotary(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_theta(1e6),
    ),
    "qwen2-yarn-old": _rotary("qwen2", rope_theta=1e6, rope_scaling={"type": "yarn", **_YARN}),
    "qwen3": _rotary("qwen3", head_dim=32, tie_word_embeddings=True, **_theta(1e6)),
    "qwen3-bias-window": _rotary(
        "qwen3", head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=10,
        max_window_layers=0, **_theta(1e6),
    ),
    "qwen3-yarn": _rotary(
        "qwen3", head_dim=16, num_key_value_heads=1, num_hidden_layers=3,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "attention_factor": 1.1, **_YARN},
    ),
    "mistral-window": _rotary("mistral", sliding_window=16, rope_theta=10000.0, torch_dtype="float32"),
    "mistral-full-head-dim": _rotary("mistral", sliding_window=None, head_dim=20, **_theta(1e6)),
    "mistral-linear": _rotary(
        "mistral", sliding_window=8, num_key_value_heads=4,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
}  # fmt: skip


def build(name: str, dtype: str = "float32", seed: int = 0) -> PreTrainedModel:
    """The transformers model of one entry, its weights random and large enough for logits that differ."""
    config = AutoConfig.for_model(**json.loads(json.dumps(CONFIGS[name])))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                norm = parameter_name.endswith("weight")
                parameter.copy_(1 + 0.2 * noise if norm else 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.to(getattr(torch, dtype)).eval()


def make_model(
    name: str, path: Path, dtype: str = "float32", seed: int = 0, max_shard_size: str | None = None
) -> Path:
    """Write one entry's model directory; returns its path.

    Args:
        dtype: of the stored weights; config.json says so in the entry's own spelling.
        max_shard_size: such as "40KB" for several shards and an index.
    """
    path = Path(path)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    build(name, dtype, seed).save_pretrained(path, **sharding)
    config = dict(CONFIGS[name])
    config["torch_dtype" if "torch_dtype" in config or "rope_theta" in config else "dtype"] = dtype
    (path / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(path, config["vocab_size"], add_bos=config["model_type"] in ("llama", "mistral"))
    return path


def oracle(path: Path, dtype: str = "float32") -> PreTrainedModel:
    """The directory's model as transformers computes it, with the plain attention."""
    kind = getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="eager").eval()


def _write_tokenizer(path: Path, vocab_size: int, add_bos: bool) -> None:
    """All bytes, five specials, and letter pairs up to the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinsrhl"
    merges = [(a, b) for a in letters for b in letters][: vocab_size - 256 - len(SPECIAL)]
    tokens = [*alphabet, *SPECIAL, *(a + b for a, b in merges)]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if add_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
        )
    bpe.save(str(path / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(described, indent=1, ensure_ascii=False))
