"""Machine code that is kept between processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

import daskllm
from daskllm.engine.kernels.cpu import compiled, registers
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.team import run
from tests import tiny


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
        assert (first.was_compiled, second.was_compiled) == (True, False)
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
    assert kernel.was_compiled
    monkeypatch.undo()
    kept: Any = compiled.kept
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert kept.__wrapped__() is None


@pytest.mark.parametrize("name", ["fields.py", "registers.py", "code/rope.py"])
def test_other_sources_are_kept_apart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "cpu"
    shutil.copytree(compiled._HERE, copy)
    kept: Any = compiled.kept
    monkeypatch.setattr(compiled, "_HERE", copy)
    assert kept.__wrapped__() == kept()
    with (copy / name).open("a") as source:
        source.write("\n")
    assert kept.__wrapped__() != kept()


def test_other_machines_shapes_and_compilers_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: Any = compiled.kept
    found = [kept.__wrapped__()]
    for change in (
        lambda: monkeypatch.setattr(compiled.llvm, "get_host_cpu_name", lambda: "another"),
        lambda: monkeypatch.setattr(compiled, "TILE", 4),
        lambda: monkeypatch.setattr(compiled, "version", lambda name: "0.0"),
        lambda: monkeypatch.setenv("NUMBA_OPT", "1"),
        lambda: monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere"),
    ):
        change()
        found.append(kept.__wrapped__())
    assert len(set(found)) == 5
    assert found[-1] == found[-2]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_another_users_code_is_not_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel("int8", "quantise_f32").load()
    mine = os.getuid()
    (file,) = place.iterdir()
    os.chown(file, mine + 1, -1) if mine == 0 else monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    kernel = Kernel("int8", "quantise_f32")
    kernel.load()
    assert kernel.was_compiled


ELSEWHERE = """
import json, sys
import llvmlite.binding

features = llvmlite.binding.get_host_cpu_features()
for name in features:
    features[name] = features[name] and not name.startswith(("avx512", "amx", "avxvnni"))
llvmlite.binding.get_host_cpu_features = lambda: features
import daskllm
from daskllm.engine.kernels.cpu import registers

assert not registers.AMX and registers.COLUMNS == 16 and not registers.VNNI
print(json.dumps([
    [one.token_ids for one in daskllm.load(sys.argv[1], dtype="float32", answers=None, **options).generate(
        [[5, 6, 7, 8, 9] * 9, [3]], max_tokens=12, ignore_eos=True)]
    for options in ({}, {"quantize": "int8", "kv_dtype": "int8"})
] + [daskllm.load(sys.argv[1], dtype="bfloat16", answers=None).score([[5, 6, 7, 8, 9] * 9], tokens=True)]))
"""


def test_a_cpu_with_narrow_registers_gives_the_same_tokens(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *answers, scores = json.loads(done.stdout)
    options: Any
    for options, found in zip(({}, {"quantize": "int8", "kv_dtype": "int8"}), answers, strict=True):
        llm = daskllm.load(path, dtype="float32", answers=None, **options)
        ours = llm.generate([[5, 6, 7, 8, 9] * 9, [3]], max_tokens=12, ignore_eos=True)
        llm.close()
        assert [list(one.token_ids) for one in ours] == found
    llm = daskllm.load(path, dtype="bfloat16", answers=None)
    [ours_], [theirs] = llm.score([[5, 6, 7, 8, 9] * 9], tokens=True), scores
    llm.close()
    assert list(ours_) == pytest.approx(theirs, abs=0.1)


OTHERWISE = """
import json, sys
from daskllm.engine.kernels.cpu import registers

registers.WIDENED = not registers.WIDENED
import daskllm
from daskllm.engine.kernels.cpu.code import gemm

assert gemm.INPUTS == (gemm.np.float32 if registers.WIDENED else gemm.np.uint16)
print(json.dumps([
    daskllm.load(sys.argv[1], dtype="bfloat16", answers=None, **options).score(
        [[5, 6, 7, 8, 9] * 9, [3, 4]], tokens=True)
    for options in ({}, {"quantize": "int8"}, {"kv_dtype": "int8"})
]))
"""


@pytest.mark.skipif(
    registers.AMX or not registers.BFLOAT16, reason="there is one way to multiply bfloat16 here"
)
def test_bfloat16_is_multiplied_in_pairs_and_as_float32(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", OTHERWISE, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    options: Any
    for options, found in zip(
        ({}, {"quantize": "int8"}, {"kv_dtype": "int8"}), json.loads(done.stdout), strict=True
    ):
        llm = daskllm.load(path, dtype="bfloat16", answers=None, **options)
        ours = llm.score([[5, 6, 7, 8, 9] * 9, [3, 4]], tokens=True)
        llm.close()
        for ours_, theirs in zip(ours, found, strict=True):
            assert list(ours_) == pytest.approx(theirs, abs=0.1)


def test_a_kernel_that_may_raise_is_refused() -> None:
    def careless(pointer):  # type: ignore[no-untyped-def]
        a = numba.carray(pointer, (2,), np.int64)
        if a[1] < 0:
            raise ValueError("nobody hears this")

    with pytest.raises(RuntimeError, match="the kernel careless may raise or allocate: it calls"):
        compiled._compile(careless, "careless")
