"""What notebooks show of a model, without asking anybody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import daskllm
from daskllm import demo
from daskllm.runtime import resident
from daskllm.types import ModelSpec, StageSpec
from tests.test_markup import words


@pytest.fixture
def llm() -> daskllm.LLM:
    return daskllm.LLM(ModelSpec(path=str(demo.model_path())))


def test_a_model_that_is_not_open_is_not_opened(llm: daskllm.LLM) -> None:
    others = resident.open_models()
    shown = words(llm._repr_html_())
    assert "LLM model" in shown
    assert "4 layers of 128, 4 heads of 32 (2 for keys and values), vocabulary 2,048, context 512" in shown
    assert "this process, not open now" in shown
    assert resident.open_models() == others


def test_an_open_model_says_what_it_holds(llm: daskllm.LLM) -> None:
    try:
        llm.session()
        assert "MiB resident" in words(llm._repr_html_())
    finally:
        llm.close()


def test_the_stages_of_each_replica(llm: daskllm.LLM) -> None:
    first = StageSpec("tcp://a:1", ("embed", "layers.0", "layers.1"))
    second = StageSpec("tcp://<b>:1", ("layers.2", "layers.3", "head"))
    html = daskllm.LLM(replace(llm.spec, stages=(first, second)))._repr_html_()
    assert "<b>" not in html
    shown = words(html)
    assert "1 replica(s) of 2 stage(s)" in shown
    assert "tcp://a:1" in shown
    assert "layers.2-3, head" in shown


def test_where_the_files_are_gone(tmp_path: Path) -> None:
    shown = words(daskllm.LLM(ModelSpec(path=str(tmp_path / "gone")))._repr_html_())
    assert "LLM gone" in shown
    assert str(tmp_path) in shown
