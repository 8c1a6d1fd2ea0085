"""Sampling parameters: what is allowed, and what a wrong value is told."""

from __future__ import annotations

from typing import Any

import pytest

from daskllm.types import Completion, SamplingParams, TokenLogprob
from tests.test_markup import words


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2**40),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop_token_ids", [-1]),
        ("seed", 2**63),
        ("n", 0),
        ("logprobs", -1),
        ("truncate", "right"),
    ],
)
def test_out_of_range(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        SamplingParams(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", None),
        ("temperature", "hot"),
        ("top_k", "5"),
        ("stop", 3),
        ("stop", [1]),
        ("stop_token_ids", ["a"]),
        ("seed", 1.0),
        ("ignore_eos", 1),
    ],
)
def test_wrong_type(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=argument):
        SamplingParams(**{argument: value})


def test_unknown_argument_names_the_known_ones() -> None:
    with pytest.raises(TypeError, match="'max_token'; known: max_tokens"):
        SamplingParams.of({"max_token": 3})


def test_strings_and_ids_become_tuples() -> None:
    params = SamplingParams(stop="\n", stop_token_ids=7)
    assert (params.stop, params.stop_token_ids) == (("\n",), (7,))
    assert SamplingParams(stop=None) == SamplingParams()
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.5).greedy


def test_failed_completion() -> None:
    failed = Completion.failed("why", 3)
    assert (failed.text, failed.finish_reason, failed.prompt_tokens, failed.error) == (
        None,
        "error",
        3,
        "why",
    )


def test_a_completion_shows_its_text_and_how_likely_its_tokens_were() -> None:
    tokens = (TokenLogprob(7, 0.0, {7: 0.0, 9: -50.0}),)
    shown = words(Completion("a <b>\n c", (7,), "stop", 3, 1, tokens, None, 2)._repr_html_())
    assert "a <b> c" in shown
    assert "3 tokens read, 1 written; version 2 of the weights" in shown
    assert "7100.0%7: 100.0%, 9: 0.0%" in shown


def test_a_failed_completion_shows_why() -> None:
    shown = words(Completion.failed("prompt is <empty>")._repr_html_())
    assert "error" in shown
    assert "prompt is <empty>" in shown
