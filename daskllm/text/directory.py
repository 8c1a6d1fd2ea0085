"""The tokenizer files of a model directory, read and merged into one plain record.

Owns: which file says what, and which one wins. Knows the JSON, not what it does: nothing is tokenised here.

Files (https://huggingface.co/docs/transformers/main_classes/tokenizer): ``tokenizer.json`` is the tokenizer;
``tokenizer_config.json`` names the special tokens and may hold chat templates; ``special_tokens_map.json``
names them too in directories whose config lists no ``added_tokens_decoder``; ``chat_template.jinja`` and
``additional_chat_templates/NAME.jinja`` hold templates and win over the config's.

The flags ``add_bos_token`` and ``add_eos_token`` are not read: beside a ``tokenizer.json`` its post-processor
is the one that counts, as in transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from daskllm.types import ModelError

__all__ = ["AddedToken", "TokenizerFiles"]

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in text before the model sees it, with the flags that ``tokenizer.json`` gives it."""

    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    id: int | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> AddedToken:
        """From one entry of a JSON file; absent flags mean what the tokenizers library means by them."""
        special = bool(entry.get("special", False))
        return cls(
            content=str(entry["content"]),
            special=special,
            normalized=bool(entry.get("normalized", not special)),
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
            single_word=bool(entry.get("single_word", False)),
            id=entry.get("id"),
        )


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a directory says.

    Attributes:
        path: the directory.
        source: ``tokenizer.json`` as it is.
        pipeline: its content without its added tokens.
        added: the added tokens of all files, in the order that gives them their ids.
        named: role → content for the special tokens that have a name (``bos_token``, ``eos_token`` …).
        templates: name → chat template; the usual one is called "default".
    """

    path: Path
    source: bytes
    pipeline: dict[str, Any]
    added: tuple[AddedToken, ...]
    named: dict[str, str]
    templates: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> TokenizerFiles:
        """Read the directory.

        Raises:
            ModelError: ``tokenizer.json`` is missing, or a file is not what it should be.
        """
        source = _read(path / "tokenizer.json", required=True)
        pipeline = _parsed(path / "tokenizer.json", source)
        if not isinstance(pipeline.get("model"), dict):
            raise ModelError(f'{path / "tokenizer.json"} has no "model": it is not a tokenizers file')
        config = _read_json(path / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config = config | _read_json(path / "special_tokens_map.json")
        try:
            added = _added_tokens(pipeline.pop("added_tokens", None) or [], config)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(f"{path}: the added tokens cannot be read: {error!r}") from error
        named = {role: _content(config[role]) for role in _NAMED if config.get(role)}
        return cls(path, source, pipeline, added, named, _templates(path, config))


def _read_json(file: Path) -> dict[str, Any]:
    return _parsed(file, _read(file))


def _read(file: Path, *, required: bool = False) -> bytes:
    if not file.is_file():
        if not required:
            return b"{}"
        raise ModelError(
            f"no tokenizer.json in {file.parent}: daskllm needs the fast tokenizer's file; where only "
            "tokenizer.model or vocab.json is given, save it once with "
            "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _parsed(file: Path, source: bytes) -> dict[str, Any]:
    try:
        content = json.loads(source.decode("utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}, where an object was expected")
    return content


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _added_tokens(listed: list[Any], config: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    added = {token.content: token for token in map(AddedToken.of, listed)}
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        token = AddedToken.of(entry)
        known = added.get(token.content)
        added[token.content] = replace(token, id=known.id if known else None)
    for value in _special(config):
        content = _content(value)
        if known := added.get(content):
            added[content] = replace(known, special=True)
        else:
            flags = value if isinstance(value, Mapping) else {}
            added[content] = AddedToken.of({**flags, "content": content, "special": True})
    return tuple(added.values())


def _special(config: Mapping[str, Any]) -> list[Any]:
    """Every token that the config calls special: by name, by a model's own name, or in a list."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    named = [config[role] for role in _NAMED if config.get(role)]
    own = [
        value
        for key, value in config.items()
        if key.endswith("_token") and key not in _NAMED and isinstance(value, str) and value
    ]
    return named + own + extra


def _templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {"default": path / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    try:
        found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: a chat template cannot be read: {error}") from error
    if found:
        return found
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        if isinstance(template, Mapping):
            return {str(name): str(text) for name, text in template.items()}
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of objects with "
            f"name and template, not {template!r:.80}"
        ) from error
