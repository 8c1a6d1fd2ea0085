"""A tokenizer in which text cannot spell a control token.

Owns: the line between words and control tokens. An added token is a *control token* (``<|im_end|>``,
``</s>``, ``<think>``) unless it steers nothing, see :func:`_is_ordinary`. The tokenizer built here has every
control token under a stand-in name that holds a random number, in the list of added tokens and in the model's
vocabulary alike, ids unchanged. So a string from a user gives plain pieces whatever it spells, with any model
type, and only a caller who puts the stand-in into a text gets the control token's id.

Knows nothing of chats and templates.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import tokenizers

from daskllm.text.directory import AddedToken, TokenizerFiles
from daskllm.types import ModelError

__all__ = ["Vocabulary"]


class Vocabulary:
    """The tokenizer of a directory, in two forms, and its control tokens.

    Attributes:
        data: the tokenizer for text; control tokens are matched by their stand-ins alone.
        control: content → id of every control token.
        stand_ins: content → stand-in of every control token.
        special_ids: ids that are left out of decoded text.
        size: entries with those of the added tokens.
        pattern: matches a control token as the tokenizers library would: leftmost, then longest.
        decoder: what ``tokenizer.json`` says of turning tokens into text.
        normalizes: whether text is changed before some control tokens are looked for in it.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        # Parsed again when it is needed again: as objects a vocabulary takes ten times as much memory.
        self._source, self._added = files.source, files.added
        self._file = files.path / "tokenizer.json"
        self.decoder: dict[str, Any] | None = files.pipeline.get("decoder")
        model = files.pipeline["model"]
        letters = _letters(model)
        control = [token for token in files.added if not _is_ordinary(token, letters)]
        # Words of the model that are added tokens too: text reaches their ids by merging letters.
        self._words = _made_by_merges(model, {token.content for token in control if not token.special})
        nonce = secrets.token_hex(12)
        # Lower-case letters and digits: normalizers leave them alone. A fixed length: none begins another.
        self.stand_ins = {token.content: f"q{nonce}{index:06d}q" for index, token in enumerate(control)}
        self.data = self._build(dict(files.pipeline), self.stand_ins)
        ids = {token.content: id_ for id_, token in self.data.get_added_tokens_decoder().items()}
        vocab = _ids(model)
        self._aliases = {ids[self.stand_ins[word]]: vocab[word] for word in self._words}
        found = {token.content: ids[self.stand_ins[token.content]] for token in control}
        self.control = {content: self._aliases.get(id_, id_) for content, id_ in found.items()}
        special = [token.content for token in files.added if token.special]
        self.special_ids = frozenset(ids[self.stand_ins.get(content, content)] for content in special)
        self.size: int = self.data.get_vocab_size(with_added_tokens=True) - len(self._words)
        self.pattern = re.compile(_alternatives(control))
        self.normalizes = any(token.normalized for token in control) and self.data.normalizer is not None

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which stand-ins are control tokens and everything else is text."""
        ids: list[int] = self.data.encode(text, add_special_tokens=False).ids
        return [self._aliases.get(id_, id_) for id_ in ids] if self._aliases else ids

    @cached_property
    def whole(self) -> tokenizers.Tokenizer:
        """The tokenizer as the directory has it, for text in which no control token is a user's."""
        return self._build(json.loads(self._source), {})

    def _build(self, pipeline: dict[str, Any], stand_ins: dict[str, str]) -> tokenizers.Tokenizer:
        model = pipeline["model"]
        renamed = {content: name for content, name in stand_ins.items() if content not in self._words}
        pipeline["model"] = _renamed_model(model, renamed)
        taken = _ids(model)
        free = len(taken)
        entries = []
        # A word's stand-in has an id of its own, after all others so that theirs stay.
        for token in sorted(self._added, key=lambda token: token.content in self._words):
            entry = asdict(token)
            if token.content in self._words and stand_ins:
                entry["id"] = free
            elif token.id is None:
                entry["id"] = taken.get(token.content, free)
            free = max(free, entry["id"] + 1)
            if token.content in stand_ins:
                entry |= {"content": stand_ins[token.content], "normalized": False, "single_word": False}
            entries.append(entry)
        pipeline |= {"added_tokens": entries, "truncation": None, "padding": None}
        try:
            # Letters as they are: as escapes they take twice as long to write, and longer to read.
            return tokenizers.Tokenizer.from_str(json.dumps(pipeline, ensure_ascii=False))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{self._file}: {error}") from error

    def id_of(self, content: str) -> int | None:
        """The id of a control token or of an entry of the vocabulary."""
        if (id_ := self.control.get(content)) is not None:
            return id_
        found: int | None = self.data.token_to_id(content)
        return found

    @cached_property
    def contents(self) -> dict[int, str]:
        """id → content of every control token."""
        return {id_: content for content, id_ in self.control.items()}


def _ids(model: dict[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        return {piece: index for index, (piece, _) in enumerate(vocab)}
    return vocab if isinstance(vocab, dict) else {}


def _letters(model: dict[str, Any]) -> frozenset[str]:
    """Entries of a BPE model that are one character: what all other words are made of."""
    if "merges" not in model:
        return frozenset()
    return frozenset(piece for piece in model["vocab"] if len(piece) == 1)


def _pairs(model: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for merge in model.get("merges") or ():
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _made_by_merges(model: dict[str, Any], among: set[str]) -> frozenset[str]:
    if among.isdisjoint(_ids(model)):
        return frozenset()
    skip = len(model.get("continuing_subword_prefix") or "")
    return frozenset(among.intersection(left + right[skip:] for left, right in _pairs(model)))


def _is_ordinary(token: AddedToken, letters: frozenset[str]) -> bool:
    """Whether a token steers nothing, so that it may be matched in anybody's text.

    Runs of spaces and newlines are added to some vocabularies as a form of compression, and a letter of a BPE
    model cannot be written in any other way.
    """
    return token.content in letters or (not token.special and token.content.isspace())


def _renamed_model(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The model with the entries in ``names`` renamed, ids kept, without the merges that use them."""
    entries = _ids(model)
    if not any(name in entries for name in names):
        return model
    renamed = dict(model)
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        renamed["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    elif isinstance(vocab, dict):
        renamed["vocab"] = {names.get(piece, piece): id_ for piece, id_ in vocab.items()}
    if isinstance(model.get("unk_token"), str):
        renamed["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        skip = len(model.get("continuing_subword_prefix") or "")
        renamed["merges"] = [
            [left, right]
            for left, right in _pairs(model)
            if left not in names and right not in names and left + right[skip:] not in names
        ]
    return renamed


def _alternatives(tokens: Iterable[AddedToken]) -> str:
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    forms = [
        rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
        for token in longest_first
    ]
    return "|".join(forms) or r"(?!)"
