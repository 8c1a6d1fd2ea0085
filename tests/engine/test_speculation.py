"""Guessed tokens change how many steps an answer takes and not a bit of it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from daskllm.demo import model_path, tasks
from daskllm.engine import sampler
from daskllm.engine.batcher import Batcher
from daskllm.engine.kernels import reference
from daskllm.engine.kernels.cpu import operations as cpu
from daskllm.engine.kvcache import BlockPool, bytes_per_block
from daskllm.engine.sequence import Request, SequenceState
from daskllm.engine.sizes import BLOCK_SIZE, TILE
from daskllm.engine.speculation import Speculation
from daskllm.metrics import EngineMetrics, StepRecord
from daskllm.session import Session
from daskllm.types import ModelSpec, SamplingParams
from tests import tiny

GREEDY = SamplingParams(max_tokens=60, ignore_eos=True)
CONFIGS = ("llama-gqa", "qwen3-bias-window", "gpt2-untied-gelu-odd", "mistral-window")
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "eight bits": {"dtype": "bfloat16", "quantize": "int8", "kv_dtype": "int8"},
}


def measured(step: float, row: float, steps: int = 64) -> EngineMetrics:
    """Metrics of an engine whose steps cost so much."""
    metrics = EngineMetrics()
    for i in range(steps):
        drafted = i % 5
        metrics.record(StepRecord(0.0, step + row * (1 + drafted), 0, 1, 1, 0, 1, 1, drafted, 0))
    return metrics


def sequence_of(tokens: Sequence[int], produced: int = 1, **params: Any) -> SequenceState:
    options = {"max_tokens": 50, **params}
    request = Request(list(tokens[: len(tokens) - produced]), SamplingParams(**options), frozenset({2}))
    state = SequenceState.of(request, 0)
    state.tokens = list(tokens)
    return state


REPEATING = [4, 5, 6, 7, 8, 9, 4, 5]


def test_it_drafts_where_a_step_costs_more_than_rows() -> None:
    assert list(Speculation(measured(0.02, 0.001), 200).draft(sequence_of(REPEATING), 1, 9)) == [6, 7, 8]
    dear = Speculation(measured(0.001, 0.02), 200)
    assert dear.draft(sequence_of(REPEATING), 1, 9) == ()
    # 0.3 of the tokens are expected to be right: (10 / n + 3) * 0.3 against 3.
    limit = Speculation(measured(0.010, 0.003), 200)
    assert [bool(limit.draft(sequence_of(REPEATING), n, 9)) for n in (1, 2, 8)] == [True, False, False]


def test_costs_count_drafts_as_rows_and_right_ones_as_tokens() -> None:
    metrics = EngineMetrics()
    for i in range(100):
        drafted, accepted = i % 6, i % 3
        metrics.record(
            StepRecord(0.0, 0.02 + 0.001 * (2 + drafted), 0, 2, 2, 0, 1, 1, drafted, min(drafted, accepted))
        )
    costs = metrics.costs()
    assert costs is not None
    assert (costs.step, costs.row) == pytest.approx((0.02, 0.001))
    late = list(metrics.history)[8:]
    tokens = sum(2 + record.accepted for record in late)
    assert costs.output_token == pytest.approx(sum(record.seconds for record in late) / tokens, rel=0.02)


def test_nothing_is_known_in_the_first_steps() -> None:
    assert Speculation(EngineMetrics(), 200).draft(sequence_of(REPEATING), 1, 9) == ()


def test_it_stops_where_guesses_are_wrong_and_tries_again() -> None:
    speculation = Speculation(measured(0.01, 0.001), 10_000)
    sequence = sequence_of(REPEATING, max_tokens=10_000)
    found = []
    for _ in range(400):
        drafts = speculation.draft(sequence, 1, 9)
        found.append(len(drafts))
        if drafts:
            speculation.fared(sequence, len(drafts), 0)
    assert found[0] == 3
    assert 3 <= sum(map(bool, found[200:])) <= 8
    for _ in range(30):
        drafts = speculation.draft(sequence, 1, 9)
        if drafts:
            speculation.fared(sequence, len(drafts), len(drafts))
    assert len(speculation.draft(sequence, 1, 99)) == TILE - 1


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logprobs": 0},
        {"min_tokens": 2},
        {"max_tokens": 2},
    ],
)
def test_only_plain_greedy_rows(params: dict[str, Any]) -> None:
    speculation = Speculation(measured(0.02, 0.001), 200)
    assert speculation.draft(sequence_of(REPEATING, **params), 1, 9) == ()
    assert len(speculation.draft(sequence_of(REPEATING, produced=2, min_tokens=2), 1, 9)) == 3


def test_no_draft_is_longer_than_what_is_left() -> None:
    def drafted(context: int = 200, most: int = 9, **params: Any) -> int:
        return len(
            Speculation(measured(0.02, 0.001), context).draft(sequence_of(REPEATING, **params), 1, most)
        )

    assert [drafted(max_tokens=n) for n in (2, 3, 4, 5)] == [0, 1, 2, 3]
    assert [drafted(context=n) for n in (9, 10, 11)] == [0, 1, 2]
    assert [drafted(most=n) for n in (0, 1, 2)] == [0, 1, 2]


def test_the_batcher_gives_drafts_blocks_and_finds_what_they_filled() -> None:
    given: list[int] = []

    def draft(sequence: SequenceState, running: int, most: int) -> list[int]:
        given.append(most)
        return [1] * min(most, 7)

    batcher = Batcher(BlockPool(4), 4, 16, draft=draft)
    first = SequenceState.of(Request([1] * (BLOCK_SIZE - 3), GREEDY), 0)
    batcher.add(first)
    for _ in range(2):
        batcher.advance(batcher.schedule())
    assert given == []  # a prompt in chunks
    first.tokens.append(1)
    step = batcher.schedule()
    assert [(c.count, len(c.drafts)) for c in step.chunks] == [(1, 7)]
    assert given == [15]  # all that a step may still hold
    assert len(first.blocks) == 2
    assert list(step.chunks[0].wanted) == list(range(8))
    batcher.advance(step)
    first.tokens += [1] * 3
    batcher.accept(first, 2)
    assert (first.computed, first.remaining) == (BLOCK_SIZE, 1)
    assert batcher.pool.find(first.key(0)) == first.blocks[0]


@pytest.mark.parametrize(("rows", "asked"), [(8, 8), (9, 0)])
def test_many_rows_are_not_even_asked(rows: int, asked: int) -> None:
    given: list[int] = []

    def draft(sequence: SequenceState, running: int, most: int) -> tuple[int, ...]:
        given.append(running)
        return ()

    batcher = Batcher(BlockPool(64), 16, 128, draft=draft)
    sequences = [SequenceState.of(Request([1, 2, 3], GREEDY), 0) for _ in range(rows)]
    for sequence in sequences:
        batcher.add(sequence)
    batcher.advance(batcher.schedule())
    for sequence in sequences:
        sequence.tokens.append(1)
    assert len(batcher.schedule().chunks) == rows
    assert given == [rows] * asked


@pytest.mark.parametrize(("blocks", "room"), [(1, 3), (2, 15)])
def test_no_block_is_taken_from_others_for_a_draft(blocks: int, room: int) -> None:
    given: list[int] = []

    def draft(sequence: SequenceState, running: int, most: int) -> list[int]:
        given.append(most)
        return [1] * min(most, 7)

    batcher = Batcher(BlockPool(blocks), 4, 16, draft=draft)
    sequence = SequenceState.of(Request([1] * (BLOCK_SIZE - 4), GREEDY), 0)
    batcher.add(sequence)
    for _ in range(2):
        batcher.advance(batcher.schedule())
    sequence.tokens.append(1)
    [chunk] = batcher.schedule().chunks
    assert given == [room]
    assert len(chunk.drafts) == min(room, 7)
    assert len(sequence.blocks) == blocks


# --- on models --------------------------------------------------------------------------------------------


def prompts(count: int = 6) -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(256) for _ in range(draw.choice((1, 7, 31, 33, 70)))] for _ in range(count)]


class Guesses:
    """Takes the place of `Speculation.draft`: tokens of known answers, some of them wrong."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers, self.last, self._draw = answers, dict[int, list[int]](), random.Random(3)

    def __call__(self, sequence: SequenceState, running: int, most: int) -> list[int]:
        whole = self.answers[tuple(sequence.request.prompt)]
        left = min(most, 7, sequence.request.params.max_tokens - sequence.produced - 1)
        found = whole[sequence.produced :][: max(0, self._draw.randint(0, left))] if left > 0 else []
        if found and self._draw.random() < 0.4:
            place = self._draw.randrange(len(found))
            found[place] = (found[place] + 1) % 256
        self.last[id(sequence)] = found
        return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Guesses | None], dict[tuple[int, ...], Any]]:
    """Every row of logits that a token was chosen from, by the tokens before it, right or guessed."""
    found: dict[tuple[int, ...], Any] = {}
    guesses: list[Guesses | None] = [None]
    choose = sampler.choose

    def recording(logits: torch.Tensor, sequences: Sequence[SequenceState]) -> list[int]:
        rows: defaultdict[int, int] = defaultdict(int)
        for row, sequence in zip(logits, sequences, strict=True):
            number = rows[id(sequence)]
            rows[id(sequence)] += 1
            behind = guesses[0].last[id(sequence)][:number] if number and guesses[0] else []
            found[(*sequence.tokens, *behind)] = row.clone()
        return choose(logits, sequences)

    monkeypatch.setattr(sampler, "choose", recording)
    monkeypatch.setattr(SequenceState, "takes_likeliest", False)  # which needs no logits

    def begin(now: Guesses | None) -> dict[tuple[int, ...], Any]:
        guesses[0] = now
        found.clear()
        return found

    return begin


