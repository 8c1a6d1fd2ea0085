"""Eight bits change a model a little and its size by half; where there are none they are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import daskllm
from daskllm.demo import model_path, tasks
from daskllm.engine import kernels
from daskllm.engine.kernels import reference
from daskllm.engine.layers import ResidentModel
from daskllm.engine.pieces import run_layer
from daskllm.session import Session
from daskllm.types import ModelSpec
from tests import tiny

CONFIGS = ("llama-gqa", "qwen3-bias-window", "gpt2-untied-gelu-odd", "llama-head-dim")
TEXTS = [[5, 9, 77, 201, 3, 5, 9, 100] * 6, list(range(200)), [7, 7]]


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Session]:
    session = Session.open(ModelSpec(path=str(path), **options))
    try:
        yield session
    finally:
        session.close()


def scores(path: Path, **options: Any) -> np.ndarray[Any, Any]:
    """Log-probability of every token of `TEXTS`."""
    with opened(path, **options) as session:
        return np.concatenate([s.token_logprobs for s in session.score(TEXTS)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_weights_are_close(name: str, dtype: str, tmp_path: Path) -> None:
    path = tiny.make_model(name, tmp_path / "model")
    exact, found = scores(path, dtype="float32"), scores(path, dtype=dtype, quantize="int8")
    # Random weights: 2 to 8.5% over all families, where bfloat16 alone is 1 to 3%.
    assert 0 < np.sqrt(np.square(found - exact).mean()) < 0.1 * exact.std()
    assert abs((found - exact).mean()) < 0.03


def test_sizes_count_bytes_as_they_are(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    whole = daskllm.load(path, dtype="bfloat16", answers=None)
    small = daskllm.load(path, dtype="bfloat16", quantize="int8", answers=None)
    for name, size in whole.residency()[""].items():
        held, planned = small.residency()[""][name], small.graph.node(name).weight_bytes
        assert held == size if name == "embed" else 0.5 * size < held < 0.75 * size
        # The smallest models have matrices that fill no whole panel.
        assert planned <= held < 1.3 * planned
    memory = [llm.plan.replicas[0].stages[0].memory.weights for llm in (whole, small)]
    assert memory[1] < 0.75 * memory[0]
    assert "quantize=int8" in repr(small)


def test_the_reference_kernels_have_the_same_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    fast = scores(path, dtype="float32", quantize="int8")
    monkeypatch.setattr(kernels, "select", lambda device, dtype: reference)
    assert np.abs(scores(path, dtype="float32", quantize="int8") - fast).max() < 5e-3


def test_the_bundled_model_answers_as_before() -> None:
    rows = tasks.sample(60, seed=3, of_held_out=True)
    llm = daskllm.load(model_path(), dtype="bfloat16", quantize="int8", answers=None)
    found = llm.chat([row.prompt for row in rows], max_tokens=48)
    assert sum(a.text.strip() == row.answer for a, row in zip(found, rows, strict=True)) >= 54
    llm.close()


def test_a_gpu_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    with pytest.raises(ValueError, match=r'quantize="int8" is for CPUs .*device="cuda"'):
        daskllm.load(path, quantize="int8", device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match=r'quantize="int8" is for CPUs .*add device="cpu"'):
        ResidentModel.open(ModelSpec(path=str(path), quantize="int8"))


def test_layer_tasks_are_quantised_and_shards_are_refused(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    llm = daskllm.load(path, quantize="int8", answers=None)
    logits = llm.delayed(TEXTS[0]).compute(scheduler="sync")
    chosen = np.take_along_axis(logits[:-1], np.array(TEXTS[0])[1:, None], 1)[:, 0]
    found = chosen - np.log(np.exp(logits[:-1].astype("float64")).sum(1))
    assert np.abs(found - llm.score([TEXTS[0]], tokens=True)[0]).max() < 1e-4
    with pytest.raises(ValueError, match=r'shards=2 .*quantize="int8"'):
        llm.delayed(TEXTS[0], shards=2)
    llm.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_keys_and_values_are_close(name: str, dtype: str, tmp_path: Path) -> None:
    path = tiny.make_model(name, tmp_path / "model")
    exact, found = scores(path, dtype="float32"), scores(path, dtype=dtype, kv_dtype="int8")
    plain = scores(path, dtype=dtype)
    # Random weights: up to 3%, as far as bfloat16 is from float32.
    assert 0 < np.sqrt(np.square(found - plain).mean()) < 0.045 * exact.std()
    assert abs((found - plain).mean()) < 0.01


def test_sizes_count_int8_keys_and_values(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    whole = daskllm.load(path, dtype="bfloat16", answers=None, kv_memory="1 MiB")
    small = daskllm.load(path, dtype="bfloat16", kv_dtype="int8", answers=None, kv_memory="1 MiB")
    # Heads of 16 numbers, whose values are padded to 32.
    blocks = [llm.session().engine.batcher.pool.size for llm in (whole, small)]
    assert blocks == [(1 << 20) // (3 * 2 * 32 * size) for size in ((16 + 32) * 2, 16 + 32 + 8)]
    for llm, each in ((whole, 2 * 16 * 2), (small, 2 * (16 + 4))):
        assert llm.graph.total("kv_bytes") == 3 * 2 * each
        llm.close()
    assert "kv_dtype=int8" in repr(small)


def test_the_reference_attends_in_eight_bits_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    fast = scores(path, dtype="float32", kv_dtype="int8")
    monkeypatch.setattr(kernels, "select", lambda device, dtype: reference)
    apart = scores(path, dtype="float32", kv_dtype="int8") - fast
    assert np.sqrt(np.square(apart).mean()) < 5e-3  # a key between two numbers may be rounded to either


def test_the_bundled_model_answers_as_before_with_all_in_eight_bits() -> None:
    rows = tasks.sample(60, seed=3, of_held_out=True)
    llm = daskllm.load(model_path(), dtype="bfloat16", quantize="int8", kv_dtype="int8", answers=None)
    found = llm.chat([row.prompt for row in rows], max_tokens=48)
    assert sum(a.text.strip() == row.answer for a, row in zip(found, rows, strict=True)) >= 54
    llm.close()


def test_int8_keys_and_values_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tiny.make_model("llama-tied-odd", tmp_path / "odd")
    with pytest.raises(ValueError, match=r'kv_dtype="int8" takes heads by fours .*head_dim=22.*"auto"'):
        daskllm.load(odd, kv_dtype="int8")
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    with pytest.raises(ValueError, match=r'kv_dtype="int8" is for CPUs .*device="cuda"'):
        daskllm.load(path, kv_dtype="int8", device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match=r'kv_dtype="int8" is for CPUs .*add device="cpu"'):
        ResidentModel.open(ModelSpec(path=str(path), kv_dtype="int8"))


def test_layer_tasks_keep_int8_keys_and_values(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    llm = daskllm.load(path, kv_dtype="int8", answers=None)
    ids = TEXTS[0]
    expected = llm.score([ids], tokens=True)[0]
    for shards in (1, 2):
        logits = llm.delayed(ids, shards=shards).compute(scheduler="sync")
        chosen = np.take_along_axis(logits[:-1], np.array(ids)[1:, None], 1)[:, 0]
        found = chosen - np.log(np.exp(logits[:-1].astype("float64")).sum(1))
        assert np.abs(found - expected).max() < 1e-3
    with opened(path, dtype="float32", kv_dtype="int8") as session:
        model, past, hidden = session.model, None, run_layer(session.model, "embed", ids)[0]
        whole, _ = run_layer(model, "layers.0", hidden)
        parts = []
        for start in range(0, len(ids), 20):
            out, past = run_layer(model, "layers.0", hidden[start : start + 20], past)
            parts.append(out)
        assert np.array_equal(np.concatenate(parts), whole)
    llm.close()
