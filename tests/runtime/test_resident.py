"""Models that this process holds: opened once, and nobody waits who only looks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.runtime import resident
from daskllm.runtime.resident import close_model, model_for, open_models, resident_bytes
from daskllm.types import ModelError, ModelSpec
from tests.tiny import make_model


class SlowFiles:
    """Files that come when they are let come."""

    def __init__(self) -> None:
        self.asked, self.come = threading.Event(), threading.Event()
        self.opened: list[Checkpoint] = []
        self.released: list[str] = []

    def open(self, spec: ModelSpec) -> Checkpoint:
        self.asked.set()
        assert self.come.wait(30)
        self.opened.append(open_checkpoint(spec.path))
        return self.opened[-1]

    def release(self, identity: str) -> None:
        self.released.append(identity)


@pytest.fixture
def files() -> Iterator[SlowFiles]:
    files = SlowFiles()
    resident._files.insert(0, files)
    yield files
    resident.forget_files(files)


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[ModelSpec]:
    spec = ModelSpec(path=str(make_model("llama-gqa", tmp_path)), device="cpu", identity="mine")
    yield spec
    close_model(spec)


def test_one_model_is_opened_however_many_ask(files: SlowFiles, spec: ModelSpec) -> None:
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(model_for, spec) for _ in range(4)]
        assert files.asked.wait(30)
        assert resident_bytes(spec) == {}  # an event loop asks this, and the files may need that loop
        files.come.set()
        models = {future.result(30) for future in asking}
    assert len(models) == len(files.opened) == 1
    assert models.pop().layer("embed") is model_for(spec).layer("embed")
    assert resident_bytes(spec).keys() == {"embed"}


def test_what_is_closed_while_it_opens_does_not_stay(files: SlowFiles, spec: ModelSpec) -> None:
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(model_for, spec)
        assert files.asked.wait(30)
        close_model(spec)
        files.come.set()
        model = asking.result(30)
    assert spec not in open_models()
    with pytest.raises(ValueError, match="has been closed"):
        model.layer("embed")


def test_files_are_let_go_with_the_last_model_of_them(files: SlowFiles, spec: ModelSpec) -> None:
    files.come.set()
    other = ModelSpec(path=spec.path, device="cpu", identity="mine", kv_memory=1)
    model_for(spec), model_for(other)
    close_model(spec)
    assert files.released == []
    close_model(other)
    assert files.released == ["mine"]


def test_a_failure_leaves_nothing_and_the_next_try_is_anew(files: SlowFiles, tmp_path: Path) -> None:
    files.come.set()
    spec = ModelSpec(path=str(tmp_path / "absent"), device="cpu")
    for _ in range(2):
        with pytest.raises(ModelError, match="no directory"):
            model_for(spec)
        assert spec not in open_models()
