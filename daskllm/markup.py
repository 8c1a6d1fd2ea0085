"""What notebooks show, as small pieces of HTML in one style: cards, tables, bars.

It owns escaping and looks: text takes the page's own colour and lines are half transparent, so that light and
dark pages are served alike, and a viewer that strips styles still shows every word. It refuses to know what
is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["HTML", "bar", "card", "details", "facts", "progress", "quote", "strip", "table"]

_COLOURS = ("#5b8def", "#3aa17e", "#d98a2b", "#b06ab3", "#c75c5c", "#4aa3b5")
_LINE = "1px solid rgba(128,128,128,.35)"
_CELL = "text-align:{};padding:2px 12px 2px 0;vertical-align:top;white-space:{}"


class HTML(str):
    """Text that is HTML already; all other text is escaped."""

    __slots__ = ()


def _html(value: object) -> HTML:
    return value if isinstance(value, HTML) else HTML(escape(str(value)))


def card(title: object, *parts: HTML, note: object = "") -> HTML:
    """A frame with a title, something small beside it, and parts below one another.

    >>> card("<1>", HTML("<p>body</p>")).count("&lt;1&gt;")
    1
    """
    small = f'<span style="opacity:.65;padding-left:.8em">{_html(note)}</span>' if note else ""
    return HTML(
        f'<div style="display:inline-block;max-width:100%;border:{_LINE};border-radius:6px;padding:8px 14px;'
        f'line-height:1.45"><div><strong>{_html(title)}</strong>{small}</div>{"".join(parts)}</div>'
    )


def facts(pairs: Iterable[tuple[object, object]]) -> HTML:
    """Names and what stands for them, a line each.

    >>> facts([("rows", 3)]).count("<tr>")
    1
    """
    rows = "".join(
        f'<tr><th style="{_CELL.format("left", "nowrap")}">{_html(name)}</th>'
        f'<td style="{_CELL.format("left", "normal")}">{_html(value)}</td></tr>'
        for name, value in pairs
    )
    return HTML(f"<table>{rows}</table>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> HTML:
    """Rows under a head; text that begins with a digit stands to the right.

    >>> table(("layer", "bytes"), [("a", "12")]).count("text-align:right")
    1
    """

    def cell(kind: str, value: object) -> str:
        right = kind == "td" and not isinstance(value, HTML) and str(value)[:1].isdigit()
        return (
            f'<{kind} style="{_CELL.format("right" if right else "left", "nowrap")}">{_html(value)}</{kind}>'
        )

    lines = [("th", head), *(("td", row) for row in rows)]
    body = "".join("<tr>" + "".join(cell(kind, value) for value in line) + "</tr>" for kind, line in lines)
    return HTML(f'<div style="overflow-x:auto"><table>{body}</table></div>')


def bar(share: float, label: object = "", colour: int = 0) -> HTML:
    """A horizontal bar that is full at 1, and words behind it.

    >>> "width:50.0%" in bar(0.5, "half")
    True
    """
    part = 100 * min(1.0, max(0.0, share))
    return HTML(
        '<span style="display:inline-block;width:5em;height:.7em;border-radius:3px;'
        f'background:rgba(128,128,128,.22);margin-right:.6em"><span style="display:block;width:{part:.1f}%;'
        f'height:100%;border-radius:3px;background:{_COLOURS[colour % len(_COLOURS)]}"></span></span>'
        f"{_html(label)}"
    )


def strip(parts: Sequence[tuple[object, float, int]]) -> HTML:
    """One bar of several parts, each as wide as its amount: (name, amount, number of its colour).

    >>> strip([("a", 1.0, 0), ("b", 3.0, 1)]).count("flex:")
    2
    """
    total = sum(amount for _, amount, _ in parts) or 1.0
    pieces = "".join(
        f'<span title="{_html(name)}" style="flex:{amount / total:.4f} 0 2px;margin-right:1px;'
        f'background:{_COLOURS[colour % len(_COLOURS)]}"></span>'
        for name, amount, colour in parts
    )
    return HTML(
        '<div style="display:flex;width:26em;max-width:100%;height:.9em;border-radius:3px;overflow:hidden;'
        f'margin:6px 0">{pieces}</div>'
    )


def details(summary: object, body: HTML, *, opened: bool = False) -> HTML:
    """What a click opens and shuts."""
    state = ' open="open"' if opened else ""
    return HTML(
        f"<details{state}>"
        f'<summary style="cursor:pointer;opacity:.8">{_html(summary)}</summary>{body}</details>'
    )


def quote(text: object, colour: int = 0) -> HTML:
    """A text with its own line breaks and spaces, and a coloured line before it.

    >>> "a &lt; b" in quote("a < b")
    True
    """
    return HTML(
        f'<div style="white-space:pre-wrap;border-left:3px solid {_COLOURS[colour]};padding:2px 0 2px 10px;'
        f'margin:6px 0">{_html(text)}</div>'
    )


def progress(share: float | None, label: object) -> HTML:
    """The browser's own bar of what is done, and words behind it; the words alone where nobody knows.

    >>> progress(0.5, "half")
    '<progress value="0.5000" max="1"></progress> half'
    """
    shown = "" if share is None else f'<progress value="{share:.4f}" max="1"></progress> '
    return HTML(f"{shown}{_html(label)}")
