"""System text and worked examples around a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from daskllm.text import PromptTemplate, build, checked_examples


class Model:
    def __init__(self, *, chats: bool) -> None:
        self.has_chat_template = chats


TALKS, WRITES = Model(chats=True), Model(chats=False)
EXAMPLES = [("good film", "positive"), ("dull", "negative")]


@pytest.mark.parametrize("model", [TALKS, WRITES])
@pytest.mark.parametrize("examples", [None, [], ()])
def test_a_bare_prompt_stays_as_it_is(model: Model, examples: Any) -> None:
    assert build("text", system=None, examples=examples, tokenizer=model) == "text"


def test_messages_for_a_model_that_chats() -> None:
    assert build("so so", system="Judge.", examples=EXAMPLES, tokenizer=TALKS) == [
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": "good film"},
        {"role": "assistant", "content": "positive"},
        {"role": "user", "content": "dull"},
        {"role": "assistant", "content": "negative"},
        {"role": "user", "content": "so so"},
    ]
    assert build("so so", system="", examples=None, tokenizer=TALKS) == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "so so"},
    ]


@pytest.mark.parametrize(
    ("system", "examples", "text"),
    [
        ("Judge.", EXAMPLES, "Judge.\n\ngood film\npositive\n\ndull\nnegative\n\nso so\n"),
        ("Judge.", None, "Judge.\n\nso so\n"),
        (None, EXAMPLES[:1], "good film\npositive\n\nso so\n"),
        ("", None, "so so"),
    ],
)
def test_text_for_a_model_that_does_not(system: str | None, examples: Any, text: str) -> None:
    assert build("so so", system=system, examples=examples, tokenizer=WRITES) == text


def test_system_is_text() -> None:
    with pytest.raises(TypeError, match="system must be text"):
        build("x", system=3, examples=None, tokenizer=WRITES)  # type: ignore[arg-type]


def test_examples_fill_the_template_like_rows() -> None:
    template = PromptTemplate.parse("{a}+{b}=", ["a", "b"])
    pairs = checked_examples([({"a": 1, "b": 2}, "3"), ["2+2=", "4"]], template)
    assert pairs == (("1+2=", "3"), ("2+2=", "4"))
    assert checked_examples(None, template) == ()


@pytest.mark.parametrize(
    ("examples", "error", "words"),
    [
        ("text", TypeError, "examples must be a list"),
        (3, TypeError, "examples must be a list"),
        ({"a": "b"}, TypeError, "examples must be a list"),
        (["ab"], TypeError, r"examples\[0\] must be an"),
        ([("a",)], TypeError, r"examples\[0\] must be an"),
        ([("a", "b"), ("a", 3)], TypeError, r"examples\[1\] must be a pair of text"),
        ([({"a": 1}, "b")], KeyError, r"examples\[0\] has no 'b'"),
        ([({"a": 1, "b": None}, "b")], ValueError, r"examples\[0\]: column 'b' is null"),
        ([("\ud800", "b")], ValueError, r"examples\[0\]: .*lone surrogate"),
    ],
)
def test_bad_examples_are_errors_of_the_call(examples: Any, error: type[Exception], words: str) -> None:
    template = PromptTemplate.parse("{a}+{b}=", ["a", "b"])
    with pytest.raises(error, match=words):
        checked_examples(examples, template)