def answers_of(
    path: Path, way: dict[str, Any], given: list[list[int]], guesses: Guesses | None, **memory: int
) -> tuple[list[list[int]], Session]:
    session = Session.open(ModelSpec(path=str(path), **way, **memory))
    session.engine.batcher.draft = guesses
    try:
        return [list(one.token_ids) for [one] in session.generate(given, GREEDY)], session
    finally:
        session.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_not_a_bit_changes(name: str, way: str, tmp_path: Path, seen: Any) -> None:
    path = tiny.make_model(name, tmp_path / "model", dtype=WAYS[way]["dtype"])
    given = prompts()
    found = seen(None)
    plain, session = answers_of(path, WAYS[way], given, None)
    before, steps = dict(found), session.metrics.steps
    known = {tuple(p): a for p, a in zip(given, plain, strict=True)}
    config, item = session.config, session.model.kv_torch_dtype.itemsize
    block = bytes_per_block(config.num_layers, config.num_kv_heads, config.head_dim, item)
    for memory in ({}, {"kv_memory": 9 * block}):
        guesses = Guesses(known)
        found = seen(guesses)
        tried, session = answers_of(path, WAYS[way], given, guesses, **memory)
        assert tried == plain
        assert all(torch.equal(found[k], before[k]) for k in before)
        metrics = session.metrics
        assert 0 < metrics.accepted_tokens < metrics.drafted_tokens
        assert sum(r.accepted for r in metrics.history) == metrics.accepted_tokens
        if memory:
            assert metrics.preemptions > 0
        else:
            assert metrics.steps < steps
            assert metrics.decode_tokens + metrics.accepted_tokens == 59 * len(given)
            assert metrics.generated_tokens == metrics.output_tokens == 60 * len(given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_says_the_same_in_fewer_steps(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[{"role": "user", "content": row.prompt}] for row in tasks.sample(12, seed=5, of_held_out=True)]
    params = SamplingParams(max_tokens=48)
    texts, steps = [], []
    for pays in (False, True):
        monkeypatch.setattr(Speculation, "_pays", lambda self, lookup, running, pays=pays: pays)
        session = Session.open(ModelSpec(path=str(model_path()), dtype=dtype))
        texts.append([session.generate([row], params)[0][0].text for row in rows])
        steps.append(session.metrics.steps)
        drafted = session.metrics.drafted_tokens
        session.close()
        assert bool(drafted) == pays or drafted < 20
    assert texts[0] == texts[1]
    assert steps[1] < steps[0]


def test_stop_strings_and_end_tokens_end_within_a_draft(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    given = prompts(3)
    plain, _ = answers_of(path, {}, given, None)
    known = {tuple(p): a for p, a in zip(given, plain, strict=True)}
    for options in ({"stop_token_ids": [plain[0][20]]}, {"stop": "e"}, {"max_tokens": 23}):
        params = GREEDY.with_(**options)
        results = []
        for guesses in (None, Guesses(known)):
            session = Session.open(ModelSpec(path=str(path)))
            session.engine.batcher.draft = guesses
            results.append(session.generate(given, params))
            assert session.engine.batcher.pool.used == 0
            session.close()
        assert results[0] == results[1]


def test_sampled_rows_beside_drafted_ones(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    given = prompts(4)
    plain, _ = answers_of(path, {}, given, None)
    known = {tuple(p): a for p, a in zip(given, plain, strict=True)}
    params = [GREEDY, GREEDY.with_(temperature=0.8, seed=1, n=2), GREEDY.with_(n=2), GREEDY]

    def only_greedy(sequence: SequenceState, running: int, most: int) -> list[int]:
        return guesses(sequence, running, most) if sequence.request.params.greedy else []

    guesses, results = Guesses(known), []
    for draft in (None, only_greedy):
        session = Session.open(ModelSpec(path=str(path)))
        session.engine.batcher.draft = draft
        results.append(session.generate(given, params))
        session.close()
    assert results[0] == results[1]


def test_only_where_kernels_promise_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.INVARIANT
    assert not reference.INVARIANT
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    for kernels in (cpu, reference):
        monkeypatch.setattr("daskllm.engine.kernels.select", lambda device, dtype, found=kernels: found)
        session = Session.open(ModelSpec(path=str(path)))
        assert (session.engine.batcher.draft is not None) == kernels.INVARIANT
        session.close()
