"""A model's chat template: messages → text, and which control tokens of that text are the template's own.

Owns: the sandbox, what a template can call, and the provenance of control tokens. Templates come with models,
so they are not trusted: they run in jinja2's immutable sandbox and see nothing but plain JSON values.
Messages come from users, so they are not trusted either: a control token spelled in one is text.

Knows nothing of ids: :meth:`ChatTemplate.render_marked` gives a text in which the template's tokens carry the
stand-ins that its caller chose.

What templates may use follows https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from daskllm.types import ModelError, RowError

__all__ = ["ChatTemplate"]

_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}`` marks what is trained on; only its body counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, and no model was trained on that.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class ChatTemplate:
    """One template.

    Args:
        source: the jinja2 text.
        names: variables it can read besides its arguments, ``bos_token`` and the like.
        control: content → stand-in of every control token.
        pattern: matches control tokens in text, leftmost and longest first.
    """

    def __init__(
        self, source: str, names: Mapping[str, str], control: Mapping[str, str], pattern: re.Pattern[str]
    ) -> None:
        self._source = source
        self._names = dict(names)
        self._control = dict(control)
        self._pattern = pattern
        self._contents = {stand_in: content for content, stand_in in control.items()}
        self._stand_in = re.compile("|".join(self._contents) or "(?!)")
        self._spelled = _Spelled(control, pattern)

    @cached_property
    def _plain(self) -> jinja2.Template:
        return self._compiled(lambda tree: None)

    @cached_property
    def _marked(self) -> jinja2.Template:
        return self._compiled(lambda tree: _mark(tree, True, self._with_stand_ins))

    def _compiled(self, change: Callable[[nodes.Template], None]) -> jinja2.Template:
        environment = _environment()
        try:
            tree = environment.parse(self._source)
            change(tree)
            return environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template has a syntax error: {error}") from error

    def _with_stand_ins(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._control[match[0]], text)

    def render(self, arguments: Mapping[str, Any]) -> str:
        """The text of a chat, as the template writes it.

        Args:
            arguments: what :func:`plain_arguments` made.

        Raises:
            RowError: the template refuses the messages (its own words), or fails on them.
        """
        return self._render(self._plain, self._names, arguments, datetime.now())

    def render_marked(
        self, arguments: Mapping[str, Any], fold: Callable[[str], str] | None = None
    ) -> tuple[str, bool]:
        """The text of a chat, and whether the stand-ins of the control tokens are in it.

        Where no string of the user comes near a control token, the text is that of :meth:`render` and the
        second value False: each control token in it is the template's. Otherwise the template's tokens appear
        as their stand-ins, those of the user as they were written, and the second value is True.

        Args:
            arguments: what :func:`plain_arguments` made.
            fold: what else is done to a text before control tokens are looked for in it.

        Raises:
            RowError: as :meth:`render`; or the template reads a spelled control token in such a way that it
                cannot be told from its own.
        """
        now = datetime.now()
        text = self._render(self._plain, self._names, arguments, now)
        if not any(self._spelled.near(string, fold) for string in _strings(arguments)):
            return text, False
        owned = self._owned_by_literal(text, arguments, now)
        beside = self._owned_by_absence(text, arguments, now)
        if owned is None and beside is None:
            raise RowError(
                "a message spells a control token of the model, and the chat template reads it in a way that "
                "cannot be told from its own; take it out of the message"
            )
        return self._placed(text, (owned or []) + (beside or [])), True

    def _owned_by_literal(
        self, text: str, arguments: Mapping[str, Any], now: datetime
    ) -> list[tuple[int, int]] | None:
        """Spans of ``text`` that come from the template's literals, by rendering it with those marked.

        The template sees the messages as they are, so that what it does with a spelled ``</think>`` it does
        here too. Misses tokens that it puts together from parts. None when the marks change what is rendered.
        """
        names = {name: self._with_stand_ins(value) for name, value in self._names.items()}
        try:
            marked = self._render(self._marked, names, arguments, now)
        except RowError:
            return None
        spans, parts, at, end = [], [], 0, 0
        for match in self._stand_in.finditer(marked):
            content = self._contents[match[0]]
            parts += [marked[end : match.start()], content]
            at += match.start() - end
            spans.append((at, at + len(content)))
            at += len(content)
            end = match.end()
        return spans if "".join(parts) + marked[end:] == text else None

    def _owned_by_absence(
        self, text: str, arguments: Mapping[str, Any], now: datetime
    ) -> list[tuple[int, int]] | None:
        """Spans of ``text`` that are control tokens still when all that the messages spell is covered up.

        Finds tokens that a template puts together from parts. None when it looks at what is covered.
        """
        covered = _mapped(arguments, self._spelled.cover)
        try:
            rendered = self._render(self._plain, self._names, covered, now)
        except RowError:
            return None
        spans, parts, at = [], [], 0
        for stretch, spelled in self._spelled.stretches(rendered):
            spans += [(at + match.start(), at + match.end()) for match in self._pattern.finditer(stretch)]
            parts += [stretch, spelled]
            at += len(stretch) + len(spelled)
        return spans if "".join(parts) == text else None

    def _placed(self, text: str, spans: list[tuple[int, int]]) -> str:
        parts, end = [], 0
        for start, stop in sorted(set(spans), key=lambda span: (span[0], -span[1])):
            if start >= end:
                parts += [text[end:start], self._control[text[start:stop]]]
                end = stop
        return "".join(parts) + text[end:]

    def _render(
        self, template: jinja2.Template, names: Mapping[str, str], arguments: Mapping[str, Any], now: datetime
    ) -> str:
        try:
            # One clock for the renderings of a chat that are compared with one another.
            return template.render({"strftime_now": now.strftime, **names, **arguments})
        except jinja2.TemplateError as error:
            raise RowError(f"chat template: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise RowError(f"chat template: {type(error).__name__}: {error}") from error


class _Spelled:
    """Finds control tokens in the strings of users, whole or cut at a string's edge, and covers them up."""

    def __init__(self, control: Iterable[str], pattern: re.Pattern[str]) -> None:
        contents = ["", *control]
        self._pattern = pattern
        self._beginnings = frozenset(text[:end] for text in contents for end in range(1, len(text)))
        self._endings = frozenset(text[start:] for text in contents for start in range(1, len(text)))
        self._longest = max(map(len, contents))
        nonce = f"z{secrets.token_hex(12)}"
        self._covers = {text: f"{nonce}{number:06d}z" for number, text in enumerate(contents)}
        self._texts = contents
        self._cover = re.compile(rf"{nonce}(\d{{6}})z")

    def near(self, text: str, fold: Callable[[str], str] | None) -> bool:
        """Whether a control token is spelled in ``text``, or may be with what stands before or after it."""
        if self._pattern.search(text) or self._begins(text.lstrip()) or self._ends(text.rstrip()):
            return True
        return fold is not None and bool(self._pattern.search(fold(text)))

    def _begins(self, text: str) -> bool:
        return any(text[:size] in self._endings for size in range(1, min(self._longest, len(text) + 1)))

    def _ends(self, text: str) -> bool:
        return any(text[-size:] in self._beginnings for size in range(1, min(self._longest, len(text) + 1)))

    def cover(self, text: str) -> str:
        """``text`` with each spelled control token, and each edge that may be part of one, covered.

        Outer white space stays outside, because templates trim.
        """
        inner = text.strip()
        start = text.index(inner)
        before = self._covers[""] if self._begins(inner) else ""
        after = self._covers[""] if self._ends(inner) else ""
        within = self._pattern.sub(lambda match: self._covers[match[0]], inner)
        return text[:start] + before + within + after + text[start + len(inner) :]

    def stretches(self, text: str) -> Iterable[tuple[str, str]]:
        """``text`` cut into (what was not covered, what was covered after it)."""
        pieces = self._cover.split(text)
        for at in range(0, len(pieces) - 1, 2):
            yield pieces[at], self._texts[int(pieces[at + 1])]
        yield pieces[-1], ""


