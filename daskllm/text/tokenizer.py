"""Text and chats to token ids, and back.

Owns the meeting of a directory's files, its vocabulary, its chat template and its decoder. It knows neither
models nor tables.

Text is data: whatever a string spells, :meth:`Tokenizer.encode` gives plain tokens, with the beginning and
end tokens that the directory's post-processor adds. Control tokens come from chat templates and from token
ids alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from daskllm.machine import uncollected
from daskllm.text.chat import ChatTemplate, check_unicode, plain_arguments
from daskllm.text.directory import TokenizerFiles
from daskllm.text.pieces import Pieces
from daskllm.text.vocabulary import Vocabulary
from daskllm.types import RowError

__all__ = ["Tokenizer"]


class Tokenizer:
    """The tokenizer of one model directory; safe to use from several threads.

    Attributes:
        bos_token_id: id of the beginning token, None where the directory names none.
        eos_token_id: id of the end token, None where the directory names none.
        vocab_size: entries of the vocabulary, added tokens included.
        special_ids: ids that decoding leaves out.
        has_chat_template: whether :meth:`encode_chat` and :meth:`render_chat` can be called.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._path = files.path
        self._vocabulary = Vocabulary(files)
        self._pieces = Pieces(self._vocabulary)
        self._templates = {
            name: ChatTemplate(source, files.named, self._vocabulary.stand_ins, self._vocabulary.pattern)
            for name, source in files.templates.items()
        }
        self.bos_token_id = self._named(files, "bos_token")
        self.eos_token_id = self._named(files, "eos_token")
        self.vocab_size = self._vocabulary.size
        self.special_ids: frozenset[int] = self._vocabulary.special_ids
        self.has_chat_template = bool(self._templates)

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read the tokenizer of a model directory.

        Raises:
            ModelError: ``tokenizer.json`` is missing, broken, or of a kind that is not supported.
        """
        with uncollected():
            return cls(TokenizerFiles.read(Path(path)))

    def _named(self, files: TokenizerFiles, role: str) -> int | None:
        content = files.named.get(role)
        return None if content is None else self._vocabulary.id_of(content)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; control tokens spelled in it are encoded as what they look like.
            add_special_tokens: whether the tokens that the directory puts around a text are added.

        Raises:
            RowError: the text holds a lone surrogate.
        """
        check_unicode(text)
        ids: list[int] = self._vocabulary.data.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int] | RowError]:
        """Token ids of many texts, in order; a text that cannot be encoded has its RowError in its place.

        The tokenizers library works on all cores unless ``TOKENIZERS_PARALLELISM`` or ``RAYON_NUM_THREADS``
        say less.
        """
        found: list[list[int] | RowError] = []
        good: list[str] = []
        places: list[int] = []
        for place, text in enumerate(texts):
            try:
                check_unicode(text)
            except RowError as error:
                found.append(error)
            else:
                found.append([])
                good.append(text)
                places.append(place)
        encodings = self._vocabulary.data.encode_batch_fast(good, add_special_tokens=add_special_tokens)
        for place, encoding in zip(places, encodings, strict=True):
            found[place] = encoding.ids
        return found

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Bytes that cannot be part of a character become U+FFFD; the bytes of a character that is not finished
        at the end are left out, so that the text of a row that was cut at ``max_tokens`` ends in whole
        characters.

        Args:
            ids: token ids; those the vocabulary lacks add nothing.
            skip_special_tokens: whether special tokens are left out.
        """
        kept = self.without_special(ids) if skip_special_tokens else ids
        text, _ = codecs.utf_8_decode(self._pieces.join(kept), "replace", False)
        return text

    def without_special(self, ids: Iterable[int]) -> list[int]:
        """``ids`` without the special ones."""
        special = self.special_ids
        return [id_ for id_ in ids if id_ not in special]

    def piece(self, id_: int, *, first: bool) -> bytes | None:
        """The bytes that a token adds to a text, as its first or a later one; None for an unknown id."""
        return self._pieces.of(id_, first=first)

    def render_chat(self, messages: Any, *, add_generation_prompt: bool = True, **options: Any) -> str:
        """A chat as the text that the model's template makes of it.

        Args:
            messages: mappings with ``role`` and ``content``, and whatever else the template reads.
            add_generation_prompt: whether the beginning of an answer is written after them.
            options: further variables of the template: ``tools``, ``documents``, ``enable_thinking`` …

        Raises:
            ValueError: the model has no chat template.
            RowError: the messages are not messages, or the template refuses them, in its words.
        """
        template = self._template(options)
        arguments = plain_arguments(messages, {**options, "add_generation_prompt": add_generation_prompt})
        return template.render(arguments)

    def encode_chat(self, messages: Any, *, add_generation_prompt: bool = True, **options: Any) -> list[int]:
        """Token ids of a chat: control tokens that the template writes are parsed, those in messages are
        text.

        Arguments and errors as for :meth:`render_chat`.
        """
        template = self._template(options)
        arguments = plain_arguments(messages, {**options, "add_generation_prompt": add_generation_prompt})
        text, marked = template.render_marked(arguments, self._fold)
        if marked:
            return self._vocabulary.encode_marked(text)
        ids: list[int] = self._vocabulary.whole.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _fold(self) -> Any:
        normalizer = self._vocabulary.data.normalizer
        return normalizer.normalize_str if self._vocabulary.normalizes else None

    def _template(self, options: dict[str, Any]) -> ChatTemplate:
        if not self._templates:
            raise ValueError(
                f"the model in {self._path} has no chat template, so it takes text, not messages: "
                "use generate() with a prompt, or put a chat_template.jinja into the directory"
            )
        if options.get("tools") is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            raise ValueError(
                f"the model in {self._path} has the chat templates {', '.join(sorted(self._templates))} "
                "and none is named default: put the one to use into the directory as chat_template.jinja"
            )
        return self._templates["default"]
