"""A decoder's graph from its description alone: no weights are opened.

Owns the counts of a transformer decoder: parameters, FLOPs, KV and activation bytes of the embedding, of
attention and MLP blocks and of the head, whole or cut into head groups, MLP columns and vocabulary shards.
Refuses to know devices and families. The FLOPs are those of the matrix products (two per weight and token)
and of attention (four per head, head dimension, token and visible position), plus the small elementwise
ones; see Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from daskllm.graph.nodes import Edge, Node, Opening

if TYPE_CHECKING:
    from daskllm.models.description import DecoderConfig

__all__ = ["ITEMSIZE", "decoder_opening"]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of one number under each dtype name."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The numbers that the builders below share."""

    config: DecoderConfig
    item: int
    shards: int
    quantized: bool
    kv_item: int
    kv_scale: int

    def linear(self, weights: int, channels: int, biases: int = 0) -> int:
        """Bytes of matrices with so many weights, output channels and biases."""
        if not self.quantized:
            return (weights + biases) * self.item
        return weights + 4 * (channels + biases)  # scales and biases are float32

    @property
    def norm(self) -> int:
        return self.config.hidden_size * (1 if self.config.norm == "rms" else 2)

    def cuts(self, total: int) -> list[tuple[int, int]]:
        """``total`` things as nearly equal runs, (start, stop), none of them empty."""
        count = min(self.shards, total)
        sizes = [total // count + (i < total % count) for i in range(count)]
        return [(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def decoder_opening(
    config: DecoderConfig, dtype: str, shards: int, quantize: str | None = None, kv_dtype: str = "auto"
) -> Opening:
    """Embedding, blocks and head of a decoder, in order, each with its own inside.

    Args:
        dtype: of weights, activations and KV.
        shards: head groups, MLP columns and vocabulary shards that a block opens into.
        quantize: "int8" for matrices of one byte a weight and a float32 scale for each output channel.
        kv_dtype: "int8" for KV of one byte a number and a float32 scale for each key and value of a head.

    Raises:
        ValueError: unknown dtype or quantisation, or ``shards`` below 1.
    """
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, not {dtype!r}")
    if quantize not in (None, "int8"):
        raise ValueError(f'quantize must be None or "int8", not {quantize!r}')
    if kv_dtype not in ("auto", "int8"):
        raise ValueError(f'kv_dtype must be "auto" or "int8", not {kv_dtype!r}')
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise ValueError(f"shards must be an integer of at least 1, not {shards!r}")
    item = ITEMSIZE[dtype]
    kv = (item, 0) if kv_dtype == "auto" else (1, 4)
    sizes = _Sizes(config, item, shards, quantize is not None, *kv)
    whole = replace(sizes, shards=1)
    nodes = [_whole("embed", "embed", _embed(whole), _embed(sizes))]
    nodes += [
        _whole(f"layers.{i}", "layer", _layer(whole, i), _layer(sizes, i)) for i in range(config.num_layers)
    ]
    nodes.append(_whole("head", "head", _head(whole), _head(sizes)))
    if config.tied and not sizes.quantized:
        nodes[-1] = replace(nodes[-1], tied=("embed", config.vocab_size * config.hidden_size * sizes.item))
    edges = [Edge(a.name, b.name) for a, b in pairwise(nodes)]
    return Opening(tuple(nodes), tuple(edges), ("embed",), ("head",))


def _whole(name: str, kind: str, parts: Opening, inside: Opening) -> Node:
    """A node whose counts are the sums over ``parts`` (its uncut inside); it opens into ``inside``."""
    nodes = parts.nodes
    touched = [
        n.weight_bytes if n.weight_bytes_per_token is None else n.weight_bytes_per_token for n in nodes
    ]
    partial = any(n.weight_bytes_per_token is not None for n in nodes)
    return Node(
        name,
        kind,
        weight_bytes=sum(n.weight_bytes for n in nodes),
        weight_bytes_per_token=sum(touched) if partial else None,
        flops_per_token=sum(n.flops_per_token for n in nodes),
        flops_per_position=sum(n.flops_per_position for n in nodes),
        kv_bytes=sum(n.kv_bytes for n in nodes),
        activation_bytes=max(n.activation_bytes for n in nodes),
        output_bytes=next(n.output_bytes for n in nodes if n.name == parts.exits[-1]),
        window=next((n.window for n in nodes if n.window is not None), None),
        last_only=all(n.last_only for n in nodes),
        attributes={"layer": _layer_of(name)},
        inside=inside,
    )


def _layer_of(name: str) -> str:
    """The layer that the blocks of a node belong to."""
    pieces = name.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "layers" else pieces[0]


def _fan(first: list[Node], middle: list[Node], last: Node) -> Opening:
    """``first`` (none or one) feeds every node of ``middle``, and all of those feed ``last``."""
    edges = [Edge(f.name, m.name) for f in first for m in middle] + [Edge(m.name, last.name) for m in middle]
    entries = tuple(n.name for n in first or middle)
    return Opening((*first, *middle, last), tuple(edges), entries, (last.name,))


def _embed(s: _Sizes) -> Opening:
    c, hidden = s.config, s.config.hidden_size * s.item
    shards = [
        Node(
            f"embed.shards.{i}",
            "embed_shard",
            weight_bytes=(stop - start) * hidden,
            weight_bytes_per_token=hidden,
            activation_bytes=hidden,
            output_bytes=hidden,
            attributes={"layer": "embed", "blocks": ["tokens.weight"], "rows": [start, stop]},
        )
        for i, (start, stop) in enumerate(s.cuts(c.vocab_size))
    ]
    places = c.rope is None
    total = Node(
        "embed.sum",
        "sum",
        weight_bytes=c.max_positions * hidden if places else 0,
        weight_bytes_per_token=hidden if places else None,
        flops_per_token=(len(shards) - 1 + places) * c.hidden_size,
        activation_bytes=2 * hidden,
        output_bytes=hidden,
        attributes={"layer": "embed", "blocks": ["positions.weight"] if places else []},
    )
    return _fan([], shards, total)


def _head(s: _Sizes) -> Opening:
    c = s.config
    norm = replace(_norm("head.norm", s), last_only=True)
    cuts = s.cuts(c.vocab_size)
    shards = [
        Node(
            f"head.shards.{i}",
            "vocabulary_shard",
            weight_bytes=s.linear((stop - start) * c.hidden_size, stop - start),
            flops_per_token=2 * c.hidden_size * (stop - start),
            activation_bytes=(c.hidden_size + stop - start) * s.item,
            output_bytes=(stop - start) * s.item,
            last_only=True,
            # In eight bits the head is a copy of its own, not the embedding.
            tied=(f"embed.shards.{i}", (stop - start) * c.hidden_size * s.item)
            if c.tied and not s.quantized
            else None,
            attributes={"layer": "head", "blocks": ["lm_head.weight"], "rows": [start, stop]},
        )
        for i, (start, stop) in enumerate(cuts)
    ]
    # Logits leave the model as float32 whatever its dtype, because sampling works on them.
    total = Node(
        "head.concat",
        "concat",
        activation_bytes=4 * c.vocab_size,
        output_bytes=4 * c.vocab_size,
        last_only=True,
        attributes={"layer": "head", "blocks": []},
    )
    return _fan([norm], shards, total)


def _norm(name: str, s: _Sizes) -> Node:
    layer = _layer_of(name)
    block = "norm" if layer == "head" else "input_norm" if ".attention." in name else "post_norm"
    hidden = s.config.hidden_size
    return Node(
        name,
        "norm",
        weight_bytes=s.norm * s.item,
        flops_per_token=4 * hidden,
        activation_bytes=2 * hidden * s.item,
        output_bytes=hidden * s.item,
        attributes={
            "layer": layer,
            "blocks": [f"{block}.weight"] + ([f"{block}.bias"] if s.norm > hidden else []),
        },
    )


def _layer(s: _Sizes, index: int) -> Opening:
    """Attention and MLP, each added to the residual stream that runs around it."""
    name, whole = f"layers.{index}", replace(s, shards=1)
    attention = _whole(f"{name}.attention", "attention", _attention(whole, index), _attention(s, index))
    mlp = _whole(f"{name}.mlp", "mlp", _mlp(whole, index), _mlp(s, index))
    after_attention, after_mlp = _add(f"{name}.attention_residual", s), _add(f"{name}.mlp_residual", s)
    edges = (
        Edge(attention.name, after_attention.name),
        Edge(after_attention.name, mlp.name),
        Edge(after_attention.name, after_mlp.name),
        Edge(mlp.name, after_mlp.name),
    )
    nodes = (attention, after_attention, mlp, after_mlp)
    return Opening(nodes, edges, (after_attention.name, attention.name), (after_mlp.name,))


def _add(name: str, s: _Sizes) -> Node:
    hidden = s.config.hidden_size
    return Node(
        name,
        "add",
        flops_per_token=hidden,
        activation_bytes=3 * hidden * s.item,
        output_bytes=hidden * s.item,
        attributes={"layer": _layer_of(name), "blocks": []},
    )


def _attention(s: _Sizes, index: int) -> Opening:
    c, name = s.config, f"layers.{index}.attention"
    blocks = [f"{b}.weight" for b in "qkvo"] + ([f"{b}.bias" for b in "qkv"] if c.qkv_bias else [])
    blocks += ["q_norm.weight", "k_norm.weight"] if c.qk_norm else []
    group = c.num_heads // c.num_kv_heads
    groups = []
    for i, (start, stop) in enumerate(s.cuts(c.num_kv_heads)):
        keys, queries = (stop - start) * c.head_dim, (stop - start) * group * c.head_dim
        weights = (2 * queries + 2 * keys) * c.hidden_size
        biases = queries + 2 * keys if c.qkv_bias else 0
        groups.append(
            Node(
                f"{name}.heads.{i}",
                "head_group",
                # A group needs the head norms whole, so cutting repeats their 2 x head_dim numbers.
                weight_bytes=s.linear(weights, queries + 2 * keys + c.hidden_size, biases)
                + (2 * c.head_dim * s.item if c.qk_norm else 0),
                flops_per_token=2 * weights + biases,
                flops_per_position=4 * queries,
                kv_bytes=2 * (keys * s.kv_item + (stop - start) * s.kv_scale),
                activation_bytes=(2 * c.hidden_size + 2 * queries + 2 * keys) * s.item,
                output_bytes=c.hidden_size * s.item,
                window=c.windows[index] if c.windows else None,
                attributes={"layer": f"layers.{index}", "blocks": blocks, "kv_heads": [start, stop]},
            )
        )
    return _fan([_norm(f"{name}.norm", s)], groups, _sum(f"{name}.sum", s, len(groups), "o", c.o_bias))


def _mlp(s: _Sizes, index: int) -> Opening:
    c, name = s.config, f"layers.{index}.mlp"
    ins = 2 if c.gated else 1
    up = ["gate", "up"] if c.gated else ["up"]
    blocks = [f"{b}.weight" for b in (*up, "down")] + ([f"{b}.bias" for b in up] if c.mlp_bias else [])
    columns = []
    for i, (start, stop) in enumerate(s.cuts(c.intermediate_size)):
        width = stop - start
        weights, biases = (ins + 1) * width * c.hidden_size, ins * width if c.mlp_bias else 0
        columns.append(
            Node(
                f"{name}.columns.{i}",
                "mlp_columns",
                weight_bytes=s.linear(weights, ins * width + c.hidden_size, biases),
                flops_per_token=2 * weights + biases + 4 * width,
                activation_bytes=(2 * c.hidden_size + ins * width) * s.item,
                output_bytes=c.hidden_size * s.item,
                attributes={"layer": f"layers.{index}", "blocks": blocks, "columns": [start, stop]},
            )
        )
    return _fan([_norm(f"{name}.norm", s)], columns, _sum(f"{name}.sum", s, len(columns), "down", c.mlp_bias))


def _sum(name: str, s: _Sizes, parts: int, block: str, bias: bool) -> Node:
    hidden = s.config.hidden_size
    return Node(
        name,
        "sum",
        weight_bytes=hidden * s.item if bias else 0,
        flops_per_token=(parts - 1 + bias) * hidden,
        activation_bytes=(parts + 1) * hidden * s.item,
        output_bytes=hidden * s.item,
        attributes={"layer": _layer_of(name), "blocks": [f"{block}.bias"] if bias else []},
    )
