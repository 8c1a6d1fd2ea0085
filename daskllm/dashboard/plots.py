"""The board as plots of Bokeh: what changes over time, and how full and busy each worker is.

It owns how figures are drawn. Every part has a ``root`` to be put on a page, and ``update``, which is called
once a second while somebody looks. Nothing comes from the network: Dask serves BokehJS itself.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, Div, FactorRange, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from daskllm.dashboard import tables
from daskllm.dashboard.board import Board, WorkerView
from daskllm.dashboard.engines import PHASES

__all__ = ["Jobs", "Page", "Part", "Stages", "Tokens", "Workers"]

PROMPT, OUTPUT, IDLE, STAGE, KV = "#4c78a8", "#f28e2b", "#e5e7eb", "#72b7b2", "#8f7fc2"
_SPENT = dict(zip((*PHASES, "idle"), (PROMPT, OUTPUT, STAGE, IDLE), strict=True))
"""Colours of what a worker's time goes to."""
_CALLED = {"stage": "inner stage"}
_SECONDS = 300
"""How far back the lines are shown."""
_WORKERS = 24
"""Bars that are shown."""
_HEIGHT = 190


class Part(ABC):
    """Something on a page.

    Args:
        board: what it shows.

    Attributes:
        root: the model of Bokeh that is put on the page.
    """

    root: Any

    def __init__(self, board: Board) -> None:
        self.board = board

    @abstractmethod
    def update(self) -> None:
        """Show what is known by now."""


class _Text(Part):
    def __init__(self, board: Board, write: Callable[[Board, float], str]) -> None:
        super().__init__(board)
        self._write = write
        self.root = _html("")

    def update(self) -> None:
        """See `Part`."""
        self.root.text = self._write(self.board, time.time())


class Jobs(_Text):
    """Jobs with their queue and priority."""

    def __init__(self, board: Board) -> None:
        super().__init__(board, tables.jobs)


class Stages(_Text):
    """Models and stages with their layers and bytes, by worker."""

    def __init__(self, board: Board) -> None:
        super().__init__(board, tables.stages)


class Tokens(Part):
    """Output and prompt tokens per second over time."""

    def __init__(self, board: Board) -> None:
        super().__init__(board)
        self.source = ColumnDataSource({"x": [], "output": [], "prompt": [], "zero": []})
        self.x_range = Range1d(-60, 0)
        self.figures = {
            name: self._figure(name, colour) for name, colour in (("output", OUTPUT), ("prompt", PROMPT))
        }
        both = [
            _below(_html(tables.headed(f"{name.capitalize()} tokens per second")), plot)
            for name, plot in self.figures.items()
        ]
        self.root = row(*both, sizing_mode="stretch_width", spacing=20)

    def _figure(self, name: str, colour: str) -> Any:
        plot = _plot(_HEIGHT, x_range=self.x_range)
        plot.varea("x", "zero", name, source=self.source, color=colour, alpha=0.25)
        plot.line("x", name, source=self.source, color=colour, line_width=2)
        plot.y_range.start = 0
        plot.yaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.xaxis.axis_label = "seconds before now"
        plot.yaxis.axis_label = "tokens/s"
        return plot

    def update(self) -> None:
        """See `Part`."""
        now = time.time()
        shown = [moment for moment in self.board.history if moment.time > now - _SECONDS]
        self.x_range.start = -max(60.0, min(float(_SECONDS), now - shown[0].time if shown else 0.0))
        self.source.data = {
            "x": [moment.time - now for moment in shown],
            "output": [moment.output_rate for moment in shown],
            "prompt": [moment.prompt_rate for moment in shown],
            "zero": [0.0] * len(shown),
        }


