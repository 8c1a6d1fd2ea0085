"""Models and small graphs as Dask tasks: the same logits and tokens as the engine, task by task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client

import daskllm
from daskllm.graph import LayerGraph, elementwise, linear
from daskllm.llm import LLM
from daskllm.runtime.dataflow import evaluate
from tests import tiny

FAMILIES = ("gpt2", "llama-gqa", "qwen2-layer-types", "qwen3-bias-window", "mistral-window")
IDS = [5, 9, 200, 31, 31, 7, 100, 42, 8, 250, 1, 77, 3, 3, 60, 18, 19, 20, 21]


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    llm = daskllm.load(path)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def expected(path: Path) -> np.ndarray:
    with torch.inference_mode():
        return tiny.oracle(path)(torch.tensor([IDS])).logits[0].numpy()


def names(task: object) -> set[str]:
    return {str(key).rpartition("-")[0] for key in task.__dask_graph__()}  # type: ignore[attr-defined]


def test_one_task_per_layer(llm: LLM, expected: np.ndarray) -> None:
    logits = llm.delayed(IDS)
    layers = {f"layers.{i}" for i in range(llm.config.num_layers)}
    assert names(logits) == {"embed", "head"} | layers
    found = logits.compute(scheduler="threads")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_one_task_per_stage(llm: LLM, expected: np.ndarray) -> None:
    logits = llm.delayed(IDS, fuse="stage")
    assert names(logits) == {"stage.0"}
    np.testing.assert_allclose(logits.compute(scheduler="sync"), expected, atol=1e-4)


def test_shards_are_parallel_tasks_that_are_summed(llm: LLM, expected: np.ndarray) -> None:
    logits = llm.delayed(IDS, shards=2)
    found = names(logits)
    heads = min(2, llm.config.num_kv_heads)
    assert {f"layers.0.attention.heads.{i}" for i in range(heads)} <= found
    assert {"layers.0.mlp.columns.0", "layers.0.mlp.columns.1", "layers.0.attention.sum"} <= found
    np.testing.assert_allclose(logits.compute(scheduler="threads"), expected, atol=1e-4)


def test_generation_through_tasks_is_the_engines(llm: LLM) -> None:
    answer = llm.generate([IDS], max_tokens=8, ignore_eos=True)[0]
    tokens = llm.delayed(IDS, max_tokens=8, ignore_eos=True)
    assert {"layers.1.token.7", "pick.token.0"} <= names(tokens)
    assert tokens.compute(scheduler="threads") == list(answer.token_ids)


def test_generation_through_tasks_stops_at_an_end_token(llm: LLM) -> None:
    free = llm.delayed(IDS, max_tokens=6, ignore_eos=True).compute(scheduler="sync")
    end = free[2]
    stopped = llm.delayed(IDS, max_tokens=6, stop_token_ids=[end]).compute(scheduler="sync")
    assert stopped == free[: free.index(end) + 1]


def test_bad_calls(llm: LLM) -> None:
    for arguments, words in (
        ({"fuse": "block"}, "fuse must be"),
        ({"shards": 0}, "shards"),
        ({"shards": 2, "max_tokens": 3}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            llm.delayed(IDS, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token"):
        llm.delayed([])
    with pytest.raises(ValueError, match="vocabulary"):
        llm.delayed([1, 10**6])


@pytest.mark.cluster
def test_on_processes_of_a_cluster(two_processes: Client, path: Path, expected: np.ndarray) -> None:
    llm = daskllm.load(path, client=two_processes)
    np.testing.assert_allclose(llm.delayed(IDS).compute(), expected, atol=1e-4)
    graph = llm.delayed(IDS, shards=2).__dask_graph__()
    assert sum(len(str(task)) for task in graph.values()) < 100_000


def test_the_three_layer_perceptron() -> None:
    """x·W1+b1 → ReLU → ·W2+b2 → tanh → ·W3+b3 → σ."""
    graph = LayerGraph.chain(
        [
            linear("linear1", 4, 8),
            elementwise("relu", "relu", 8),
            linear("linear2", 8, 6),
            elementwise("tanh", "tanh", 6),
            linear("linear3", 6, 1),
            elementwise("sigmoid", "sigmoid", 1),
        ]
    )
    draw = np.random.default_rng(0)
    weights = {
        f"linear{i}": (draw.normal(size=(out, into)), draw.normal(size=out))
        for i, (into, out) in enumerate(((4, 8), (8, 6), (6, 1)), 1)
    }
    x = draw.normal(size=(5, 4))
    answer = evaluate(graph, weights, x)
    assert names(answer) == {"linear1", "relu", "linear2", "tanh", "linear3", "sigmoid"}
    (w1, b1), (w2, b2), (w3, b3) = weights.values()
    hidden = np.tanh(np.maximum(x @ w1.T + b1, 0) @ w2.T + b2)
    np.testing.assert_allclose(answer.compute(scheduler="threads"), 1 / (1 + np.exp(-(hidden @ w3.T + b3))))


def test_a_graph_that_cannot_run_says_why() -> None:
    graph = LayerGraph.chain([linear("a", 2, 2), elementwise("b", "softmax", 2)])
    x = np.zeros((1, 2))
    with pytest.raises(KeyError, match="'a'"):
        evaluate(graph, {}, x)
    with pytest.raises(ValueError, match="softmax"):
        evaluate(graph, {"a": (np.eye(2),)}, x)
    with pytest.raises(ValueError, match="1 inputs"):
        evaluate(graph, {"a": (np.eye(2),)})
