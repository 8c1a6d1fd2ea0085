"""A row's logits are the same bits alone, in a batch, with its prompt in chunks, after preemption, on any
number of threads, and on keys and values that another row computed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from daskllm.engine import sampler
from daskllm.engine.kvcache import bytes_per_block
from daskllm.engine.sequence import SequenceState
from daskllm.session import Session
from daskllm.types import ModelSpec, SamplingParams
from tests import tiny

Seen = dict[tuple[int, ...], torch.Tensor]
CONFIGS = ("llama-gqa", "qwen3-bias-window", "gpt2-untied-gelu-odd", "llama-head-dim", "mistral-window")
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int8-float32": {"dtype": "float32", "quantize": "int8"},
    "kv8": {"dtype": "bfloat16", "kv_dtype": "int8"},
    "kv8-float32": {"dtype": "float32", "kv_dtype": "int8"},
    "int8-kv8": {"dtype": "bfloat16", "quantize": "int8", "kv_dtype": "int8"},
}
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


def rows(count: int = 12) -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(256) for _ in range(draw.choice((1, 7, 31, 33, 70, 140)))] for _ in range(count)]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every row of logits that a token was chosen from, by the tokens before it."""
    found: Seen = {}
    choose = sampler.choose

    def recording(logits: torch.Tensor, sequences: Sequence[SequenceState]) -> list[int]:
        for row, sequence in zip(logits, sequences, strict=True):
            found[tuple(sequence.tokens)] = row.clone()
        return choose(logits, sequences)

    monkeypatch.setattr(sampler, "choose", recording)
    monkeypatch.setattr(SequenceState, "takes_likeliest", False)  # which needs no logits
    return found


def run(path: Path, dtype: str, seen: Seen, prompts: list[list[int]], **changes: int) -> tuple[Seen, Session]:
    """What one way of running the prompts gives; changes: step_tokens, kv_memory, threads, at_once, reuse."""
    seen.clear()
    session = Session.open(ModelSpec(path=str(path), **DTYPES[dtype], kv_memory=changes.get("kv_memory")))
    try:
        session.engine._threads = changes.get("threads", torch.get_num_threads())
        session.engine.batcher.max_tokens = changes.get("step_tokens", 512)
        session.engine.batcher.reuse = bool(changes.get("reuse", True))
        session.engine.batcher.draft = None  # one row for a token; tests/engine/test_speculation.py has more
        size = changes.get("at_once", len(prompts))
        for start in range(0, len(prompts), size):
            session.generate(prompts[start : start + size], GREEDY)
    finally:
        session.close()
    return dict(seen), session


def block_bytes(session: Session) -> int:
    config, itemsize = session.config, session.model.kv_torch_dtype.itemsize
    return bytes_per_block(config.num_layers, config.num_kv_heads, config.head_dim, itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits(name: str, dtype: str, tmp_path: Path, seen: Seen) -> None:
    path = tiny.make_model(name, tmp_path / "model", dtype=DTYPES[dtype]["dtype"])
    prompts = rows()
    alone, _ = run(path, dtype, seen, prompts, at_once=1)
    assert len(alone) >= 40 * len(prompts) * 0.9

    def same(other: Seen) -> bool:
        return other.keys() == alone.keys() and all(torch.equal(other[k], alone[k]) for k in alone)

    batched, _ = run(path, dtype, seen, prompts)
    assert same(batched)
    chunked, _ = run(path, dtype, seen, prompts, step_tokens=13)
    assert same(chunked)
    one_thread, session = run(path, dtype, seen, prompts, threads=1)
    assert same(one_thread)
    small, session = run(path, dtype, seen, prompts, kv_memory=8 * block_bytes(session))
    assert same(small)
    assert session.engine.metrics.preemptions > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS[:3])
def test_rows_that_need_no_logits_choose_the_same(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.make_model(name, tmp_path / "model", dtype=DTYPES[dtype]["dtype"])
    session = Session.open(ModelSpec(path=str(path), **DTYPES[dtype]))
    session.engine.batcher.draft = None
    found, likeliest = [], session.engine.runner.likeliest
    session.engine.runner.likeliest = lambda x: found.append(len(x)) or likeliest(x)  # type: ignore[method-assign]

    def tokens() -> list[list[tuple[int, ...]]]:
        samples = session.generate(rows(), replace(GREEDY, n=2))
        return [[one.token_ids for one in both] for both in samples]

    try:
        without = tokens()
        steps = len(found)
        assert steps >= GREEDY.max_tokens
        monkeypatch.setattr(SequenceState, "takes_likeliest", False)
        assert tokens() == without
        assert len(found) == steps
    finally:
        session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "kv8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits_on_shared_blocks(name: str, dtype: str, tmp_path: Path, seen: Seen) -> None:
    path = tiny.make_model(name, tmp_path / "model", dtype=DTYPES[dtype]["dtype"])
    draw = random.Random(7)
    first, second = ([draw.randrange(256) for _ in range(n)] for n in (70, 96))
    tails = [[draw.randrange(256) for _ in range(n)] for n in (1, 5, 33, 40)]
    prompts = [prefix + tail for prefix in (first, second, first[:64] + second[:32]) for tail in tails]
    prompts += [first[:64], [*first[:64], 1], second]
    apart, session = run(path, dtype, seen, prompts, at_once=1, reuse=0)
    assert session.metrics.reused_tokens == 0

    small = 10 * block_bytes(session)
    ways: list[dict[str, int]] = [{}, {"at_once": 1}, {"step_tokens": 13}, {"kv_memory": small}]
    for way in ways:
        shared, session = run(path, dtype, seen, prompts, **way)
        assert shared.keys() == apart.keys()
        assert all(torch.equal(shared[k], apart[k]) for k in apart)
        metrics = session.metrics
        assert metrics.prompt_tokens == sum(map(len, prompts))
        assert metrics.reused_tokens >= 32 * 6
        if "kv_memory" in way:
            assert metrics.preemptions > 0
        else:  # every token was computed or found
            assert metrics.prefill_tokens + metrics.reused_tokens == metrics.prompt_tokens
