"""Every configuration: described, loaded, and computed in plain torch, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from daskllm.blocks import array
from daskllm.blocks.load import load_layers
from daskllm.blocks.store import BlockStore
from daskllm.checkpoint import open_checkpoint
from daskllm.models import describe, layer_names, sources
from daskllm.models.rope import inverse_frequencies
from tests.models.reference import logits
from tests.tiny import CONFIGS, make_model, oracle


def test_there_are_enough_configurations() -> None:
    assert len(CONFIGS) >= 22
    assert {c["model_type"] for c in CONFIGS.values()} == {"gpt2", "llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_frequencies_equal_transformers(name: str, tmp_path: Path) -> None:
    path = make_model(name, tmp_path)
    model = oracle(path)
    checkpoint = open_checkpoint(path)
    config = describe(checkpoint.config)
    store = BlockStore()
    load_layers(
        checkpoint, config, layer_names(config), model="m", device="cpu", dtype="float32", store=store
    )
    found = sources(config, checkpoint.names)
    blocks = {(key.layer, key.name): array.to_torch(store.get(key), "float32") for key in store.keys("m")}
    shapes = {place: tuple(block.shape) for place, block in blocks.items()}
    assert shapes == {
        (layer, block): source.block_shape for layer in found for block, source in found[layer].items()
    }
    ids = torch.randint(0, config.vocab_size, (48,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits(config, blocks, ids), expected, atol=1e-4, rtol=0)
    if config.rope is not None:
        frequencies, factor = inverse_frequencies(config.rope, config.head_dim, config.max_positions)
        rotary = model.model.rotary_emb
        np.testing.assert_array_equal(frequencies, rotary.inv_freq.numpy())
        assert factor == rotary.attention_scaling


def test_base_model_without_prefix(tmp_path: Path) -> None:
    """A model saved without its head has no prefix on its names; its embedding is the head."""
    for name in ("llama-llama3", "gpt2"):
        whole = make_model(name, tmp_path / name)
        base = tmp_path / f"{name}-base"
        oracle(whole).base_model.save_pretrained(base)
        (base / "config.json").write_text((whole / "config.json").read_text())
        config = describe(open_checkpoint(whole).config)
        kept = open_checkpoint(base)
        assert not any(tensor.startswith(("model.", "transformer.")) for tensor in kept.names)
        load_layers(
            kept, config, layer_names(config), model="m", device="cpu", dtype="float32", store=BlockStore()
        )
