"""Every public name says in its docstring how it is used, in an example that runs with the other tests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import daskllm
import daskllm.answers
import daskllm.demo
import daskllm.graph
import daskllm.jobs
from daskllm.frame import DaskAccessor, PandasAccessor
from daskllm.runtime.taskgraph import draw_tasks

ROOMS: list[ModuleType] = [daskllm, daskllm.jobs, daskllm.graph, daskllm.answers, daskllm.demo]
WHOLE = [daskllm.LLM, DaskAccessor, PandasAccessor, daskllm.graph.LayerGraph, daskllm.graph.Plan]
"""Classes each of whose public methods and properties is a public name."""


def example(thing: Any) -> str:
    """The lines of a docstring's examples that are run."""
    return "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) .*$", thing.__doc__ or "", flags=re.MULTILINE))


def names() -> Iterator[tuple[str, Any]]:
    yield "draw_tasks", draw_tasks
    for room in ROOMS:
        for name in room.__all__:
            thing = getattr(room, name)
            if inspect.isclass(thing) or inspect.isroutine(thing):  # the rest are constants and aliases
                yield f"{room.__name__}.{name}", thing


def members() -> Iterator[tuple[str, type, Any]]:
    for owner in WHOLE:
        for name in dir(owner):
            thing = inspect.getattr_static(owner, name)
            inner = (getattr(thing, a) for a in ("fget", "__func__", "func") if hasattr(thing, a))
            thing = next(inner, thing)
            if not name.startswith("_") and callable(thing):
                yield name, owner, thing


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*pair, id=pair[0]) for pair in names()])
def test_a_public_name_has_an_example(name: str, thing: Any) -> None:
    assert example(thing), f"{name} has no example in its docstring"


@pytest.mark.parametrize(
    ("name", "owner", "thing"), [pytest.param(*one, id=f"{one[1].__name__}.{one[0]}") for one in members()]
)
def test_a_public_method_has_an_example_or_its_class_has(name: str, owner: type, thing: Any) -> None:
    assert thing.__doc__, f"{owner.__name__}.{name} has no docstring"
    shown = example(thing) or re.search(rf"\.{name}\b", example(owner))
    assert shown, f"{owner.__name__}.{name} has no example, and that of {owner.__name__} does not use it"


def test_a_name_without_an_example_would_be_found() -> None:
    def bare() -> None:
        """Says what it does.

        And no more: ``>>>`` in a line is no example.
        """

    assert not example(bare)
    assert len(list(names())) > 60
    assert len(list(members())) > 50
