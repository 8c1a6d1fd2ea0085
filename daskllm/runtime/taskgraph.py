"""The tasks of a Dask object, drawn as the layer graphs are, without another program.

It reads names and dependencies. It refuses to know what the tasks do.
"""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

from dask.base import collections_to_expr
from dask.order import order
from dask.utils import key_split

from daskllm.graph import draw

__all__ = ["draw_tasks"]


def draw_tasks(collection: Any, path: str | PathLike[str] | None = None) -> draw.Drawing:
    """The tasks of a Dask collection: shown by a notebook, written to ``path`` when given (.svg, .mmd, …).

    Example:
        >>> from dask import delayed
        >>> one = delayed(abs)(-1, dask_key_name="one-0")
        >>> print(draw_tasks(delayed(abs)(one, dask_key_name="two-0")))
        task  after
        ----  -----
        one
        two   one
    """
    graph = collections_to_expr([collection], optimize_graph=False).__dask_graph__()
    places = order(graph)
    keys = [key for key in sorted(graph, key=places.__getitem__) if hasattr(graph[key], "dependencies")]
    names = {key: str(key).rpartition("-")[0] or str(key) for key in keys}
    before = {key: [one for one in graph[key].dependencies if one in names] for key in keys}
    boxes = tuple(draw.Box(names[key], (names[key],), key_split(names[key])) for key in keys)
    arrows = tuple(draw.Arrow(names[a], names[b]) for b in keys for a in sorted(before[b], key=str))
    rows = [(names[key], ", ".join(sorted(names[one] for one in before[key]))) for key in keys]
    text = draw.table(("task", "after"), rows)
    drawing = draw.Drawing(draw.Picture("tasks", boxes, arrows), text, json.dumps(dict(rows)))
    if path is not None:
        drawing.save(path)
    return drawing
