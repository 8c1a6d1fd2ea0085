"""Texts in, texts out: the two functions for those who want no more than that.

They own how prompts are dealt to tasks. They refuse to know how a model answers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral

import dask

from daskllm.given import listed
from daskllm.llm import LLM, load
from daskllm.runtime.call import Call
from daskllm.runtime.cluster import client_for
from daskllm.runtime.tasks import answer_rows
from daskllm.types import Completion, RowError, SamplingParams

__all__ = ["generate_text", "parallel_generate_text"]


def generate_text(prompt: str, model: LLM | str | os.PathLike[str], max_length: int = 50) -> str:
    """The continuation of one prompt, greedily, without the prompt.

    Args:
        model: an `LLM`, or what `load` takes.
        max_length: at most this many new tokens.

    Raises:
        RowError: the prompt cannot be answered.

    Example:
        >>> from daskllm import demo
        >>> len(generate_text("Calculate 1", demo.model_path(), max_length=8)) > 0
        True
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be text, not {prompt!r:.80}")
    return parallel_generate_text([prompt], model, 1, max_length)[0]


def parallel_generate_text(
    prompts: Sequence[str],
    model: LLM | str | os.PathLike[str],
    num_workers: int = 4,
    max_length: int = 50,
) -> list[str]:
    """The continuations of many prompts, greedily, in the prompts' order.

    Args:
        prompts: texts.
        model: an `LLM`, or what `load` takes.
        num_workers: Dask tasks that the prompts are dealt to, on the workers of the model's client or of the
            current one, else on threads; those in one process share its batch.
        max_length: at most this many new tokens for each.

    Raises:
        RowError: a prompt cannot be answered.

    Example:
        >>> from daskllm import demo
        >>> len(parallel_generate_text(["Calculate 1", "Find the date"], demo.model_path(), 2, max_length=4))
        2
    """
    params = SamplingParams(max_tokens=max_length)
    if isinstance(num_workers, bool) or not isinstance(num_workers, Integral) or num_workers < 1:
        raise ValueError(f"num_workers must be an integer of at least 1, not {num_workers!r}")
    rows = [(prompt,) for prompt in listed(prompts, "generate")]
    llm = model if isinstance(model, LLM) else load(model)
    call = Call(spec=llm.spec, kind="generate", params=params, answers=llm.answers)
    places = [(0, row) for row in range(len(rows))]
    # Dealt out like cards, so that long prompts at one end do not make one long task.
    hands = [slice(first, None, int(num_workers)) for first in range(min(int(num_workers), len(rows)))]
    answer = dask.delayed(answer_rows, pure=False, traverse=False)
    parts = dask.compute(
        *(answer(rows[hand], call, places[hand]) for hand in hands),
        scheduler=client_for(llm.client),
        num_workers=int(num_workers),
    )
    texts = [""] * len(rows)
    for hand, part in zip(hands, parts, strict=True):
        texts[hand] = [_text(answer) for (answer,) in part]
    return texts


def _text(answer: Completion) -> str:
    if answer.text is None:
        raise RowError(answer.error)
    return answer.text
