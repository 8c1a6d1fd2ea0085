"""Blocks share memory with torch in both directions, and say what they need of a GPU."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from daskllm.blocks import array


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float32", "float32"), ("float16", "float16"), ("bfloat16", "uint16")]
)
def test_round_trip_without_a_copy(dtype: str, kept: str) -> None:
    tensor = torch.randn(5, 3).to(array.DTYPES[dtype])
    block = array.from_torch(tensor)
    assert isinstance(block, np.ndarray)
    assert block.dtype == kept
    assert block.shape == (5, 3)
    back = array.to_torch(block, dtype)
    assert back.dtype == tensor.dtype
    assert back.data_ptr() == block.ctypes.data == tensor.data_ptr()
    assert array.nbytes(block) == tensor.nbytes


def test_what_is_no_block() -> None:
    with pytest.raises(TypeError, match=r"not torch\.int64"):
        array.from_torch(torch.arange(3))
    with pytest.raises(ValueError, match="strided"):
        array.from_torch(torch.ones(3, 2).t())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_block_of_another_type(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"float32 does not hold '{dtype}'"):
        array.to_torch(np.zeros(2, np.float32), dtype)


def test_to_device_on_the_cpu_is_the_block_itself() -> None:
    block = np.zeros(2, np.float32)
    assert array.to_device(block, "cpu") is block
    with pytest.raises(ValueError, match='"cpu" or "cuda"'):
        array.to_device(block, "meta")


def test_a_gpu_without_cupy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"daskllm\[gpu\]"):
        array.to_device(np.zeros(2, np.float32), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", array.DTYPES)
def test_a_gpu_block_is_a_view(dtype: str) -> None:
    tensor = torch.randn(5, 3).to(array.DTYPES[dtype])
    block = array.to_device(array.from_torch(tensor), "cuda")
    assert type(block).__module__.startswith("cupy")
    assert array.is_on(block, "cuda")
    assert not array.is_on(block, "cpu")
    assert array.to_device(block, "cuda") is block
    view = array.to_torch(block, dtype)
    assert view.data_ptr() == block.data.ptr
    assert torch.equal(view.cpu(), tensor)
    again = array.from_torch(view)
    assert again.data.ptr == block.data.ptr
    assert np.array_equal(array.to_device(block, "cpu"), array.from_torch(tensor))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_drop_pages_frees_a_mapped_block_and_keeps_its_values(tmp_path: Path) -> None:
    def resident() -> int:
        """Bytes of the file that this process has in memory."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        found = [next(x for x in lines if x.startswith("Rss")) for line in lines if str(file) in line]
        return sum(int(line.split()[1]) for line in found) * 1024

    file = tmp_path / "w.safetensors"
    values = torch.randn(1024, 1024).to(torch.bfloat16)
    save_file({"a": values, "b": values.clone()}, file)
    with safe_open(str(file), framework="pt") as opened:
        mapped, neighbour = (array.from_torch(opened.get_tensor(name)) for name in "ab")
    ordinary = np.ones(1 << 20, np.float32)
    for block in (mapped, neighbour):
        block.sum()
    before = resident()
    dropped, none = array.drop_pages(mapped, ordinary)
    assert none is None
    assert dropped is not None
    assert mapped.nbytes - 8192 <= dropped <= mapped.nbytes
    assert before - resident() == dropped
    assert torch.equal(array.to_torch(mapped, "bfloat16"), values)
    assert ordinary.all()
    assert array.drop_pages() == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_that_stay_are_looked_for_once_and_forgotten_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, look = [], array._mapped_files

    def noted() -> list[tuple[int, int]]:
        looked.append(1)
        return look()

    monkeypatch.setattr(array, "_mapped_files", noted)
    file = tmp_path / "w.safetensors"
    save_file({name: torch.randn(256, 256) for name in "ab"}, file)
    with safe_open(str(file), framework="pt") as opened:
        first, second = (array.from_torch(opened.get_tensor(name)) for name in "ab")
    ordinary = np.ones(1 << 20, np.float32)
    with suppress(KeyError), array.files_stay():
        assert all(array.pages(first, second))
        assert array.pages(second)[0] is not None
        assert len(looked) == 1
        assert array.drop_pages(ordinary, second)[0] is None
        assert array.pages(first)[0] is not None
        raise KeyError
    assert ordinary.all()
    before = len(looked)
    array.pages(first)
    array.pages(first)
    assert len(looked) == before + 2
