"""The pages on a scheduler's dashboard that runs already: their addresses, and their place in its menus.

It owns how a page comes to Dask's server of Bokeh documents, which was made for a fixed set of them. It
refuses to know what is on the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from bokeh.application import Application
from bokeh.application.handlers.document_lifecycle import DocumentLifecycleHandler
from bokeh.application.handlers.function import FunctionHandler
from bokeh.server.contexts import ApplicationContext
from bokeh.server.tornado import BokehTornado
from bokeh.server.urls import per_app_patterns
from bokeh.server.views.ws import WSHandler
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.scheduler import template_variables

from daskllm.dashboard.plots import Jobs, Page, Part, Stages, Tokens, Workers

if TYPE_CHECKING:
    from bokeh.document import Document
    from distributed import Scheduler

    from daskllm.dashboard.board import Board

__all__ = ["add_pages"]

PAGE = "/llm"
_ALONE: dict[str, type[Part]] = {
    "/individual-llm": Page,
    "/individual-llm-tokens": Tokens,
    "/individual-llm-workers": Workers,
    "/individual-llm-jobs": Jobs,
    "/individual-llm-stages": Stages,
}
"""Parts by themselves; what begins with "individual-" is listed for JupyterLab's extension."""
_MILLISECONDS = 1000


def add_pages(scheduler: Scheduler, board: Board) -> None:
    """Put the page, and its parts by themselves, on a scheduler's dashboard, if it has one."""
    applications = getattr(scheduler.http_application, "applications", ())
    server = next((one for one in applications if isinstance(one, BokehTornado)), None)
    if server is None or PAGE in server.applications:
        return
    # One set of lists for all of Dask's pages: what is put there is in the menus of those that are open next.
    menus = template_variables(scheduler)
    menus["pages"].insert(1, PAGE.strip("/"))
    menus["plots"].append({"url": "individual-llm", "name": "LLM"})
    menus["plots"].sort(key=lambda plot: plot["name"])
    prefix = f"/{server.prefix.strip('/')}/".replace("//", "/")
    _add(server, PAGE, partial(_page, board, {"prefix": prefix, **menus}))
    for url, part in _ALONE.items():
        _add(server, url, partial(_alone, board, part))


def _page(board: Board, extra: dict[str, Any], document: Document) -> None:
    _show(board, Page, document)
    document.template = env.get_template("simple.html")
    document.template_variables.update(extra)


def _alone(board: Board, kind: type[Part], document: Document) -> None:
    _show(board, kind, document)


def _show(board: Board, kind: type[Part], document: Document) -> None:
    part = kind(board)
    part.update()
    add_periodic_callback(document, part, _MILLISECONDS)
    document.add_root(part.root)
    document.title = "Dask: LLM"
    document.theme = BOKEH_THEME


def _add(server: BokehTornado, url: str, make: Callable[[Document], None]) -> None:
    application = Application(FunctionHandler(make))
    application.add(DocumentLifecycleHandler())
    context = ApplicationContext(application, url=url, io_loop=server.io_loop)
    cast("dict[str, ApplicationContext]", server.applications)[url] = context
    where = server.prefix + url
    patterns = []
    for path, handler, *_ in per_app_patterns:
        given = {"application_context": context, "bokeh_websocket_path": f"{where}/ws"}
        if issubclass(handler, WSHandler):
            given |= {"compression_level": None, "mem_level": None}
        patterns.append((where + path, handler, given))
    server.add_handlers(r".*", patterns)
    server.io_loop.add_callback(context.run_load_hook)
