"""Tensor names of a checkpoint against a description: prefixes, missing ones, left-over ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from daskllm.checkpoint import open_checkpoint
from daskllm.models import DecoderConfig, TensorSource, describe, sources
from daskllm.types import ModelError
from tests.tiny import CONFIGS, make_model


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, frozenset[str]]:
    """The tensor names of some checkpoints as transformers writes them."""
    names = ("llama-gqa", "llama-llama3", "gpt2", "qwen3")
    made: dict[str, Path] = {name: make_model(name, tmp_path_factory.mktemp(name)) for name in names}
    return {name: open_checkpoint(path).names for name, path in made.items()}


def _config(name: str) -> DecoderConfig:
    return describe(CONFIGS[name])


def test_gpt2_takes_rows_of_the_fused_projection(held: dict[str, frozenset[str]]) -> None:
    layer = sources(_config("gpt2"), held["gpt2"])["layers.1"]
    at = "transformer.h.1.attn.c_attn"
    assert layer["k.weight"] == TensorSource(f"{at}.weight", (48, 144), transpose=True, rows=(48, 96))
    assert layer["v.bias"] == TensorSource(f"{at}.bias", (144,), rows=(96, 144))
    assert layer["k.weight"].block_shape == (48, 48)
    assert layer["down.weight"].block_shape == (48, 192)


def test_a_tied_head_is_the_embedding_even_when_it_is_in_the_file(held: dict[str, frozenset[str]]) -> None:
    for name in ("llama-llama3", "gpt2"):
        for extra in (set(), {"lm_head.weight"}):
            found = sources(_config(name), held[name] | extra)
            assert found["head"]["lm_head.weight"] == found["embed"]["tokens.weight"]
            assert found["embed"]["tokens.weight"].name != "lm_head.weight"


def test_a_tied_pair_may_be_saved_under_the_heads_name(held: dict[str, frozenset[str]]) -> None:
    names = held["llama-llama3"] - {"model.embed_tokens.weight"} | {"lm_head.weight"}
    found = sources(_config("llama-llama3"), names)
    assert found["embed"]["tokens.weight"].name == found["head"]["lm_head.weight"].name == "lm_head.weight"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama-gqa", "lm_head.weight"),
        ("llama-gqa", "model.layers.2.mlp.up_proj.weight"),
        ("llama-gqa", "model.norm.weight"),
        ("qwen3", "model.layers.0.self_attn.k_norm.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),
        ("gpt2", "transformer.wpe.weight"),
    ],
)
def test_a_missing_tensor_is_named(held: dict[str, frozenset[str]], name: str, tensor: str) -> None:
    with pytest.raises(ModelError, match=f"no tensor '{tensor}'"):
        sources(_config(name), held[name] - {tensor})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama-gqa", "model.layers.0.self_attn.q_proj.bias"),
        ("llama-gqa", "model.layers.0.self_attn.q_norm.weight"),
        ("llama-gqa", "model.layers.3.mlp.up_proj.weight"),
        ("llama-gqa", "lm_head.bias"),
        ("gpt2", "transformer.h.0.crossattention.c_attn.weight"),
    ],
)
def test_a_parameter_without_a_place_is_refused(
    held: dict[str, frozenset[str]], name: str, tensor: str
) -> None:
    with pytest.raises(ModelError, match=f"tensor '{tensor}' that its config.json has no place for"):
        sources(_config(name), held[name] | {tensor})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama-gqa", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama-gqa", "model.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "v_head.summary.weight"),
    ],
)
def test_buffers_and_other_heads_are_passed_over(
    held: dict[str, frozenset[str]], name: str, tensor: str
) -> None:
    config = _config(name)
    assert sources(config, held[name] | {tensor}) == sources(config, held[name])


def test_names_without_the_prefix(held: dict[str, frozenset[str]]) -> None:
    for name, prefix in (("llama-gqa", "model."), ("gpt2", "transformer.")):
        bare = {tensor.removeprefix(prefix) for tensor in held[name]}
        found = sources(_config(name), bare)
        assert {source.name for blocks in found.values() for source in blocks.values()} == bare
        with pytest.raises(ModelError, match="no place"):
            sources(_config(name), bare | {"h.9.ln_1.weight", "layers.9.mlp.up_proj.bias"})
