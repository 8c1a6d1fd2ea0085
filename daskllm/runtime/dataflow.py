"""A graph of layers as Dask tasks, one task per node and named after it.

The tasks of a model carry its specification and a node's description, never weights: the process that runs a
task holds the layers that its tasks need, of the version that was present when the graph was made. What flows
between them is small. This is the road for looking, drawing, scoring one text, and for layers too big for one
device. A table is scored and embedded by `daskllm.session`, as it is answered: the engine's steps read each
weight once for the tokens of many texts and make only the logits that are wanted, where a layer's task has
one text alone and the last one logits for all of its tokens; on a small model that is twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.base import tokenize
from dask.delayed import Delayed, delayed

from daskllm.graph import LayerGraph, Node
from daskllm.models import layer_names
from daskllm.runtime.process import keeping
from daskllm.runtime.resident import model_for
from daskllm.runtime.sizes import graph_of

if TYPE_CHECKING:
    from daskllm.engine.pieces import Array, Past
    from daskllm.models import DecoderConfig
    from daskllm.types import ModelSpec

__all__ = ["decode", "evaluate", "forward", "logits"]

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "add": lambda *parts: sum(parts[1:], start=parts[0]),
}


def evaluate(graph: LayerGraph, weights: Mapping[str, Sequence[Array]], *inputs: Array) -> Delayed:
    """A graph written by hand, one Dask task per node.

    Args:
        graph: of nodes of the kinds "linear", "relu", "tanh", "sigmoid" and "add"; it has one last node.
        weights: for each "linear" node its weight ``[outputs, inputs]`` and, where it has one, its bias.
        inputs: for each node without predecessors its argument ``[rows, size]``, in the graph's order.

    Returns:
        The last node's result.

    Raises:
        ValueError: an unknown kind, or inputs or last nodes that do not match; the message names the node.
        KeyError: a "linear" node without weights.

    Example:
        >>> from daskllm.graph import LayerGraph, elementwise, linear
        >>> graph = LayerGraph.chain([linear("l1", 2, 1), elementwise("a1", "relu", 1)])
        >>> weights = {"l1": (np.array([[1.0, -1.0]]), np.array([0.5]))}
        >>> evaluate(graph, weights, np.array([[3.0, 1.0], [1.0, 3.0]])).compute(scheduler="sync").tolist()
        [[2.5], [0.0]]
    """
    token = tokenize(graph.to_json(), dict(weights), inputs)
    starts = [node.name for node in graph.order if not graph.predecessors(node.name)]
    if len(starts) != len(inputs):
        raise ValueError(
            f"the graph begins at {', '.join(starts)}: give {len(starts)} inputs, not {len(inputs)}"
        )
    given = dict(zip(starts, inputs, strict=True))
    results: dict[str, Any] = {}
    for node in graph.order:
        before = [results[name] for name in graph.predecessors(node.name)] or [given[node.name]]
        function, own = _function(node, weights)
        results[node.name] = _task(function, node.name, token, *before, *own)
    return results[_last(graph)]


def _function(
    node: Node, weights: Mapping[str, Sequence[Array]]
) -> tuple[Callable[..., Any], Sequence[Array]]:
    if node.kind == "linear":
        if node.name not in weights:
            raise KeyError(f"node {node.name!r} is linear and has no weights; given: {', '.join(weights)}")
        return _linear, weights[node.name]
    if node.kind not in _FUNCTIONS:
        raise ValueError(
            f"node {node.name!r} is of kind {node.kind!r}; known: linear, {', '.join(_FUNCTIONS)}"
        )
    return _FUNCTIONS[node.kind], ()


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    product: Array = x @ weight.T
    return product if bias is None else product + bias


def _last(graph: LayerGraph) -> str:
    ends = [node.name for node in graph.order if not graph.successors(node.name)]
    if len(ends) != 1:
        raise ValueError(f"the graph ends in {', '.join(ends)}: it must have one last node")
    return ends[0]


def _task(function: Callable[..., Any], name: str, token: str, *arguments: Any) -> Delayed:
    call = delayed(function, pure=True, traverse=False)
    task: Delayed = call(*arguments, dask_key_name=f"{name}-{token}")
    return task


def forward(
    spec: ModelSpec,
    graph: LayerGraph,
    ids: Sequence[int],
    stages: Iterable[Sequence[str]] | None = None,
) -> Delayed:
    """Logits of one sequence through its layers' tasks.

    Args:
        graph: the model's, opened as far as tasks are to go.
        ids: token ids, at least one.
        stages: names of nodes that are to be one task together, consecutive ones; None makes each its own.

    Returns:
        float32 ``[tokens, vocab]``.
    """
    token = tokenize(spec, tuple(ids), graph.to_json())
    if stages is not None:
        return _staged(spec, graph, ids, stages, token)
    results: dict[str, Any] = {}
    for node in graph.order:
        before = [results[name] for name in graph.predecessors(node.name)] or [list(ids)]
        results[node.name] = _task(
            _run_node, node.name, token, *before, spec, node.kind, dict(node.attributes)
        )
    return results[_last(graph)]


def _staged(
    spec: ModelSpec, graph: LayerGraph, ids: Sequence[int], stages: Iterable[Sequence[str]], token: str
) -> Delayed:
    flowing: Any = list(ids)
    for number, names in enumerate(stages):
        flowing = _task(_run_layers, f"stage.{number}", token, flowing, spec, tuple(names))
    return flowing


def _run_node(*arguments: Any) -> Array:
    from daskllm.engine.pieces import run_piece  # a scheduler that reads the graph needs no torch

    *given, spec, kind, attributes = arguments
    with keeping(spec):
        return run_piece(model_for(spec), kind, attributes, *given)


def _run_layers(flowing: Any, spec: ModelSpec, names: Sequence[str]) -> Array:
    from daskllm.engine.pieces import run_layer

    with keeping(spec):
        model = model_for(spec)
        for name in names:
            flowing, _ = run_layer(model, name, flowing)
    return flowing


def logits(
    spec: ModelSpec, config: DecoderConfig, token_ids: Sequence[int], fuse: str, shards: int
) -> Delayed:
    """Logits of one sequence, by a task per layer, per stage, or per shard of a layer.

    Raises:
        ValueError: an argument out of its range, or tokens that the model cannot take.
    """
    ids = _checked_ids(token_ids, config)
    if fuse not in ("layer", "stage"):
        raise ValueError(f'fuse must be "layer" or "stage", not {fuse!r}')
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise ValueError(f"shards must be an integer of at least 1, not {shards!r}")
    if shards > 1 and spec.quantize is not None:
        raise ValueError(f'shards={shards} cuts weights as they are: with quantize="{spec.quantize}" leave 1')
    if shards > 1:
        return forward(spec, LayerGraph.of(config, shards=shards).open_all(), ids)
    graph = graph_of(spec, config)
    if fuse == "layer":
        return forward(spec, graph, ids)
    chains = spec.chains
    stages = [stage.layers for stage in chains[0].stages] if chains else [layer_names(config)]
    return forward(spec, graph, ids, stages)


def _checked_ids(token_ids: Sequence[int], config: DecoderConfig, more: int = 0) -> list[int]:
    ids = [int(i) for i in token_ids]
    if not ids:
        raise ValueError("token_ids must hold at least one token")
    outside = [i for i in ids if not 0 <= i < config.vocab_size]
    if outside:
        raise ValueError(f"token id {outside[0]} is outside the model's vocabulary of {config.vocab_size}")
    if len(ids) + more > config.max_positions:
        raise ValueError(
            f"{len(ids) + more} positions do not fit the model's context of {config.max_positions}"
        )
    return ids


def decode(
    spec: ModelSpec,
    config: DecoderConfig,
    token_ids: Sequence[int],
    max_tokens: int,
    stop_ids: Iterable[int],
) -> Delayed:
    """Greedy generation through layer tasks: the graph grows by one row of layers with each token.

    A layer's keys and values are part of its task's result and go into its task for the next token. Tasks
    after an end token pass nothing on.

    Returns:
        The list of new token ids, the end token included.

    Raises:
        ValueError: tokens that the model cannot take.
    """
    ids, layers = _checked_ids(token_ids, config, max_tokens - 1), layer_names(config)
    ends = frozenset(stop_ids)
    token = tokenize(spec, tuple(ids), max_tokens, sorted(ends))
    pasts: dict[str, Any] = dict.fromkeys(layers)
    given: Any = list(ids)
    chosen = []
    for step in range(max_tokens):
        flowing = given
        for name in layers:
            flowing = _task(_step_layer, f"{name}.token.{step}", token, flowing, pasts[name], spec, name)
            pasts[name] = flowing
        given = _task(_pick, f"pick.token.{step}", token, flowing, ends)
        chosen.append(given)
    return _task(_collect, "tokens", token, *chosen)


def _step_layer(
    flowing: Any, past: tuple[Array, Past | None] | None, spec: ModelSpec, name: str
) -> tuple[Array, Past | None] | None:
    from daskllm.engine.pieces import run_layer

    if flowing is None or (isinstance(flowing, _Picked) and flowing.last):
        return None
    if isinstance(flowing, _Picked):
        given: Any = [flowing.token]
    else:
        given = flowing[0] if isinstance(flowing, tuple) else flowing
    with keeping(spec):
        return run_layer(model_for(spec), name, given, None if past is None else past[1])


@dataclass(frozen=True, slots=True)
class _Picked:
    """A token, and whether nothing comes after it."""

    token: int
    last: bool


def _pick(flowing: tuple[Array, Any] | None, ends: frozenset[int]) -> _Picked | None:
    if flowing is None:
        return None
    token = int(flowing[0][-1].argmax())
    return _Picked(token, token in ends)


def _collect(*chosen: _Picked | None) -> list[int]:
    return [picked.token for picked in chosen if picked is not None]
