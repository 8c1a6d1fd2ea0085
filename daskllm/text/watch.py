"""Stop strings in a text that is being written, and what of it may be shown already.

Owns the rule that a piece which may turn out to be the beginning of a stop string is held back. Knows no
engine: tokens come in, text goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from daskllm.text.stream import Detokenizer
from daskllm.text.tokenizer import Tokenizer

__all__ = ["TextWatcher"]


class TextWatcher:
    """The text of one sample as it grows.

    Args:
        tokenizer: whose ids come.
        stop: strings that end the text.
        min_tokens: no stop string ends it before so many tokens.
        stop_ids: ids that end the sample by themselves; they add no text.
        emit: called with each piece of text that can be let out; None lets nothing out.

    Attributes:
        cut: the text before the stop string, once one has ended the sample.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        min_tokens: int,
        stop_ids: frozenset[int],
        emit: Callable[[str], None] | None,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop, self._min_tokens, self._stop_ids, self._emit = stop, min_tokens, stop_ids, emit
        self._longest = max(map(len, stop), default=1)
        self._text = ""
        self._let_out = 0
        self.cut: str | None = None

    def push(self, output: Sequence[int]) -> bool:
        """Take the newest token; whether a stop string is complete."""
        if output[-1] in self._stop_ids and len(output) >= self._min_tokens:
            return False
        known = len(self._text)
        self._text += self._detokenizer.push(output[-1])
        if len(output) >= self._min_tokens:
            # Before min_tokens a stop string does not count, nor does it when it only began there and ended.
            found = [at for s in self._stop if (at := self._text.find(s, max(0, known - len(s) + 1))) >= 0]
            if found:
                self.cut = self._text[: min(found)]
                self._release(len(self.cut))
                return True
        self._release(len(self._text) - self._longest + 1)
        return False

    def _release(self, upto: int) -> None:
        if self._emit is not None and upto > self._let_out:
            self._emit(self._text[self._let_out : upto])
            self._let_out = upto

    def rest(self) -> str:
        """What was held back when the sample ended without a stop string."""
        return "" if self.cut is not None else self._text[self._let_out :]
