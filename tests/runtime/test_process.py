from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client

from daskllm.runtime import process
from daskllm.runtime.process import (
    close_idle,
    close_idle_on,
    close_session,
    is_open,
    open_session_on,
    session_for,
    using,
)
from daskllm.runtime.resident import close_model, model_for, open_models
from daskllm.types import ModelError, ModelSpec, StageSpec
from tests import tiny
from tests.fake_session import FakeLLM, FakeSpec


def test_one_session_is_opened_however_many_ask(fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    everyone = threading.Barrier(8)
    opening = process.open_session

    def slowly(spec: Any) -> Any:
        opened.append(spec)
        everyone.wait(10)  # the others are asking while this opens
        return opening(spec)

    def ask(number: int) -> Any:
        if number:
            everyone.wait(10)
        return session_for(fake.spec)

    monkeypatch.setattr(process, "open_session", slowly)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, 0)
        sessions = {id(future.result()) for future in [first, *(pool.submit(ask, i) for i in range(1, 8))]}
    assert len(sessions) == 1
    assert len(opened) == 1


def test_a_failure_reaches_all_who_wait_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec: Any = FakeSpec(log="", broken=True)
    asked = threading.Event()
    opening = process.open_session

    def slowly(spec: Any) -> Any:
        asked.wait(10)
        return opening(spec)

    monkeypatch.setattr(process, "open_session", slowly)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(session_for, spec) for _ in range(4)]
        asked.set()
        errors = [future.exception() for future in futures]
    assert all(isinstance(error, ModelError) for error in errors)
    assert spec not in process._sessions


def test_a_closed_session_is_opened_anew(fake: FakeLLM) -> None:
    first = fake.session()
    close_session(fake.spec)  # type: ignore[arg-type]
    close_session(fake.spec)  # type: ignore[arg-type]
    assert first.closed
    assert fake.session() is not first


@pytest.mark.cluster
def test_opening_on_workers_raises_what_opening_raises(two_processes: Client, fake: FakeLLM) -> None:
    with pytest.raises(ModelError, match="is broken"):
        two_processes.run(open_session_on, FakeSpec(log="", broken=True))
    assert len(two_processes.run(open_session_on, fake.spec)) == 2


def test_what_is_idle_for_long_is_closed_and_what_is_in_use_is_not(fake: FakeLLM) -> None:
    spec: Any = fake.spec
    with using(spec) as session:
        assert close_idle(spec, 0.0)
        assert is_open(spec)
    assert close_idle(spec, 1000.0)
    assert is_open(spec)
    assert not close_idle(spec, 0.0)
    assert not is_open(spec)
    assert session.closed  # type: ignore[attr-defined]
    assert not close_idle(spec, 0.0)


@pytest.mark.parametrize("held", [True, False])
def test_a_worker_with_a_stage_keeps_the_model_s_files(
    held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that loads for longer than a lease lasts must not have them closed under it."""
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    spec = ModelSpec(path=str(path), stages=(StageSpec("here", ("embed",)), StageSpec("there", ("head",))))

    async def close(spec: ModelSpec, seconds: float) -> bool:
        return held

    monkeypatch.setattr("daskllm.runtime.stages.host_of", lambda worker: SimpleNamespace(close_idle=close))
    model = model_for(spec)
    try:
        worker: Any = None
        assert asyncio.run(close_idle_on(spec, 0.0, worker)) == held
        assert (spec in open_models()) == held
        if held:
            model.load(["embed"])
    finally:
        close_model(spec)
