"""What each token id adds to a text, as bytes.

Owns: the decoder of ``tokenizer.json``, seen one token at a time. A text is the bytes of its tokens joined
and read as UTF-8, so decoding a row costs a table look-up per token, whether the row is decoded at its end or
streamed, and both give the same text. Only decoders in which a token's bytes depend on nothing but the token,
and on whether it is the first, are supported; the others are refused by name.

The two ways to write bytes as tokens: GPT-2's, in which every byte is a printable character
(https://github.com/openai/gpt-2/blob/master/src/encoder.py), and sentencepiece's, ``<0xE4>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from daskllm.text.vocabulary import Vocabulary
from daskllm.types import ModelError

__all__ = ["Pieces"]

_LOCAL = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"})
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


class Pieces:
    """The bytes of every token.

    Args:
        vocabulary: whose tokens.

    Raises:
        ModelError: the decoder is of a kind that needs to see more than one token.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = vocabulary.data.decoder
        kinds = _kinds(vocabulary.decoder)
        if unknown := sorted(set(kinds) - _LOCAL):
            raise ModelError(
                f"tokenizer.json has a decoder of type {unknown[0]!r}; supported: {', '.join(sorted(_LOCAL))}"
            )
        self._characters = _byte_characters() if "ByteLevel" in kinds else {}
        self._byte_tokens = "ByteFallback" in kinds
        self._anchor = self._find_anchor()
        self._first: dict[int, bytes | None] = {}
        self._later: dict[int, bytes | None] = {}

    def of(self, id_: int, *, first: bool) -> bytes | None:
        """The bytes that token ``id_`` adds; None for an id not in the vocabulary, which is no token."""
        table = self._first if first else self._later
        try:
            return table[id_]
        except KeyError:
            found = table[id_] = self._look_up(id_, first)
            return found

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a text from its beginning."""
        parts: list[bytes] = []
        for id_ in ids:
            if (piece := self.of(id_, first=not parts)) is not None:
                parts.append(piece)
        return b"".join(parts)

    def _look_up(self, id_: int, first: bool) -> bytes | None:
        token = self._vocabulary.contents.get(id_)
        if token is None:
            token = self._vocabulary.data.id_to_token(id_)
        if token is None:
            return None
        text = self._decoded(token) if first else self._decoded_later(token)
        # The library shows bytes that are no character of their own as U+FFFD.
        return self._raw(token, text) if "\ufffd" in text else text.encode("utf-8")

    def _raw(self, token: str, text: str) -> bytes:
        if self._byte_tokens and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if all(character in self._characters for character in token):
            return bytes(self._characters[character] for character in token)
        return text.encode("utf-8")

    def _decoded(self, *tokens: str) -> str:
        if self._decoder is None:
            return " ".join(tokens)
        text: str = self._decoder.decode(list(tokens))
        return text

    def _decoded_later(self, token: str) -> str:
        anchor, shown = self._anchor
        return self._decoded(anchor, token)[len(shown) :]

    def _find_anchor(self) -> tuple[str, str]:
        """A token to put before another, so that the decoder does not take that one for the first."""
        for candidate in ("a", "e", "1", "x"):
            shown = self._decoded(candidate)
            if shown == candidate:
                return candidate, shown
        raise ModelError(
            "tokenizer.json has a decoder that changes plain letters; it cannot be read token by token"
        )


def _kinds(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [kind for part in decoder["decoders"] for kind in _kinds(part)]
    return [str(decoder.get("type"))]
