"""The decoder in plain torch, straight from a description and blocks: the slow truth for a description.

One sequence, no cache, float32. Together with transformers it shows that a `DecoderConfig` and its blocks say
all there is to say about a model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from daskllm.models.description import DecoderConfig
from daskllm.models.rope import inverse_frequencies

Blocks = Mapping[tuple[str, str], torch.Tensor]

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def logits(config: DecoderConfig, blocks: Blocks, ids: torch.Tensor) -> torch.Tensor:
    """Float32 ``[tokens, vocab]`` for int64 ids ``[tokens]``."""
    x = blocks["embed", "tokens.weight"][ids]
    if config.rope is None:
        x = x + blocks["embed", "positions.weight"][: len(ids)]
    for i in range(config.num_layers):
        x = x + _attention(config, blocks, i, _norm(config, blocks, f"layers.{i}", "input_norm", x))
        x = x + _feed_forward(config, blocks, i, _norm(config, blocks, f"layers.{i}", "post_norm", x))
    return _linear(blocks, "head", "lm_head", _norm(config, blocks, "head", "norm", x))


def _linear(blocks: Blocks, layer: str, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, blocks[layer, f"{name}.weight"], blocks.get((layer, f"{name}.bias")))


def _norm(config: DecoderConfig, blocks: Blocks, layer: str, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = blocks[layer, f"{name}.weight"]
    if config.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, blocks[layer, f"{name}.bias"], config.norm_eps)
    return F.rms_norm(x, x.shape[-1:], weight, config.norm_eps)


def _attention(config: DecoderConfig, blocks: Blocks, i: int, x: torch.Tensor) -> torch.Tensor:
    layer, tokens = f"layers.{i}", len(x)
    q, k, v = (
        _linear(blocks, layer, name, x).view(tokens, -1, config.head_dim).transpose(0, 1) for name in "qkv"
    )
    if config.qk_norm:
        q, k = (_norm(config, blocks, layer, f"{name}_norm", h) for name, h in (("q", q), ("k", k)))
    if config.rope is not None:
        q, k = _rotate(config, q), _rotate(config, k)
    shared = config.num_heads // config.num_kv_heads
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    window = config.windows[i] or tokens
    scores = (q @ k.transpose(1, 2)) * config.attention_scale
    scores = scores.masked_fill((age < 0) | (age >= window), float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1)
    return _linear(blocks, layer, "o", mixed)


def _rotate(config: DecoderConfig, x: torch.Tensor) -> torch.Tensor:
    assert config.rope is not None
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim, config.max_positions)
    angles = torch.arange(x.shape[1])[:, None].float() * torch.from_numpy(frequencies)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _feed_forward(config: DecoderConfig, blocks: Blocks, i: int, x: torch.Tensor) -> torch.Tensor:
    layer, activation = f"layers.{i}", _ACTIVATIONS[config.activation]
    up = _linear(blocks, layer, "up", x)
    inner = activation(_linear(blocks, layer, "gate", x)) * up if config.gated else activation(up)
    return _linear(blocks, layer, "down", inner)
