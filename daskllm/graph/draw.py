"""Pictures in plain text formats: SVG laid out here, Mermaid, aligned tables.

Owns how boxes, arrows and frames look. Refuses to know what they stand for: a `Picture` is handed in. No
drawing tool is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path

__all__ = ["Arrow", "Box", "Drawing", "Picture", "count", "layer_range", "mermaid", "size", "svg", "table"]

_FILLS = ("#dbeafe", "#dcfce7", "#fef3c7", "#fce7f3", "#ede9fe", "#cffafe", "#ffedd5", "#e5e7eb")
_CHAR, _LINE, _PAD, _GAP_X, _GAP_Y = 7.2, 16.0, 10.0, 24.0, 34.0


@dataclass(frozen=True, slots=True)
class Box:
    """One node: its id, lines of text, kind (boxes of a kind share a colour) and the frame it is in."""

    id: str
    lines: tuple[str, ...]
    kind: str = ""
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Arrow:
    """From one box to another, with what flows along."""

    source: str
    target: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A title, boxes in an order in which arrows go forward, and arrows."""

    title: str
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture in every format at once; notebooks show its SVG, ``print`` its table."""

    picture: Picture
    text: str
    json: str

    def _repr_svg_(self) -> str:
        return svg(self.picture)

    def __str__(self) -> str:
        return self.text

    def save(self, path: str | PathLike[str]) -> None:
        """Write the format that the path's ending names: .svg, .mmd, .txt or .json."""
        formats = {
            ".svg": lambda: svg(self.picture),
            ".mmd": lambda: mermaid(self.picture),
            ".txt": lambda: self.text,
            ".json": lambda: self.json,
        }
        ending = Path(path).suffix.lower()
        if ending not in formats:
            raise ValueError(f"cannot draw to {str(path)!r}: the path must end in {', '.join(formats)}")
        Path(path).write_text(formats[ending]() + "\n", encoding="utf-8")


