from __future__ import annotations

import pytest

from daskllm.checkpoint import open_checkpoint
from daskllm.demo import model_path
from daskllm.metrics import EngineMetrics, StepRecord, error_kind
from daskllm.session import Session
from daskllm.types import ModelSpec, RowError, SamplingParams


def step(seconds: float, prefill: int, decode: int) -> StepRecord:
    return StepRecord(0.0, seconds, prefill, decode, 1, 0, 1, 1)


def test_a_step_of_one_kind_counts_for_it_alone_and_a_mixed_one_for_both() -> None:
    metrics = EngineMetrics()
    metrics.record(step(3.0, 100, 0))
    metrics.record(step(2.0, 0, 8))
    assert (metrics.prefill_seconds, metrics.decode_seconds) == (3.0, 2.0)
    metrics.record(step(4.0, 10, 10))
    assert metrics.prefill_seconds + metrics.decode_seconds == metrics.busy_seconds == 9.0
    assert 3.0 < metrics.prefill_seconds < 7.0


def test_mixed_steps_are_divided_by_what_tokens_were_seen_to_cost() -> None:
    metrics = EngineMetrics()
    for prefill, decode in [(100, 0), (0, 10), (50, 5), (80, 8)] * 64:
        metrics.record(step(0.001 * prefill + 0.03 * decode, prefill, decode))
    before = metrics.prefill_seconds
    metrics.record(step(0.4, 100, 10))
    assert metrics.prefill_seconds - before == pytest.approx(0.1, rel=0.01)


def test_rows_that_fail_have_a_kind() -> None:
    session = Session.open(ModelSpec(path=str(model_path()), identity=open_checkpoint(model_path()).identity))
    kinds: dict[str, int] = {}

    def told(progress: object) -> None:
        for kind, rows in progress.kinds:  # type: ignore[attr-defined]
            kinds[kind] = kinds.get(kind, 0) + rows

    try:
        prompts = ["", "word " * 4000, [10**9], "fine", RowError("prompt is null"), [{"content": "no role"}]]
        answers = session.generate(prompts, SamplingParams(max_tokens=2), progress=told)  # type: ignore[arg-type]
    finally:
        session.close()
    assert kinds == {"empty": 1, "too long": 1, "token ids": 1, "null": 1, "messages": 1}
    assert [error_kind(one.error) for (one,) in answers if one.error is not None] == list(kinds)
    assert session.metrics.generated_tokens == answers[3][0].completion_tokens
