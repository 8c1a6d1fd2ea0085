"""Token ids to text, one at a time.

Owns the state of one text that is being written: which bytes wait for the rest of their character.
"""

from __future__ import annotations

import codecs

from daskllm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Turns the ids of one text into pieces whose join is :meth:`Tokenizer.decode` of all of them.

    A piece never holds part of a character: bytes wait until it is whole. The cost of an id does not depend
    on how many came before it.

    Args:
        tokenizer: whose ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._first = True
        self._waiting = b""

    def push(self, id_: int) -> str:
        """The text that one more id adds; "" for special ids and while a character is unfinished."""
        if id_ in self._tokenizer.special_ids:
            return ""
        piece = self._tokenizer.piece(id_, first=self._first)
        if piece is None:
            return ""
        self._first = False
        waiting = self._waiting + piece
        text, used = codecs.utf_8_decode(waiting, "replace", False)
        self._waiting = waiting[used:]
        return text

    def flush(self) -> str:
        """End the text, and be ready for another.

        An unfinished character is dropped, as in :meth:`Tokenizer.decode`; so this is always "".
        """
        self._waiting = b""
        self._first = True
        return ""
