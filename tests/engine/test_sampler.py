from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from daskllm.engine import sampler
from daskllm.engine.sampler import choose, token_scores
from daskllm.engine.sequence import Request, SequenceState
from daskllm.types import SamplingParams

VOCAB = 40


def state(place: int = 0, prompt: tuple[int, ...] = (1, 2), **sampling: Any) -> SequenceState:
    params = SamplingParams(max_tokens=1000, **sampling)
    return SequenceState.of(Request(prompt, params, frozenset({3}), (0, ((place,),))), 0)


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


RULES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_draws_follow_the_distribution(rules: dict[str, Any]) -> None:
    """Chi-square of 20,000 draws against the softmax that transformers' own rules leave."""
    draws = 20_000
    warpers = LogitsProcessorList([TemperatureLogitsWarper(rules["temperature"])])
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in rules:
            warpers.append(warper(rules[name]))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits()[None].clone())[0].double().softmax(-1)
    rows = logits().expand(draws, -1).clone()
    found = np.bincount(choose(rows, [state(place, **rules) for place in range(draws)]), minlength=VOCAB)
    kept = expected.numpy() > 0
    assert found[~kept].sum() == 0
    often = kept & (expected.numpy() * draws >= 5)
    rest = draws - found[often].sum(), draws - expected.numpy()[often].sum() * draws
    observed, wanted = [*found[often]], [*expected.numpy()[often] * draws]
    if rest[1] >= 5:
        observed, wanted = [*observed, rest[0]], [*wanted, rest[1]]
    else:
        wanted = list(np.array(wanted) * sum(observed) / sum(wanted))
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


WIDE_RULES: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_k": 50},
    {"top_k": 3000},
    {"min_p": 0.02},
    {"temperature": 0.7, "top_k": 200, "top_p": 0.95, "min_p": 0.001},
]


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_candidates_are_those_of_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """Also where many tokens are equally likely, and where more are kept than there are candidates."""
    rows = (torch.randn(60, 9000, generator=torch.Generator().manual_seed(1)) * spread).bfloat16().float()
    states = [{"temperature": 1.0, **WIDE_RULES[i % len(WIDE_RULES)]} for i in range(60)]
    found = choose(rows.clone(), [state(i, **rules) for i, rules in enumerate(states)])
    alone = [choose(rows[i : i + 1].clone(), [state(i, **rules)])[0] for i, rules in enumerate(states)]
    monkeypatch.setattr(sampler, "_CANDIDATES", 9000)
    assert choose(rows.clone(), [state(i, **rules) for i, rules in enumerate(states)]) == found == alone


def test_a_row_draws_the_same_in_any_company() -> None:
    mine = [state(7, temperature=1.0), state(8, temperature=0.7, top_p=0.8), state(9)]
    rows = torch.stack([logits(7), logits(8), logits(9)])
    rules: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {}]
    alone = [choose(rows[i : i + 1].clone(), [state(7 + i, **rules[i])])[0] for i in range(3)]
    company = [state(i, temperature=1.0, top_k=3 + i) for i in range(20)]
    together = choose(torch.cat((rows, torch.randn(20, VOCAB))), [*mine, *company])
    assert together[:3] == alone


def test_greedy_takes_the_first_of_equals() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [5, 9]] = 1.0
    assert choose(row, [state()]) == [5]


@pytest.mark.parametrize("vocabulary", [5, 512, 513, 1023, 1536, 5000])
def test_greedy_takes_what_argmax_takes(vocabulary: int) -> None:
    drawn = torch.Generator().manual_seed(vocabulary)
    fine = torch.randn(40, vocabulary, generator=drawn)
    coarse = torch.randint(0, 3, (40, vocabulary), generator=drawn).float()  # many equals, in many stretches
    wrong = fine.clone()
    wrong[torch.arange(40), torch.randint(0, vocabulary, (40,), generator=drawn)] = float("nan")
    low = torch.full((40, vocabulary), float("-inf"))
    for rows in (fine, coarse, wrong, low):
        assert choose(rows.clone(), [state(i) for i in range(40)]) == rows.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    sequence = state(repetition_penalty=penalty, prompt=(4, 4, 11))
    sequence.tokens.append(17)
    row = logits()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([sequence.tokens]), row[None].clone())
    changed = row[None].clone()
    choose(changed, [sequence])
    assert torch.equal(changed, expected)


def test_presence_and_frequency_count_the_output_alone() -> None:
    sequence = state(prompt=(4, 4), presence_penalty=0.5, frequency_penalty=0.25)
    for token in (7, 7, 9):
        sequence.tokens.append(token)
        sequence.counts[token] += 1
    row = torch.zeros(1, VOCAB)
    choose(row, [sequence])
    assert row[0, [4, 7, 9, 10]].tolist() == [0.0, -1.0, -0.75, 0.0]


def test_end_tokens_wait_for_min_tokens() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3] = 9.0
    row[0, 6] = 5.0
    early = state(min_tokens=2)
    assert choose(row.clone(), [early]) == [6]
    early.tokens += [6, 6]
    assert choose(row.clone(), [early]) == [3]


def test_logprobs_are_raw_and_sorted() -> None:
    sequence = state(logprobs=3, temperature=0.5, repetition_penalty=2.0)
    expected = logits().log_softmax(-1)
    [token] = choose(logits()[None], [sequence])
    [entry] = sequence.logprobs
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(expected[token].item())
    assert list(entry.top) == expected.topk(3).indices.tolist()
    assert list(entry.top.values()) == pytest.approx(expected.topk(3).values.tolist())


def test_no_draw_lands_on_a_token_without_weight() -> None:
    class Last:
        def random(self) -> float:
            return math.nextafter(1.0, 0.0)

    for rules in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}):
        sequence = state(**rules)
        sequence.generator = Last()  # type: ignore[assignment]
        row = torch.full((1, VOCAB), -1e5)
        row[0, [2, 4]] = 1.0
        assert choose(row, [sequence]) == [4]


def test_token_scores() -> None:
    rows = torch.stack([logits(1), logits(2)])
    expected = rows.double().log_softmax(-1)
    assert token_scores(rows, [3, 8]) == pytest.approx([expected[0, 3].item(), expected[1, 8].item()])
