"""Machine code that is kept between processes."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from daskllm.engine.kernels.cpu import compiled
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.team import run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiled, "kept", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


def quantised(kernel: Kernel) -> list[int]:
    """Two numbers as int8, by this kernel."""
    x, q = torch.tensor([1.0, -0.5]), torch.zeros(4, dtype=torch.int8)
    scale, minus = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    run(kernel, 1, x.data_ptr(), q.data_ptr(), scale.data_ptr(), minus.data_ptr(), 2)
    return q.tolist()


def test_a_kernel_is_compiled_once_and_again_where_its_file_is_not_whole(place: Path) -> None:
    for _ in range(2):
        first, second = Kernel("int8", "quantise_f32"), Kernel("int8", "quantise_f32")
        assert quantised(first) == quantised(second) == [127, -64, 0, 0]
        assert (first.compiled, second.compiled) == (True, False)
        (file,) = place.iterdir()
        file.write_bytes(file.read_bytes()[:-100])


def test_where_nothing_can_be_kept_kernels_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(compiled, "kept", lambda: tmp_path / "file" / "kernels")
    with caplog.at_level(logging.WARNING, logger="daskllm"):
        assert quantised(Kernel("int8", "quantise_f32")) == [127, -64, 0, 0]
    assert "kernels are compiled in each process" in caplog.text


def test_a_user_without_a_home_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kept", lambda: None)
    kernel = Kernel("int8", "quantise_f32")
    assert quantised(kernel) == [127, -64, 0, 0]
    assert kernel.compiled
    monkeypatch.undo()
    kept: Any = compiled.kept
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert kept.__wrapped__() is None


def test_other_sources_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "cpu"
    shutil.copytree(compiled._HERE, copy)
    kept: Any = compiled.kept
    monkeypatch.setattr(compiled, "_HERE", copy)
    assert kept.__wrapped__() == kept()
    with (copy / "code" / "rope.py").open("a") as source:
        source.write("\n")
    assert kept.__wrapped__() != kept()


def test_a_kernel_that_may_raise_is_refused() -> None:
    def careless(pointer):  # type: ignore[no-untyped-def]
        a = numba.carray(pointer, (2,), np.int64)
        if a[1] < 0:
            raise ValueError("nobody hears this")

    with pytest.raises(RuntimeError, match="the kernel careless may raise or allocate: it calls"):
        compiled._compile(careless, "careless")