def _mark(node: nodes.Node, emits: bool, mark: Callable[[str], str]) -> None:
    """Mark the literals below ``node`` that are written; those compared or searched for stay."""
    if isinstance(node, nodes.TemplateData):
        node.data = mark(node.data)
    elif isinstance(node, nodes.Const):
        if emits and isinstance(node.value, str):
            node.value = mark(node.value)
    elif isinstance(node, nodes.Compare | nodes.Getattr | nodes.Getitem | nodes.Test):
        _mark_all(node.iter_child_nodes(), False, mark)
    elif isinstance(node, nodes.If):
        _mark(node.test, False, mark)
        _mark_all(node.iter_child_nodes(exclude=("test",)), True, mark)
    elif isinstance(node, nodes.CondExpr):
        _mark(node.test, False, mark)
        _mark_all(node.iter_child_nodes(exclude=("test",)), emits, mark)
    elif isinstance(node, nodes.For):
        _mark_all(node.iter_child_nodes(only=("iter", "test")), False, mark)
        _mark_all(node.iter_child_nodes(exclude=("iter", "test")), True, mark)
    elif isinstance(node, nodes.Filter):
        _mark_all(node.iter_child_nodes(exclude=("node",)), False, mark)
        if node.node is not None:
            _mark(node.node, emits, mark)
    elif isinstance(node, nodes.Call):
        # A method's arguments (split, replace, startswith) are looked for; a macro's are written.
        _mark(node.node, False, mark)
        written = emits and isinstance(node.node, nodes.Name)
        _mark_all(node.iter_child_nodes(exclude=("node",)), written, mark)
    else:
        _mark_all(node.iter_child_nodes(), emits, mark)


