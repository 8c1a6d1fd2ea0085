"""The tasks of a Dask object as a picture: each once, with what it waits for."""

from __future__ import annotations

import json
from pathlib import Path

from daskllm.llm import load
from daskllm.models import layer_names
from daskllm.runtime.taskgraph import draw_tasks
from tests import tiny


def test_every_layer_task_is_drawn_with_what_it_waits_for(tmp_path: Path) -> None:
    llm = load(tiny.make_model("llama-gqa", tmp_path / "model"))
    names = layer_names(llm.config)
    drawing = draw_tasks(llm.delayed([1, 5, 9]), tmp_path / "tasks.svg")
    assert [box.id for box in drawing.picture.boxes] == list(names)
    assert json.loads(drawing.json) == dict(zip(names, ("", *names), strict=False))
    assert all(name in (tmp_path / "tasks.svg").read_text() for name in names)
    steps = json.loads(draw_tasks(llm.delayed([1], max_tokens=2)).json)
    first = f"{names[1]}.token"
    assert steps[f"{first}.1"] == f"{names[0]}.token.1, {first}.0"
    llm.close()
