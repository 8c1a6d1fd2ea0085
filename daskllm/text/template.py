"""Prompt templates over the columns of a table.

Owns: the little language of ``"Translate: {text}"`` and what a cell must be to go into a prompt. It imports
no table
library: columns are names, cells are values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

from daskllm.text.chat import check_unicode
from daskllm.types import RowError

__all__ = ["PromptTemplate"]

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt with the columns that fill it.

    Attributes:
        parts: literals and fields in turn, a literal first and last.

    Example:
        >>> template = PromptTemplate.parse("Translate {{to French}}: {text}", ["id", "text"])
        >>> template.fields
        ('text',)
        >>> template.fill({"id": 1, "text": "good"})
        'Translate {to French}: good'
        >>> PromptTemplate.parse("text", ["id", "text"]).fill({"text": "good"})
        'good'
    """

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, prompt: str, columns: Collection[Any]) -> PromptTemplate:
        """Read a prompt: the name of a column, or a template with plain ``{name}`` fields.

        Args:
            prompt: ``{{`` and ``}}`` stand for braces.
            columns: the names that a table has.

        Raises:
            TypeError: the prompt is no str.
            KeyError: it names a column that is not there, or none at all.
            ValueError: a field is not plain (``{a.b}``, ``{a!r}``, ``{a:>3}``, ``{}``), or a brace stands
                alone.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a column name or a template, not {prompt!r}")
        if prompt in columns:
            return cls(("", prompt, ""))
        parts = _split(prompt, columns)
        if len(parts) == 1:
            raise KeyError(
                f"no column {prompt!r}, and no {{field}} in it; the columns are {_listed(columns)}"
            )
        return cls(tuple(parts))

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that are used, each once, in the order of their first use."""
        return tuple(dict.fromkeys(self.parts[1::2]))

    def fill(self, values: Mapping[str, Any]) -> str:
        """The prompt of one row.

        Args:
            values: column → cell; text, and numbers by ``str()``.

        Raises:
            RowError: a used cell is null or neither text nor number, or the prompt is empty or no valid
            Unicode.
            KeyError: ``values`` lacks a column.
        """
        parts = list(self.parts)
        for place in range(1, len(parts), 2):
            parts[place] = _text(parts[place], values[parts[place]])
        text = "".join(parts)
        if not text:
            raise RowError("prompt is empty")
        check_unicode(text)
        return text


def _split(prompt: str, columns: Collection[Any]) -> list[str]:
    parts, literal, end = [], "", 0
    for match in _TOKEN.finditer(prompt):
        literal += prompt[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            literal += match[0][0]
        elif match[1] is None:
            raise ValueError(
                f"prompt has a lone {match[0]!r} at position {match.start()}; "
                f"write {match[0] * 2} for a brace"
            )
        else:
            _check_field(match[1], columns)
            parts += [literal, match[1]]
            literal = ""
    return [*parts, literal + prompt[end:]]


def _check_field(name: str, columns: Collection[Any]) -> None:
    if name in columns:
        return
    if not name.strip() or any(sign in name for sign in ".[]!:"):
        raise ValueError(
            f"prompt field {{{name}}} is not a plain {{name}}: formats, conversions, attributes and indexes "
            "are not taken; write {{ and }} for braces"
        )
    raise KeyError(f"no column {name!r} for prompt field {{{name}}}; the columns are {_listed(columns)}")


def _listed(columns: Collection[Any]) -> str:
    return ", ".join(repr(column) for column in columns) or "none"


def _text(column: str, cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    if _is_null(cell):
        raise RowError(f"column {column!r} is null")
    # NumPy registers its numbers with `numbers`, but not its bool.
    if isinstance(cell, Number) or type(cell).__name__ == "bool":
        return str(cell)
    raise RowError(f"column {column!r} holds a {type(cell).__name__}, where text or a number was expected")


def _is_null(cell: Any) -> bool:
    """None, NaN, NaT and pandas' NA, which alone answers a comparison with neither yes nor no."""
    if cell is None or type(cell).__name__ == "NAType":
        return True
    try:
        return bool(cell != cell)
    except (TypeError, ValueError):
        return False