def _mark_all(children: Iterable[nodes.Node], emits: bool, mark: Callable[[str], str]) -> None:
    for child in children:
        _mark(child, emits, mark)


def plain_arguments(messages: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a template, rebuilt from plain JSON values so that it can reach no object of the
    caller's.

    Keys that hold None are left out of messages (tables and APIs write them where templates expect no key),
    and the names under which reasoning travels are made one another's aliases, as transformers does.

    Raises:
        RowError: ``messages`` is not a list of messages with role and content, or holds a lone surrogate.
    """
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    if not isinstance(messages, list | tuple):
        raise RowError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise RowError("messages is empty: a chat needs at least one message")
    chat = [_message(number, message) for number, message in enumerate(messages)]
    arguments = {"messages": chat, "tools": None, "documents": None, **_plain(dict(options))}
    for string in _strings(arguments):
        check_unicode(string)
    return arguments


def _message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(
            f"message {number} must be a mapping with role and content, not {type(message).__name__}"
        )
    kept = {key: value for key, value in _plain(message).items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise RowError(f"message {number} has no role: it needs one such as 'user', and content")
    if "content" not in kept and "tool_calls" not in kept:
        raise RowError(f"message {number} (role {kept['role']!r}) has no content")
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # enums and NumPy's own: their methods are not for a template
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy, as tables hold them
        return _plain(value.tolist())
    raise RowError(f"messages may hold text, numbers, lists and mappings, not {type(value).__name__}")


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str], *, top: bool = True) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        # The outermost keys are the names of the template's variables, not text.
        return {
            key if top else _mapped(key, change, top=False): _mapped(item, change, top=False)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_mapped(item, change, top=False) for item in value]
    return value


def check_unicode(text: str) -> None:
    """Raise RowError when ``text`` holds half of a surrogate pair, which no encoding of Unicode can carry.

    >>> check_unicode("a\\ud83d")
    Traceback (most recent call last):
    ...
    daskllm.types.RowError: text is not valid Unicode: lone surrogate U+D83D at position 1
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        raise RowError(
            f"text is not valid Unicode: lone surrogate U+{ord(text[at]):04X} at position {at}"
        ) from None
