"""Calls that cannot be meant: refused at once, naming the argument and what is allowed; no row is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import dask.dataframe as dd
import pandas as pd
import pytest

from tests.fake_session import FakeLLM

TABLE = pd.DataFrame({"id": [1, 2], "text": ["a", "b"]})


@dataclass(frozen=True)
class Bad:
    """An argument, the error, and words of its message."""

    name: str
    error: type[Exception]
    words: str
    prompt: Any = "text"
    options: dict[str, Any] = field(default_factory=dict)


def sampling(name: str, value: Any, error: type[Exception], words: str = "") -> Bad:
    return Bad(f"{name}={value!r:.20}", error, words or name, options={name: value})


CALLS = [
    Bad("an unknown column", KeyError, "no column 'txt'", "txt"),
    Bad(
        "an unknown field",
        KeyError,
        "no column 'txt' for prompt field {txt}; the columns are 'text', 'id'",
        "{txt}",
    ),
    Bad("text without a field", KeyError, "no {field} in it", "Hello"),
    Bad("a lone brace", ValueError, "a lone '{'", "Say { {text}"),
    Bad("a lone closing brace", ValueError, "a lone '}'", "Say {text} }"),
    Bad("a field of no name", ValueError, "not a plain {name}", "{}{text}"),
    Bad("a field with a format", ValueError, "not a plain {name}", "{text:>10}"),
    Bad("a field with an attribute", ValueError, "not a plain {name}", "{text.__class__}"),
    Bad("a field with an index", ValueError, "not a plain {name}", "{text[0]}"),
    Bad("a field with a conversion", ValueError, "not a plain {name}", "{text!r}"),
    Bad("no prompt", TypeError, "prompt must be a column or a template, not None", None),
    Bad("a prompt that is a number", TypeError, "prompt must be a column or a template, not 7", 7),
    Bad("an output that is there", ValueError, "has a column 'text' already", options={"output": "text"}),
    Bad("an output that is no name", TypeError, "output must be the name of a column", options={"output": 1}),
    Bad("a system that is no text", TypeError, "system must be text or None", options={"system": 3}),
    Bad("examples that are no pairs", (TypeError, ValueError), "example", options={"examples": [("a",)]}),  # type: ignore[arg-type]
    Bad("an unknown argument", TypeError, "max_token", options={"max_token": 3}),
    sampling("max_tokens", 0, ValueError, "max_tokens must be at least 1, not 0"),
    sampling("max_tokens", 1.5, TypeError),
    sampling("max_tokens", True, TypeError),
    sampling("max_tokens", "10", TypeError),
    sampling("min_tokens", -1, ValueError),
    sampling("min_tokens", 500, ValueError),
    sampling("temperature", -0.1, ValueError),
    sampling("temperature", float("nan"), ValueError),
    sampling("temperature", float("inf"), ValueError),
    sampling("temperature", "hot", TypeError),
    sampling("top_p", 0.0, ValueError, "top_p must be above 0 and at most 1, not 0.0"),
    sampling("top_p", 1.1, ValueError),
    sampling("top_k", -1, ValueError),
    sampling("top_k", 0.5, TypeError),
    sampling("min_p", 2.0, ValueError),
    sampling("repetition_penalty", 0.0, ValueError),
    sampling("presence_penalty", float("nan"), ValueError),
    sampling("stop", "", ValueError),
    sampling("stop", [1], TypeError),
    sampling("stop_token_ids", ["a"], TypeError),
    sampling("stop_token_ids", [-1], ValueError),
    sampling("seed", 0.5, TypeError),
    sampling("seed", "0", TypeError),
    sampling("n", 0, ValueError),
    sampling("logprobs", -1, ValueError),
    sampling("ignore_eos", "yes", TypeError),
    sampling("truncate", "right", ValueError),
]


@pytest.mark.parametrize("bad", CALLS, ids=lambda bad: bad.name)
def test_a_call_that_cannot_be_meant(fake: FakeLLM, bad: Bad) -> None:
    for table in (TABLE, dd.from_pandas(TABLE, npartitions=2)):
        with pytest.raises(bad.error) as told:
            table.llm.generate(fake, bad.prompt, **bad.options)
        assert bad.words in str(told.value)
    assert fake.rows == 0


@pytest.mark.parametrize("llm", [None, "model", 7, object()], ids=repr)
def test_what_is_no_model(llm: Any) -> None:
    with pytest.raises(TypeError, match=r"llm must be a model from daskllm\.load"):
        TABLE.llm.generate(llm, "text")