def size(amount: float) -> str:
    """Bytes for people, in powers of 1,024.

    >>> size(0), size(1536), size(3 * 1024**3)
    ('0 B', '1.5 KiB', '3 GiB')
    """
    return _scaled(amount, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def count(amount: float) -> str:
    """A count for people, in powers of 1,000.

    >>> count(1_240_000)
    '1.24 M'
    """
    return _scaled(amount, 1000, ("", "k", "M", "G", "T", "P")).rstrip()


def layer_range(names: Sequence[str]) -> str:
    """Names of layers for people: runs of numbered ones shortened.

    >>> layer_range(["embed", "layers.0", "layers.1", "layers.2"])
    'embed, layers.0-2'
    """
    parts: list[str] = []
    run: tuple[str, int, int] | None = None
    for name in names:
        stem, _, number = name.rpartition(".")
        if run and number.isdigit() and (stem, int(number)) == (run[0], run[2] + 1):
            run = (stem, run[1], int(number))
            parts[-1] = f"{stem}.{run[1]}-{run[2]}"
            continue
        run = (stem, int(number), int(number)) if stem and number.isdigit() else None
        parts.append(name)
    return ", ".join(parts) if len(parts) <= 6 else f"{parts[0]}, … {parts[-1]} ({len(names)})"


def _scaled(amount: float, base: int, units: Sequence[str]) -> str:
    if math.isinf(amount):
        return "unlimited"
    step = 0
    while abs(amount) >= base and step < len(units) - 1:
        amount /= base
        step += 1
    return f"{amount:.4g} {units[step]}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under a head, columns aligned; what looks like a number stands to the right.

    >>> print(table(("layer", "bytes"), [("a", "12"), ("bc", "3")]))
    layer  bytes
    -----  -----
    a         12
    bc         3
    """
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *body]) for i in range(len(head))]
    right = [
        bool(body) and all(not row[i] or row[i][0] in "0123456789-+." for row in body)
        for i in range(len(head))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(row) for row in body)])


def mermaid(picture: Picture) -> str:
    """A flowchart; see https://mermaid.js.org/syntax/flowchart.html. Ids are made up, labels are quoted.

    >>> print(mermaid(Picture("m", (Box("a", ("a",)), Box("b", ("b",))), (Arrow("a", "b", "4 B"),))))
    flowchart TD
        n0["a"]
        n1["b"]
        n0 -->|"4 B"| n1
    """
    ids = {box.id: f"n{i}" for i, box in enumerate(picture.boxes)}
    lines = ["flowchart TD"]
    for number, group in enumerate(_groups(picture)):
        indent = "    "
        if group is not None:
            lines.append(f"    subgraph g{number}[{_quoted(group)}]")
            indent = "        "
        lines += [
            f"{indent}{ids[box.id]}[{_quoted('<br/>'.join(map(_entities, box.lines)))}]"
            for box in picture.boxes
            if box.group == group
        ]
        if group is not None:
            lines.append("    end")
    for arrow in picture.arrows:
        label = f"|{_quoted(_entities(arrow.label))}|" if arrow.label else ""
        lines.append(f"    {ids[arrow.source]} -->{label} {ids[arrow.target]}")
    return "\n".join(lines)


def _entities(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "#quot;").replace("\n", " ") + '"'


def _groups(picture: Picture) -> list[str | None]:
    return list(dict.fromkeys(box.group for box in picture.boxes))


@dataclass(slots=True)
class _Place:
    x: float
    y: float
    width: float
    height: float


def svg(picture: Picture) -> str:
    """The picture as one SVG document: layers from top to bottom, frames around groups.

    A box stands one row below the lowest of those that it needs; rows are ordered by the mean place of
    those (Sugiyama et al. 1981), and frames are drawn around what they hold.
    """
    places, width, height = _layout(picture)
    kinds = list(dict.fromkeys(box.kind for box in picture.boxes))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="ui-monospace, monospace" font-size="12">',
        f"<title>{escape(picture.title)}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#475569"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
    ]
    for number, group in enumerate(_groups(picture)):
        if group is not None:
            held = [places[b.id] for b in picture.boxes if b.group == group]
            parts.append(_frame(group, held, number))
    parts += [_arrow(places[a.source], places[a.target], a.label) for a in picture.arrows]
    parts += [_box(box, places[box.id], _FILLS[kinds.index(box.kind) % len(_FILLS)]) for box in picture.boxes]
    return "\n".join([*parts, "</svg>"])


def _layout(picture: Picture) -> tuple[dict[str, _Place], float, float]:
    rank = dict.fromkeys((b.id for b in picture.boxes), 0)
    before: dict[str, list[str]] = {b.id: [] for b in picture.boxes}
    for arrow in picture.arrows:
        before[arrow.target].append(arrow.source)
    lowest: dict[str | None, int] = {}
    floor, current = 0, picture.boxes[0].group if picture.boxes else None
    for box in picture.boxes:
        if box.group != current:
            # A frame starts below the one before it, so that frames never overlap.
            floor, current = 1 + max(lowest.values(), default=-1), box.group
        rank[box.id] = max([floor, *(rank[b] + 1 for b in before[box.id])])
        lowest[box.group] = max(lowest.get(box.group, 0), rank[box.id])
    rows: list[list[Box]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for box in picture.boxes:
        rows[rank[box.id]].append(box)
    sizes = {
        b.id: (max(map(len, b.lines)) * _CHAR + 2 * _PAD, len(b.lines) * _LINE + _PAD) for b in picture.boxes
    }
    widths = [sum(sizes[b.id][0] for b in row) + _GAP_X * (len(row) - 1) for row in rows]
    total, y = max(widths, default=0) + 4 * _GAP_X, _GAP_Y
    places: dict[str, _Place] = {}
    for row, row_width in zip(rows, widths, strict=True):
        centres = {b.id: _mean([places[p].x for p in before[b.id] if p in places], total / 2) for b in row}
        x = (total - row_width) / 2
        for box in sorted(row, key=lambda b: centres[b.id]):
            w, h = sizes[box.id]
            places[box.id] = _Place(x + w / 2, y, w, h)
            x += w + _GAP_X
        y += max(sizes[b.id][1] for b in row) + _GAP_Y
    return places, total, y


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _box(box: Box, at: _Place, fill: str) -> str:
    text = "".join(
        f'<text x="{at.x:.1f}" y="{at.y + _LINE * (i + 1):.1f}" text-anchor="middle" '
        f'fill="#0f172a">{escape(line)}</text>'
        for i, line in enumerate(box.lines)
    )
    return (
        f'<rect x="{at.x - at.width / 2:.1f}" y="{at.y:.1f}" width="{at.width:.1f}" height="{at.height:.1f}" '
        f'rx="6" fill="{fill}" stroke="#475569"/>{text}'
    )


def _arrow(a: _Place, b: _Place, label: str) -> str:
    top, bottom = a.y + a.height, b.y
    # An arrow past other rows swings out to the side instead of crossing the boxes between.
    swing = (a.width + b.width) / 3 if bottom - top > 1.5 * _GAP_Y else 0.0
    middle = (top + bottom) / 2
    bends = f"{a.x + swing:.1f},{middle:.1f} {b.x + swing:.1f},{middle:.1f}"
    path = f"M{a.x:.1f},{top:.1f} C{bends} {b.x:.1f},{bottom:.1f}"
    text = (
        f'<text x="{(a.x + b.x) / 2 + 0.75 * swing + 4:.1f}" y="{middle + 4:.1f}" font-size="10" '
        f'fill="#64748b">{escape(label)}</text>'
    )
    return f'<path d="{path}" fill="none" stroke="#475569" marker-end="url(#tip)"/>{text if label else ""}'


def _frame(label: str, held: Sequence[_Place], number: int) -> str:
    left, right = min(p.x - p.width / 2 for p in held) - 12, max(p.x + p.width / 2 for p in held) + 12
    top, bottom = min(p.y for p in held) - 20, max(p.y + p.height for p in held) + 8
    right = max(right, left + len(label) * 6.2 + 12)
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="8" '
        f'fill="{_FILLS[number % len(_FILLS)]}" fill-opacity="0.35" stroke="#94a3b8" stroke-dasharray="4 3"/>'
        f'<text x="{left + 6:.1f}" y="{top + 13:.1f}" font-size="10" fill="#334155">{escape(label)}</text>'
    )
