"""Prompts as the token ids that a model reads: made, checked, and cut to its context.

It knows a tokenizer, the size of a vocabulary and the length of a context; what is asked of the ids is not
its business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from daskllm.text.tokenizer import Tokenizer
from daskllm.types import Prompt, RowError, SamplingParams

__all__ = ["Encoded", "Encoder"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's ids, at least one, or why it cannot be answered (and the ids that it has nevertheless)."""

    ids: Sequence[int] = ()
    error: str | None = None


class Encoder:
    """Makes ids of prompts.

    Args:
        tokenizer: the model's.
        vocab_size: ids must be below.
        context: positions of a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, context: int) -> None:
        self._tokenizer, self._vocab_size, self._context = tokenizer, vocab_size, context

    def encode(
        self,
        prompts: Sequence[Prompt | Encoded],
        params: SamplingParams | Sequence[SamplingParams],
        room: int = 1,
    ) -> list[Encoded]:
        """What each prompt is to the model; one that is encoded already is passed on.

        Args:
            params: for all, or one for each; they say whether a prompt may be cut.
            room: how many positions must stay free for an answer.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        texts = {i: prompt for i, prompt in enumerate(prompts) if isinstance(prompt, str)}
        encoded = dict(zip(texts, self._tokenizer.encode_batch(list(texts.values())), strict=True))
        rows = []
        for i, (prompt, one) in enumerate(zip(prompts, each, strict=True)):
            if isinstance(prompt, Encoded):
                rows.append(prompt)
                continue
            ids: Sequence[int] = ()
            try:
                ids = self._ids(prompt, encoded.get(i))
                rows.append(Encoded(self._fit(ids, one, room)))
            except RowError as error:
                rows.append(Encoded(ids, str(error)))
        return rows

    def _ids(self, prompt: Prompt, encoded: list[int] | RowError | None) -> Sequence[int]:
        if isinstance(prompt, RowError):
            raise prompt
        if isinstance(encoded, RowError):
            raise encoded
        if len(prompt) == 0:
            raise RowError("prompt is empty")
        if encoded is not None:
            return self._checked(encoded)
        if isinstance(prompt[0], (int, np.integer)):
            return self._checked([_id(value) for value in prompt])
        return self._checked(self._tokenizer.encode_chat(prompt))

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise RowError("prompt is empty")
        for value in ids:
            if not 0 <= value < self._vocab_size:
                raise RowError(f"token id {value} is outside the model's vocabulary of {self._vocab_size}")
        return ids

    def _fit(self, ids: Sequence[int], params: SamplingParams, room: int) -> Sequence[int]:
        context = self._context
        limit = context - room
        if len(ids) <= limit:
            return ids
        if room == 0:
            raise RowError(f"text has {len(ids)} tokens, the model's context is {context}; shorten it")
        if params.truncate is None:
            raise RowError(
                f"prompt has {len(ids)} tokens, the model's context is {context} and an answer needs at "
                'least one; shorten it or pass truncate="left"'
            )
        # The newest tokens that leave room for a whole answer, but never less than half the context.
        kept = min(limit, max(context - params.max_tokens, context // 2))
        return ids[len(ids) - kept :]


def _id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RowError(f"a prompt of token ids holds {value!r}, which is not an integer")
    return int(value)
