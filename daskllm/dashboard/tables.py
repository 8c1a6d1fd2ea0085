"""The board in words: tiles and tables as HTML.

It owns which figures are shown in text and how they are written. What users named is escaped. It refuses to
know what draws the page.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape

from dask.utils import format_bytes

from daskllm.dashboard.board import Board
from daskllm.jobs.explanation import duration

__all__ = ["CSS", "cut", "headed", "jobs", "stages", "tiles", "troubles"]

CSS = """
:host { font-family: "Helvetica Neue", Helvetica, Arial, sans-serif; color: #1f2937; }
:host > div { width: 100%; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px; }
.tile { flex: 1 1 100px; border: 1px solid #e5e7eb; border-radius: 8px; padding: 7px 10px; background: #fff; }
.tile .name { font-size: 11px; color: #6b7280; white-space: nowrap; }
.tile .value { font-size: 24px; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile .more { font-size: 11px; color: #6b7280; white-space: nowrap; min-height: 13px; }
.key { font-weight: 400; margin-left: 10px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }
.tile.out .value { color: #c2570c; } .tile.in .value { color: #2f5f8f; } .tile.bad .value { color: #b42318; }
h3 { font-size: 13px; font-weight: 700; margin: 2px 0 6px 0; color: #444; }
table { border-collapse: collapse; width: 100%; font-size: 12px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #6b7280; border-bottom: 1px solid #d1d5db;
     padding: 3px 10px 3px 0; white-space: nowrap; }
td { border-bottom: 1px solid #f0f1f3; padding: 4px 10px 4px 0; white-space: nowrap; }
td.number, th.number { text-align: right; }
td.wide { white-space: normal; }
.bar { display: inline-block; width: 120px; height: 9px; border-radius: 5px; background: #e5e7eb;
       overflow: hidden; vertical-align: middle; margin-right: 8px; }
.bar span { display: block; height: 100%; background: #f28e2b; }
.running { color: #c2570c; font-weight: 600; } .waiting { color: #2f5f8f; } .done { color: #3f7d3a; }
.none { color: #9ca3af; font-size: 12px; }
"""

_JOBS = 12
_STAGES = 40
_TROUBLES = 6


def tiles(board: Board, now: float) -> str:
    """The figures that are seen first."""
    views = board.workers.values()
    left = [job for job in board.jobs.values() if job.status(now) != "done"]
    begun = [job for job in left if job.status(now) == "running"]
    shown = begun or left or list(board.jobs.values())[-1:]
    states = [job.state(now) for job in shown]
    rows, totals = sum(state.rows for state in states), [state.total_rows for state in states]
    known = bool(totals) and None not in totals
    etas = [state.eta for state in states]
    longest = "–" if not etas or None in etas else duration(max(eta for eta in etas if eta is not None))
    failed, remembered = board.counted("errors"), board.counted("remembered")
    recomputed = board.counted("recomputed")
    per_second = sum(view.output_rate for view in views), sum(view.prompt_rate for view in views)
    lost = f'<span data-figure="lost">{board.losses}</span> lost'
    found = [
        ("output-rate", "output tokens/s", _number(per_second[0]), _of(board, "output"), "out"),
        ("prompt-rate", "prompt tokens/s", _number(per_second[1]), _of(board, "prompt"), "in"),
        ("rows", "rows done", _number(rows), f"of {sum(t or 0 for t in totals):,}" if known else "", ""),
        ("left", "time left", longest, f"{len(begun)} running, {len(left) - len(begun)} waiting", ""),
        ("workers", "workers", f"{len(board.workers)}", lost, "bad" * bool(board.losses)),
        (
            "batch",
            "in the batches",
            _number(_sum(board, "running")),
            f"of {_sum(board, 'room'):,}, {_sum(board, 'waiting'):,} wait",
            "",
        ),
        ("failed", "rows failed", _number(failed), "", "bad" * bool(failed)),
        ("remembered", "remembered", _number(remembered), "rows, kept answers", ""),
        ("recomputed", "recomputed", _number(recomputed), "rows, after a loss", ""),
        ("steals", "steals", _number(board.steals), "tasks taken over", ""),
    ]
    boxes = (
        f'<div class="tile {kind}"><div class="name">{name}</div>'
        f'<div class="value" data-figure="{key}">{escape(value)}</div><div class="more">{more}</div></div>'
        for key, name, value, more, kind in found
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def jobs(board: Board, now: float) -> str:
    """A row for each job, the latest first."""
    rows = []
    for job in reversed(board.jobs.values()):
        state, status = job.state(now), job.status(now)
        share = 1.0 if status == "done" else state.share or 0.0
        total = "" if state.total_rows is None else f" of {state.total_rows:,}"
        bar = f'<span class="bar"><span style="width: {share:.1%}"></span></span>'
        rows.append(
            (
                escape(job.label),
                f'<span class="{status}">{status}</span>',
                f"{job.priority}",
                f"{bar}{state.rows:,}{total}",
                "–" if state.eta is None or status == "done" else duration(state.eta),
                f"{state.tokens_per_second:,.0f}" if status == "running" else "–",
                f"{job.running:,}",
                f"{job.waiting:,}",
                f"{job.counts['errors']:,}",
                f"{job.counts['remembered']:,}",
                f"{job.counts['recomputed']:,}",
            )
        )
    heads = ["job", "", "priority", "rows", "time left", "output tokens/s", "tasks running", "tasks waiting"]
    heads += ["failed", "remembered", "recomputed"]
    return _table(
        cut("Jobs", _JOBS, len(rows)),
        heads,
        rows[:_JOBS],
        "no rows have been asked yet",
        numbers={2, *range(4, 11)},
    )


def stages(board: Board, now: float) -> str:
    """A row for each model or stage on each worker."""
    rows = [
        (
            escape(view.name),
            escape(engine.model),
            engine.stage or "whole",
            escape(engine.layers),
            f"{engine.layer_count}",
            format_bytes(engine.resident_bytes),
        )
        for view, engine in board.engines()
    ]
    heads = ["worker", "model", "stage", "layers", "number", "resident"]
    title = cut("Models and stages", _STAGES, len(rows))
    return _table(title, heads, rows[:_STAGES], "no worker holds a model", numbers={4, 5}, wide={3})


def troubles(board: Board, now: float) -> str:
    """Rows that failed, by kind, and workers that were lost."""
    failed = [(escape(kind), f"{rows:,}") for kind, rows in board.errors().items()][:_TROUBLES]
    lost = [
        (escape(name), time.strftime("%H:%M:%S", time.localtime(when)))
        for when, name in list(board.lost)[: -_TROUBLES - 1 : -1]
    ]
    return (
        _table("Rows that failed", ["of what", "rows"], failed, "none", numbers={1})
        + "<br>"
        + _table("Workers lost", ["worker", "at"], lost, "none", numbers={1})
    )


def _sum(board: Board, name: str) -> int:
    return sum(view.of_all(name) for view in board.workers.values())


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _of(board: Board, name: str) -> str:
    return f"{board.total(name):,.0f} so far"


def cut(title: str, shown: int, there: int) -> str:
    """A title, with how many are shown of those that there are where it is not all of them.

    >>> cut("Jobs", 12, 12), cut("Jobs", 12, 40)
    ('Jobs', 'Jobs (12 of 40)')
    """
    return f"{title} ({shown:,} of {there:,})" if there > shown else title


def headed(title: str, keys: Iterable[tuple[str, str]] = ()) -> str:
    """A heading; ``keys`` are names and colours of what is below."""
    boxes = (f'<span class="key"><i style="background: {colour}"></i>{name}</span>' for name, colour in keys)
    return f"<h3>{title}{''.join(boxes)}</h3>"


def _table(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    none: str,
    numbers: Iterable[int] = (),
    wide: Iterable[int] = (),
) -> str:
    """Cells are HTML; ``none`` is said where there are no rows."""
    kinds = {**dict.fromkeys(numbers, ' class="number"'), **dict.fromkeys(wide, ' class="wide"')}

    def line(tag: str, cells: Sequence[str]) -> str:
        inside = (f"<{tag}{kinds.get(i, '')}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(line("td", row) for row in rows)
    if not body:
        return f'{headed(title)}<div class="none">{none}</div>'
    return f"{headed(title)}<table>{line('th', heads)}{body}</table>"
