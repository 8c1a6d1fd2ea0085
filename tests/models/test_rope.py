"""Rotary frequencies against transformers, beyond what the tiny configurations use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from daskllm.models import describe
from daskllm.models.rope import inverse_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 10000.0},
    "integer theta": {"rope_theta": 1000000},
    "no theta at all": {},
    "theta in both places": {
        "rope_theta": 1e4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "old spelling first": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    },
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}},
    "llama3 without an original length": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768}},
    "yarn without an original length": {"rope_scaling": YARN},
    "yarn, length beside it": {"rope_scaling": YARN, "original_max_position_embeddings": 2048},
    "yarn, factor from the lengths": {
        "rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096}
    },
    "yarn, betas": {"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 4.0, "truncate": False}},
    "yarn, given attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}},
    "yarn, mscale of zero": {"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 1.0}},
    "yarn that shrinks": {"rope_scaling": {**YARN, "factor": 1.0}},
}


@pytest.mark.parametrize("head_dim", [8, 64, 100, 128])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_transformers_to_the_bit(case: str, head_dim: int) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": head_dim, "num_hidden_layers": 1}
    shape |= {"vocab_size": 8, "intermediate_size": 8, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6}
    config = {"model_type": "llama", **shape, **CASES[case]}
    expected = LlamaRotaryEmbedding(LlamaConfig(**{k: _copied(v) for k, v in config.items()}))
    described = describe(config)
    assert described.rope is not None
    frequencies, factor = inverse_frequencies(described.rope, head_dim, described.max_positions)
    assert frequencies.dtype == np.float32
    np.testing.assert_array_equal(frequencies, expected.inv_freq.numpy())
    assert factor == expected.attention_scaling


def _copied(value: Any) -> Any:
    """Transformers writes into the dictionaries that it is given."""
    return dict(value) if isinstance(value, dict) else value
