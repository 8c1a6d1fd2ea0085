"""One node of a model's graph at a time, over whole sequences: for tasks that are layers, or parts of layers.

A piece is named by its kind and its attributes as `daskllm.graph` draws them: a layer, a group of heads, some
columns of the MLP, a shard of the vocabulary, and the norms and sums between them. What flows between pieces
are float32 NumPy arrays (a bfloat16 or float16 value is one exactly), so that a result can lie on any worker.
It refuses to batch and to keep state: whoever continues a sequence hands a layer's keys and values back in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.kernels import reference
from daskllm.engine.kvcache import KVCache, blocks_for
from daskllm.engine.layers import DecoderLayer, ResidentModel
from daskllm.engine.runner import Runner

__all__ = ["Array", "Past", "run_layer", "run_piece"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Past:
    """A layer's keys and values of the positions so far: a cache's blocks, each number as a float32."""

    positions: int
    keys: Array
    values: Array


@torch.inference_mode()
def run_layer(
    model: ResidentModel, name: str, given: Array | Sequence[int], past: Past | None = None
) -> tuple[Array, Past | None]:
    """One whole layer over consecutive positions of one sequence.

    Args:
        name: "embed", "layers.0" … or "head".
        given: token ids for "embed" (int, [tokens]); the residual stream for the others (float32
            [tokens, hidden]).
        past: what the call for the positions before gave; None at the beginning of a sequence. "embed" takes
            a past for its positions alone.

    Returns:
        The residual stream, or logits (float32 [tokens, vocab]) for "head"; and the past for the next call.
    """
    start, count = (0 if past is None else past.positions), len(given)
    layer = model.layer(name)
    attends = isinstance(layer, DecoderLayer)
    cache = _cache(model, int(attends), start + count, past if attends else None)
    runner = Runner(model.config, [layer], cache, model.kernels, model.angles, model.device)
    tokens = [int(t) for t in given] if name == "embed" else [0] * count
    batch = _batch(model, tokens, start)
    hidden = None if name == "embed" else _in(model, given)
    rows = runner.run(batch, hidden)
    out = _out(runner.logits(rows) if name == "head" else rows)
    if name == "embed":
        empty = np.zeros(0, np.float32)
        return out, Past(start + count, empty, empty)
    return out, Past(start + count, _out(cache.keys[0]), _out(cache.values[0])) if attends else None


def _cache(model: ResidentModel, layers: int, positions: int, past: Past | None) -> KVCache:
    config = model.config
    blocks = blocks_for(positions)
    kv = model.kv_torch_dtype
    cache = KVCache(blocks, layers, config.num_kv_heads, config.head_dim, kv, model.device)
    if past is not None:
        for tensor, held in ((cache.keys[0], past.keys), (cache.values[0], past.values)):
            tensor[: len(held)] = torch.tensor(held, dtype=kv, device=model.device)
    return cache


def _batch(model: ResidentModel, tokens: Sequence[int], start: int = 0) -> Batch:
    blocks = range(blocks_for(start + len(tokens)))
    return Batch.of([Chunk(tokens, start, blocks, range(len(tokens)))], model.device)


def _in(model: ResidentModel, array: Array | Sequence[Any]) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=model.torch_dtype, device=model.device)


def _out(tensor: torch.Tensor) -> Array:
    return tensor.float().cpu().numpy()


@torch.inference_mode()
def run_piece(model: ResidentModel, kind: str, attributes: Mapping[str, Any], *given: Array) -> Array:
    """One node of the graph over a whole sequence.

    Args:
        kind, attributes: as the node has them.
        given: the results of the nodes before it, in the order of the edges; token ids for those that have
            none.

    Raises:
        ValueError: a kind that no decoder has.
    """
    layer = attributes["layer"]
    if kind in ("embed", "layer", "head"):
        return run_layer(model, layer, given[0])[0]
    if kind not in _PIECES:
        raise ValueError(f"no piece of a decoder is of kind {kind!r}; there are {', '.join(sorted(_PIECES))}")
    return _PIECES[kind](model, attributes, *given)


def _norm(model: ResidentModel, attributes: Mapping[str, Any], hidden: Array) -> Array:
    config = model.config
    weight, *bias = (model.block(attributes["layer"], name) for name in attributes["blocks"])
    x = model.kernels.add_norm(
        None, _in(model, hidden), weight, bias[0] if bias else None, config.norm_eps, config.norm
    )
    return _out(x)


def _head_group(model: ResidentModel, attributes: Mapping[str, Any], normed: Array) -> Array:
    """The query heads of some key-value heads, and their part of the output product."""
    config, kernels, layer = model.config, model.kernels, attributes["layer"]
    first, last = attributes["kv_heads"]
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    keys, queries = slice(first * size, last * size), slice(first * group * size, last * group * size)
    rows = {"q": queries, "k": keys, "v": keys}
    weights = [model.block(layer, f"{name}.weight")[rows[name]] for name in "qkv"]
    biases = [model.block(layer, f"{name}.bias")[rows[name]] for name in "qkv"] if config.qkv_bias else None
    x = _in(model, normed)
    qkv = reference.linear(x, reference.pack(weights, biases))
    cache = KVCache(blocks_for(len(x)), 1, last - first, size, model.kv_torch_dtype, model.device)
    batch = _batch(model, [0] * len(x))
    norms = None
    if config.qk_norm:
        norms = model.block(layer, "q_norm.weight"), model.block(layer, "k_norm.weight")
    angles = model.angles.upto(len(x))
    q = kernels.rope_store(qkv, cache.keys[0], cache.values[0], batch, angles, norms, config.norm_eps)
    window = config.windows[int(layer.split(".")[1])]
    mixed = kernels.attention(q, cache.keys[0], cache.values[0], batch, window, config.attention_scale)
    return _out(F.linear(mixed, model.block(layer, "o.weight")[:, queries]))


def _mlp_columns(model: ResidentModel, attributes: Mapping[str, Any], normed: Array) -> Array:
    config, layer, columns = model.config, attributes["layer"], slice(*attributes["columns"])
    names = ("gate", "up") if config.gated else ("up",)
    weights = [model.block(layer, f"{name}.weight")[columns] for name in names]
    biases = [model.block(layer, f"{name}.bias")[columns] for name in names] if config.mlp_bias else None
    inner = reference.linear(_in(model, normed), reference.pack(weights, biases))
    inner = model.kernels.activate(inner, config.activation, config.gated)
    return _out(F.linear(inner, model.block(layer, "down.weight")[:, columns]))


def _sum(model: ResidentModel, attributes: Mapping[str, Any], *parts: Array) -> Array:
    total = np.stack(parts).sum(axis=0, dtype=np.float32)
    for name in attributes["blocks"]:
        block = _out(model.block(attributes["layer"], name))
        total = total + (block[: len(total)] if name == "positions.weight" else block)
    return _out(_in(model, total))


def _embed_shard(model: ResidentModel, attributes: Mapping[str, Any], ids: Array) -> Array:
    """The rows of the tokens in this shard, zeros for the others."""
    start, stop = attributes["rows"]
    tokens = torch.tensor(np.asarray(ids), dtype=torch.int64, device=model.device)
    here = (tokens >= start) & (tokens < stop)
    table = model.block("embed", "tokens.weight")[start:stop]
    rows = F.embedding((tokens - start).clamp(0, stop - start - 1), table)
    return _out(rows.masked_fill(~here[:, None], 0))


def _vocabulary_shard(model: ResidentModel, attributes: Mapping[str, Any], normed: Array) -> Array:
    weight = model.block("head", "lm_head.weight")[slice(*attributes["rows"])]
    return _out(F.linear(_in(model, normed), weight))


_PIECES: Mapping[str, Callable[..., Array]] = {
    "norm": _norm,
    "head_group": _head_group,
    "mlp_columns": _mlp_columns,
    "sum": _sum,
    "add": _sum,
    "embed_shard": _embed_shard,
    "vocabulary_shard": _vocabulary_shard,
    "concat": lambda model, attributes, *parts: np.concatenate(parts, -1),
}
