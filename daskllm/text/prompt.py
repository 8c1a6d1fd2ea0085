"""What a row asks: its prompt, with a system text and worked examples around it.

Owns few-shot prompting. For a model with a chat template, system text and examples become messages. For one
without, they become plain text, in this layout (system text and examples only where given)::

    {system}

    {input}
    {output}

    {input}
    {output}

    {prompt}

with a newline at the end, after which the model writes its output. A prompt with neither stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from daskllm.text.chat import check_unicode
from daskllm.text.template import PromptTemplate
from daskllm.types import Message, Prompt, RowError

__all__ = ["build", "checked_examples"]


class _Chats(Protocol):
    @property
    def has_chat_template(self) -> bool: ...


def checked_examples(examples: Any, template: PromptTemplate | None = None) -> tuple[tuple[str, str], ...]:
    """The ``examples=`` of a call as pairs of text, checked before any work.

    Args:
        examples: (input, output) pairs, or None. An input is text that is taken as it is, or a mapping that
            fills ``template``, as a row would.
        template: the call's prompt.

    Raises:
        TypeError: not pairs of text.
        ValueError: text that cannot be used; the message names the example.
        KeyError: a mapping that lacks a field of the template.

    Example:
        >>> template = PromptTemplate.parse("Review: {text}", ["text"])
        >>> checked_examples([({"text": "Lovely."}, "good"), ("Review: Dull.", "bad")], template)
        (('Review: Lovely.', 'good'), ('Review: Dull.', 'bad'))
    """
    if examples is None:
        return ()
    if isinstance(examples, str | bytes | Mapping) or not hasattr(examples, "__iter__"):
        raise TypeError(f"examples must be a list of (input, output) pairs, not {examples!r}")
    return tuple(_checked_example(number, pair, template) for number, pair in enumerate(examples))


def _checked_example(number: int, pair: Any, template: PromptTemplate | None) -> tuple[str, str]:
    if not isinstance(pair, Sequence) or isinstance(pair, str | bytes) or len(pair) != 2:
        raise TypeError(f"examples[{number}] must be an (input, output) pair, not {pair!r}")
    given, output = pair
    try:
        if isinstance(given, Mapping) and template is not None:
            missing = [field for field in template.fields if field not in given]
            if missing:
                raise KeyError(f"examples[{number}] has no {missing[0]!r}, which the prompt uses")
            given = template.fill(given)
        if not isinstance(given, str) or not isinstance(output, str):
            raise TypeError(f"examples[{number}] must be a pair of text, not {pair!r}")
        for text in (given, output):
            check_unicode(text)
    except RowError as error:
        raise ValueError(f"examples[{number}]: {error}") from error
    return given, output


def build(
    filled: str, *, system: str | None, examples: Sequence[tuple[str, str]] | None, tokenizer: _Chats
) -> Prompt:
    """The prompt of one row: messages for a model with a chat template, else text.

    Args:
        filled: the row's own text.
        system: what stands before everything, or None; an empty one overrides a template's default.
        examples: worked (input, output) pairs, or None.
        tokenizer: the model's.

    Raises:
        TypeError: ``system`` is no text.

    Example:
        >>> class Plain:
        ...     has_chat_template = False
        >>> build("3+4", system="Add.", examples=[("1+1", "2")], tokenizer=Plain())
        'Add.\\n\\n1+1\\n2\\n\\n3+4\\n'
    """
    if system is not None and not isinstance(system, str):
        raise TypeError(f"system must be text or None, not {system!r}")
    if system is None and not examples:
        return filled
    if tokenizer.has_chat_template:
        return _messages(filled, system, examples or ())
    if not system and not examples:
        return filled
    before = f"{system}\n\n" if system else ""
    shown = "".join(f"{given}\n{output}\n\n" for given, output in examples or ())
    return f"{before}{shown}{filled}\n"


def _messages(filled: str, system: str | None, examples: Sequence[tuple[str, str]]) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for given, output in examples:
        messages += [{"role": "user", "content": given}, {"role": "assistant", "content": output}]
    return [*messages, {"role": "user", "content": filled}]