class Workers(Part):
    """For each worker what its time goes to, how full its batch is, and how full its KV cache."""

    def __init__(self, board: Board) -> None:
        super().__init__(board)
        names = ("worker", *_SPENT, "batch", "batch_text", "kv", "kv_text")
        self.source = ColumnDataSource({name: [] for name in names})
        self.y_range = FactorRange(factors=[])
        self.spent, self.batch, self.kv = self._bars(), self._bars(), self._bars()
        self.spent.hbar_stack(
            list(_SPENT), y="worker", height=0.6, source=self.source, color=list(_SPENT.values())
        )
        for plot, name, colour in ((self.batch, "batch", OUTPUT), (self.kv, "kv", KV)):
            plot.hbar("worker", 0.6, right=1.0, source=self.source, color=IDLE)
            plot.hbar("worker", 0.6, right=name, source=self.source, color=colour)
            label = {"text_font_size": "9pt", "text_baseline": "middle", "text_color": "#1f2937"}
            plot.text(0.015, "worker", text=f"{name}_text", source=self.source, **label)
        self.title = _html("")
        three = (
            _below(self.title, self.spent),
            _below(_html(tables.headed("Batch: sequences of its room")), self.batch),
            _below(_html(tables.headed("KV cache: blocks in use")), self.kv),
        )
        self.root = row(*three, sizing_mode="stretch_width", spacing=20)

    def _bars(self) -> Any:
        plot = _plot(100, x_range=Range1d(0, 1), y_range=self.y_range)
        plot.xaxis.formatter = NumeralTickFormatter(format="0%")
        plot.ygrid.grid_line_color = None
        plot.yaxis.major_label_text_font_size = "9pt"
        return plot

    def update(self) -> None:
        """See `Part`."""
        there = sorted((v for v in self.board.workers.values() if v.engines), key=_by_name)
        views = there[:_WORKERS]
        names = [view.name for view in views]
        title = tables.cut("Time by worker", _WORKERS, len(there))
        self.title.text = tables.headed(title, [(_CALLED.get(name, name), _SPENT[name]) for name in _SPENT])
        shares = {phase: [view.shares.get(phase, 0.0) for view in views] for phase in PHASES}
        idle = [max(0.0, 1 - sum(one)) for one in zip(*shares.values(), strict=True)]
        full = {
            "batch": [(view.of_all("running"), view.of_all("room")) for view in views],
            "kv": [(view.of_all("kv_used"), view.of_all("kv_blocks")) for view in views],
        }
        if names != self.y_range.factors:
            self.y_range.factors = names
            for plot in (self.spent, self.batch, self.kv):
                plot.height = 40 + 28 * max(1, len(names))
        self.source.data = {
            "worker": names,
            **shares,
            "idle": idle,
            **{name: [used / max(1, room) for used, room in bars] for name, bars in full.items()},
            **{f"{name}_text": [_of(used, room) for used, room in bars] for name, bars in full.items()},
        }


class Page(Part):
    """All of it."""

    def __init__(self, board: Board) -> None:
        super().__init__(board)
        head, stages, troubles = _Text(board, tables.tiles), Stages(board), _Text(board, tables.troubles)
        self.parts: list[Part] = [head, Tokens(board), Workers(board), Jobs(board), stages, troubles]
        troubles.root.sizing_mode, troubles.root.width = "fixed", 300
        below = row(stages.root, troubles.root, sizing_mode="stretch_width", spacing=40)
        above = [part.root for part in self.parts[:4]]
        self.root = column(*above, below, sizing_mode="stretch_width", spacing=12, margin=(8, 14, 8, 14))

    def update(self) -> None:
        """See `Part`."""
        for part in self.parts:
            part.update()


def _by_name(view: WorkerView) -> str:
    return view.name


def _of(used: int, room: int) -> str:
    return f"{used:,} of {room:,}" if room else "inner stage"


def _below(head: Div, plot: Any) -> Any:
    # At the end: bars beside each other stay level where one heading takes two lines.
    return column(head, plot, sizing_mode="stretch_width", align="end")


def _html(text: str) -> Div:
    return Div(text=text, sizing_mode="stretch_width", stylesheets=[tables.CSS])


def _plot(height: int, **options: Any) -> Any:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools="",
        toolbar_location=None,
        min_border_right=12,
        **options,
    )
    plot.outline_line_color = None
    plot.xgrid.grid_line_alpha = plot.ygrid.grid_line_alpha = 0.5
    plot.axis.axis_line_color = "#9ca3af"
    plot.axis.minor_tick_line_color = None
    plot.axis.major_tick_in = 0
    plot.axis.axis_label_text_font_size = "8pt"
    plot.axis.axis_label_text_font_style = "normal"
    return plot
