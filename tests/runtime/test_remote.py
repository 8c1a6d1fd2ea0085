"""What is asked of an engine elsewhere when a stage is lost in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daskllm.runtime.remote import RemoteSession
from daskllm.types import Completion, ModelSpec, SamplingParams, StageLostError, StageSpec
from tests import tiny


def row(number: int) -> list[Completion]:
    return [Completion(str(number), (number,), "stop", 1, 1)]


def news(*rows: tuple[int, list[Completion]], end: BaseException | None = None, done: bool = False) -> Any:
    return {"done": done, "pieces": [], "made": ([], list(rows)), "end": (None, end)}


@pytest.fixture
def session(tmp_path: Path) -> Iterator[RemoteSession]:
    path = tiny.make_model("gpt2", tmp_path)
    session = RemoteSession(ModelSpec(path=str(path), stages=(StageSpec("tcp://a", ("embed",)),)))
    yield session
    session.close()


def test_only_rows_that_have_not_finished_are_asked_again(
    session: RemoteSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def kept(kind: str, arguments: dict[str, Any]) -> Iterator[Any]:
        asked.append({name: list(arguments[name]) for name in ("prompts", "params", "places")})
        yield news((2, row(2)))
        yield news((0, row(0)))
        yield None  # a stage was lost
        asked.append({name: list(arguments[name]) for name in ("prompts", "params", "places")})
        yield news((1, row(3)))
        yield news((0, row(1)), done=True)

    monkeypatch.setattr(session, "_kept", kept)
    params = [SamplingParams(max_tokens=n + 1) for n in range(4)]
    handed: list[tuple[int, list[Completion]]] = []
    answers = session.generate(["a", "b", "c", "d"], params, finished=handed.extend)
    assert answers == [row(n) for n in range(4)]
    assert [number for number, _ in handed] == [2, 0, 3, 1]
    assert all(answers[number] == samples for number, samples in handed)
    assert asked == [
        {"prompts": ["a", "b", "c", "d"], "params": params, "places": [(0,), (1,), (2,), (3,)]},
        {"prompts": ["b", "d"], "params": params[1::2], "places": [(1,), (3,)]},
    ]


def test_nothing_is_asked_again_when_all_have_finished(
    session: RemoteSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(kind: str, arguments: dict[str, Any]) -> Iterator[Any]:
        yield news((0, row(0)), (1, row(1)))
        yield None
        pytest.fail("it was asked again")

    monkeypatch.setattr(session, "_kept", kept)
    assert session.generate(["a", "b"], SamplingParams()) == [row(0), row(1)]
    assert session.generate([], SamplingParams()) == []


def test_rows_come_before_what_ends_the_call(session: RemoteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the same news as the end, where a stage that is lost fails an engine's step."""
    told = [news((0, row(0)), end=StageLostError("gone"), done=True), news((0, row(1)), done=True)]

    def polled(*_: Any) -> Iterator[Any]:
        one = told.pop(0)
        yield one
        if one["end"][1] is not None:
            raise one["end"][1]

    class Chain:
        def __enter__(self) -> ModelSpec:
            return session.spec

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("daskllm.runtime.remote.node_for", lambda spec: None)
    monkeypatch.setattr(session, "_news", polled)
    monkeypatch.setattr(session._chains, "chosen", lambda *_: Chain())
    monkeypatch.setattr(session._chains, "lose", lambda *_: None)
    assert session.generate(["a", "b"], SamplingParams()) == [row(0), row(1)]
