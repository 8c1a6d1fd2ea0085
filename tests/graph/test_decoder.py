"""Counts of a decoder, against the shapes of its blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from daskllm.graph import LayerGraph, Step
from daskllm.models.description import layer_names
from tests.graph.instances import decoder

OPTIONS: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"qk_norm": True},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "norm": "layer"},
    {"gated": False, "rope": None, "norm": "layer", "mlp_bias": True},
    {"num_kv_heads": 1},
    {"num_kv_heads": 8, "head_dim": 16},
    {"windows": (4, None, 4, None)},
]


def parameters(config: Any) -> dict[str, int]:
    """Numbers in each layer, block by block as the description's table lists them."""
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm = h * (2 if config.norm == "layer" else 1)
    layer = 2 * norm + q * h + 2 * k * h + h * q + (3 if config.gated else 2) * i * h
    layer += (q + 2 * k) * config.qkv_bias + h * config.o_bias + 2 * config.head_dim * config.qk_norm
    layer += ((2 if config.gated else 1) * i + h) * config.mlp_bias
    embed = v * h + (config.max_positions * h if config.rope is None else 0)
    return {"embed": embed, "head": norm + v * h, **{f"layers.{n}": layer for n in range(config.num_layers)}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_weights_are_those_of_the_blocks(options: dict[str, Any], dtype: str, item: int) -> None:
    config = decoder(**options)
    graph = LayerGraph.of(config, dtype)
    assert tuple(n.name for n in graph.order) == layer_names(config)
    assert {n.name: n.weight_bytes for n in graph.nodes} == {
        k: item * p for k, p in parameters(config).items()
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_int8_matrices_take_a_byte_a_weight_and_a_scale_a_channel(options: dict[str, Any]) -> None:
    config = decoder(**options)
    whole, small = LayerGraph.of(config, "bfloat16"), LayerGraph.of(config, "bfloat16", quantize="int8")
    assert small.node("embed") == whole.node("embed")
    h, q, k = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    up = (2 if config.gated else 1) * config.intermediate_size
    weights, channels = (2 * q + 2 * k) * h + (up + config.intermediate_size) * h, q + 2 * k + up + 2 * h
    biases = (q + 2 * k) * config.qkv_bias + up * config.mlp_bias
    saved = 2 * (weights + biases) - weights - 4 * (channels + biases)
    assert small.node("layers.0").weight_bytes == whole.node("layers.0").weight_bytes - saved
    saved = config.vocab_size * (h - 4)
    assert small.node("head").weight_bytes == whole.node("head").weight_bytes - saved
    assert small.node("head").tied is None
    assert small.total("kv_bytes") == whole.total("kv_bytes")
    with pytest.raises(ValueError, match="quantize must be None"):
        LayerGraph.of(config, quantize="int4")


@pytest.mark.parametrize("options", OPTIONS)
def test_int8_keys_and_values_take_a_byte_a_number_and_a_scale_a_head(options: dict[str, Any]) -> None:
    config = decoder(**options)
    whole, small = LayerGraph.of(config, "bfloat16"), LayerGraph.of(config, "bfloat16", kv_dtype="int8")
    heads = config.num_layers * config.num_kv_heads
    assert whole.total("kv_bytes") == 2 * heads * config.head_dim * 2
    assert small.total("kv_bytes") == 2 * heads * (config.head_dim + 4)
    assert small.open_all().total("kv_bytes") == small.total("kv_bytes")
    assert small.total("weight_bytes") == whole.total("weight_bytes")
    with pytest.raises(ValueError, match="kv_dtype must be"):
        LayerGraph.of(config, kv_dtype="fp8")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shards", [1, 3, 4])
def test_what_is_inside_adds_up(options: dict[str, Any], shards: int) -> None:
    config = decoder(**options)
    graph = LayerGraph.of(config, shards=shards)
    leaves = graph.open_all()
    repeated = 0
    if config.qk_norm:  # each head group needs the head norms whole
        groups = min(shards, config.num_kv_heads)
        repeated = (groups - 1) * 2 * config.head_dim * 4 * config.num_layers
    assert leaves.total("weight_bytes") == graph.total("weight_bytes") + repeated
    assert leaves.total("kv_bytes") == graph.total("kv_bytes")
    assert leaves.total("flops_per_position") == graph.total("flops_per_position")
    # Sums of more parts take a few more additions.
    assert leaves.total("flops_per_token") == pytest.approx(graph.total("flops_per_token"), rel=0.1)
    assert all(n.inside is None for n in leaves.nodes)


def test_flops_are_two_per_weight_and_four_per_visible_position() -> None:
    config = decoder()
    layer = LayerGraph.of(config).node("layers.0")
    matrices = parameters(config)["layers.0"] - 2 * config.hidden_size
    assert layer.flops_per_token == pytest.approx(2 * matrices, rel=0.03)
    assert layer.flops_per_position == 4 * config.num_heads * config.head_dim
    assert layer.kv_bytes == 2 * config.num_kv_heads * config.head_dim * 4


def test_a_window_bounds_attention() -> None:
    graph = LayerGraph.of(decoder(windows=(4, None, 4, None)))
    step = Step(context=100)
    near, far = graph.node("layers.0"), graph.node("layers.1")
    assert far.flops(step) - near.flops(step) == near.flops_per_position * 96
    assert far.traffic(step) - near.traffic(step) == near.kv_bytes * 96


def test_head_groups_hold_whole_kv_heads() -> None:
    leaves = LayerGraph.of(decoder(), shards=3).open_all()
    groups = [n for n in leaves.nodes if n.name.startswith("layers.0.attention.heads.")]
    assert [n.attributes["kv_heads"] for n in groups] == [[0, 2], [2, 3], [3, 4]]
    columns = [n.attributes["columns"] for n in leaves.nodes if n.name.startswith("layers.0.mlp.columns.")]
    assert columns[0][0] == 0
    assert columns[-1][1] == 160
    assert all(a[1] == b[0] for a, b in itertools.pairwise(columns))


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        LayerGraph.of(decoder(), "float12")
    with pytest.raises(ValueError, match="shards must be"):
        LayerGraph.of(decoder(), shards=0)
