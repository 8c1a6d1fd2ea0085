"""The loop with a runner that needs no model: token t is followed by t + 1."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from daskllm.engine.batch import Batch
from daskllm.engine.batcher import Batcher
from daskllm.engine.engine import Engine, EngineClosedError
from daskllm.engine.kvcache import BlockPool, KVCache
from daskllm.engine.runner import LOGIT_ROWS
from daskllm.engine.sequence import Request
from daskllm.types import Pooling, SamplingParams

VOCAB = 1000


class Counting:
    """Predicts each token's successor; a hidden state is the token's id."""

    device = "cpu"

    def __init__(self) -> None:
        self.cache = KVCache(1, 0, 1, 16, torch.float32)
        self.steps: list[Batch] = []
        self.logit_rows = 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def run(self, batch: Batch) -> torch.Tensor:
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.steps.append(batch)
        return batch.tokens[batch.wanted][:, None].float()

    def likeliest(self, normed: torch.Tensor) -> torch.Tensor:
        return self.logits(normed).argmax(-1)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        self.logit_rows += len(normed)
        rows = torch.zeros(len(normed), VOCAB)
        rows[torch.arange(len(rows)), (normed[:, 0].long() + 1) % VOCAB] = 10.0
        return rows


@pytest.fixture
def engine() -> Iterator[Engine]:
    runner: Any = Counting()
    made = Engine(runner, Batcher(BlockPool(64), 16, 128), context=200, threads=1)
    yield made
    runner.gate.set()
    made.close()


def ask(first: int, out: int, caller: object = None, **rest: Any) -> Request:
    names = {k: rest.pop(k) for k in ("stop_ids", "on_token") if k in rest}
    return Request([first], SamplingParams(max_tokens=out, **rest), caller=caller, **names)


def answers(engine: Engine, requests: Sequence[Request]) -> list[tuple[tuple[int, ...], str]]:
    tickets = engine.submit(requests)
    engine.wait(tickets, 20)
    assert all(t.done for t in tickets)
    return [(s.token_ids, s.finish_reason) for t in tickets for s in t.samples if s is not None]


def test_counts_up(engine: Engine) -> None:
    assert answers(engine, [ask(5, 3), ask(50, 2)]) == [((6, 7, 8), "length"), ((51, 52), "length")]


def test_stops_at_an_end_token_and_at_the_context(engine: Engine) -> None:
    stop, full = answers(engine, [ask(5, 50, stop_ids=frozenset({9})), ask(300, 500)])
    assert stop == ((6, 7, 8, 9), "stop")
    assert full[1] == "length"
    assert len(full[0]) == 199


def test_min_tokens_goes_past_an_end_token(engine: Engine) -> None:
    [row] = answers(engine, [ask(5, 6, stop_ids=frozenset({7}), min_tokens=4)])
    assert row[1] == "length"
    assert 7 not in row[0]


def test_on_token_ends_a_sample(engine: Engine) -> None:
    def third(sample: int, output: Sequence[int]) -> bool:
        return len(output) == 3

    assert answers(engine, [ask(5, 50, on_token=third)]) == [((6, 7, 8), "stop")]


def test_samples_share_one_prefill(engine: Engine) -> None:
    runner: Any = engine.runner
    tickets = engine.submit([Request([5] * 40, SamplingParams(max_tokens=4, n=3, temperature=1e-3))])
    engine.wait(tickets, 20)
    assert [s.token_ids for s in tickets[0].samples if s] == [(6, 7, 8, 9)] * 3
    assert sum(int((b.positions == 0).sum()) for b in runner.steps) == 1
    assert max(len(b.tokens) for b in runner.steps[1:]) == 3
    assert engine.batcher.pool.used == 0


def test_two_callers_share_a_step(engine: Engine) -> None:
    runner: Any = engine.runner
    runner.gate.clear()
    first = engine.submit([ask(1, 30, caller="a") for _ in range(3)])
    second = engine.submit([ask(2, 30, caller="b") for _ in range(3)])
    runner.gate.set()
    engine.wait([*first, *second], 20)
    assert max(step.callers for step in engine.metrics.history) == 2
    assert max(step.running for step in engine.metrics.history) == 6
    assert engine.metrics.fill() > 3


def test_abort_stops_decoding_and_frees_blocks(engine: Engine) -> None:
    runner: Any = engine.runner
    started = threading.Event()

    def begun(sample: int, output: Sequence[int]) -> bool:
        started.set()
        return False

    doomed = engine.submit([ask(1, 150, on_token=begun)])
    assert started.wait(10)
    engine.abort(doomed)
    assert answers(engine, [ask(5, 2)]) == [((6, 7), "length")]
    assert engine.batcher.pool.used == 0
    assert engine.metrics.aborted == 1
    assert not doomed[0].done
    ran = len(runner.steps)
    answers(engine, [ask(5, 2)])
    assert len(runner.steps) == ran + 2


def test_a_broken_step_reaches_every_caller_and_the_engine_goes_on(engine: Engine) -> None:
    runner: Any = engine.runner
    runner.error = RuntimeError("out of luck")
    tickets = engine.submit([ask(1, 3), ask(2, 3)])
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.wait(tickets, 20)
    runner.error = None
    assert answers(engine, [ask(5, 1)]) == [((6,), "length")]
    assert engine.batcher.pool.used == 0


def test_closing_fails_who_waits(engine: Engine) -> None:
    runner: Any = engine.runner
    runner.gate.clear()
    tickets = engine.submit([ask(1, 100)])
    threading.Timer(0.1, runner.gate.set).start()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.wait(tickets, 20)
    with pytest.raises(EngineClosedError):
        engine.submit([ask(1, 1)])


def test_samples_beside_a_scored_prompt(engine: Engine) -> None:
    runner: Any = engine.runner
    runner.gate.clear()
    scored = engine.submit([Request([30, 31, 32], SamplingParams(max_tokens=1), kind="score")])
    samples = engine.submit([Request([5], SamplingParams(max_tokens=1, n=4, temperature=1e-3))])
    runner.gate.set()
    engine.wait([*scored, *samples], 20)
    assert [s.token_ids for s in samples[0].samples if s] == [(6,)] * 4
    assert [len(s.scores or ()) for s in scored[0].samples if s] == [2]


def test_no_more_logits_than_are_needed(engine: Engine) -> None:
    runner: Any = engine.runner
    one = SamplingParams(max_tokens=1)
    for kind, logit_rows in (("embed", 0), ("score", 299), ("generate", 1)):
        runner.logit_rows = 0
        [ticket] = engine.submit([Request(list(range(300)), one, kind=kind)])  # type: ignore[arg-type]
        engine.wait([ticket], 20)
        assert runner.logit_rows == logit_rows
    [ticket] = engine.submit([Request([5] * 40, SamplingParams(max_tokens=1, n=3, temperature=1e-3))])
    runner.logit_rows = 0
    engine.wait([ticket], 20)
    assert runner.logit_rows == 1


def test_logits_of_scored_texts_are_never_all_held(engine: Engine) -> None:
    runner: Any = engine.runner
    widths, logits = [], runner.logits

    def measured(normed: torch.Tensor) -> torch.Tensor:
        widths.append(len(normed))
        return logits(normed)

    runner.logits = measured
    engine.batcher.max_tokens = 1000
    one = SamplingParams(max_tokens=1)
    tickets = engine.submit([Request(list(range(i, i + 199)), one, kind="score") for i in range(3)])
    engine.wait(tickets, 20)
    assert len(runner.steps) == 1
    assert widths == [LOGIT_ROWS, LOGIT_ROWS, 3 * 198 - 2 * LOGIT_ROWS]
    scores = [s.scores for t in tickets for s in t.samples if s is not None]
    assert [len(one or ()) for one in scores] == [198] * 3
    assert min(score for one in scores for score in one or ()) > -0.1  # each token is its successor's


@pytest.mark.parametrize(("pooling", "expected"), [("mean", 47.5), ("last", 95.0)])
def test_a_preempted_row_is_pooled_from_its_beginning(pooling: Pooling, expected: float) -> None:
    runner: Any = Counting()
    small = Engine(runner, Batcher(BlockPool(5), 4, 2), context=200, threads=1)
    runner.gate.clear()
    try:
        # Two tokens a step: the first row, one of them once it decodes, wants a third block long before the
        # second has read its prompt.
        grows = small.submit([Request(list(range(31)), SamplingParams(max_tokens=60))])
        read = small.submit(
            [Request(list(range(96)), SamplingParams(max_tokens=1), kind="embed", pooling=pooling)]
        )
        runner.gate.set()
        small.wait([*grows, *read], 20)
        [sample] = read[0].samples
        assert sample is not None
        assert small.batcher.preemptions == 1
        assert sample.pooled is not None
        assert sample.pooled.tolist() == [expected]
    finally:
        small.close()


def test_samples_share_one_prefill_though_the_first_ends_at_once(engine: Engine) -> None:
    def first_sample(sample: int, output: Sequence[int]) -> bool:
        return sample == 0

    runner: Any = engine.runner
    params = SamplingParams(max_tokens=4, n=3, temperature=1e-3)
    tickets = engine.submit([Request([5] * 40, params, on_token=first_sample)])
    engine.wait(tickets, 20)
    assert [len(s.token_ids) for s in tickets[0].samples if s] == [1, 4, 4]
    assert sum(int((b.positions == 0).sum()) for b in runner.steps) == 1
    assert engine.batcher.pool.used == 0


def test_a_request_that_cannot_begin_fails_alone_in_its_round(engine: Engine) -> None:
    broken = Request([5], SamplingParams(max_tokens=2, temperature=1.0), stream_key=(2**300, ()))
    tickets = engine.submit([broken])
    with pytest.raises(OverflowError):
        engine.wait(tickets, 20)
    assert answers(engine, [ask(5, 1)]) == [((6,), "length")]


def test_a_sequence_may_fill_the_cache_to_its_last_slot() -> None:
    runner: Any = Counting()
    small = Engine(runner, Batcher(BlockPool(2), 4, 128), context=200, threads=1)
    try:
        full = Request([5] * 64, SamplingParams(max_tokens=1))
        assert answers(small, [full]) == [((6,), "length")]
        long = Request([5] * 65, SamplingParams(max_tokens=1))
        assert answers(small, [long]) == [((), "error")]
    finally:
        small.close()
