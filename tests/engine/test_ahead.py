"""Products laid out from files before torch is there: to the bit what packing makes, or left to packing."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import daskllm
from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.engine.ahead import Ahead, products
from daskllm.engine.kernels.cpu import gemm
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.kernels.cpu.fields import FILL_DONE, FILL_FIELDS, FILL_STOP, NOWHERE
from daskllm.engine.kernels.cpu.gemm import Packed
from daskllm.engine.kernels.cpu.panels import FILL, Filling, Stored, panels_of
from daskllm.engine.kernels.cpu.registers import COLUMNS, DENIED
from daskllm.engine.layers import DecoderLayer, Head, ResidentModel
from daskllm.models import describe, layer_names
from daskllm.types import ModelSpec
from tests import tiny

pytestmark = pytest.mark.skipif(bool(DENIED), reason="weights are not packed here")


@pytest.fixture(autouse=True)
def _compiled() -> None:
    FILL.load()  # what has to be compiled first is not used


Taken = dict[tuple[str, tuple[str, ...]], tuple[memoryview, bool] | None]


def _wait(ahead: Ahead) -> None:
    assert ahead._filling is not None
    ahead._filling._thread.join(60)
    assert not ahead._filling._thread.is_alive()


def _packed(model: ResidentModel) -> dict[str, Packed]:
    found = {}
    for name in layer_names(model.config):
        layer = model.layer(name)
        if isinstance(layer, Head):
            found[name] = layer.lm_head
        elif isinstance(layer, DecoderLayer):
            found |= {f"{name}.{part}": getattr(layer, part) for part in ("qkv", "o", "gate_up", "down")}
    return found


def _taken(ahead: Ahead, checkpoint: Checkpoint) -> Taken:
    config = describe(checkpoint.config)
    wanted = [(layer, names) for layer in layer_names(config) for names in products(config, layer)]
    return {(layer, names): ahead.take(layer, names) for layer, names in wanted}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["llama-gqa", "llama-biases-gelu", "llama-tied-odd", "qwen3", "gpt2", "gpt2-untied-gelu-odd"]
)
def test_what_is_laid_out_from_files_is_what_packing_makes(name: str, dtype: str, tmp_path: Path) -> None:
    path = tiny.make_model(name, tmp_path / "model", dtype, max_shard_size="40KB")
    spec = ModelSpec(path=str(path), device="cpu")
    checkpoint = open_checkpoint(str(path))
    ahead = Ahead(spec, checkpoint)
    _wait(ahead)
    hits: list[tuple[tuple[str, ...], bool]] = []
    take = ahead.take

    def noted(layer: str, names: tuple[str, ...]) -> Any:
        found = take(layer, names)
        assert found is not None
        hits.append((names, found[1]))
        return found

    ahead.take = noted  # type: ignore[method-assign]
    model, plain = ResidentModel.open(spec, checkpoint, ahead), ResidentModel.open(spec)
    model.load(layer_names(model.config))
    plain.load(layer_names(model.config))
    laid, other = _packed(model), _packed(plain)
    assert laid.keys() == other.keys()
    for part, packed in laid.items():
        assert torch.equal(packed.panels, other[part].panels), part
        assert torch.equal(packed.bias, other[part].bias), part
        assert torch.equal(packed.places, other[part].places), part
    assert model.nbytes() == plain.nbytes()
    # GPT-2 has its layers' weights the other way round in its files; odd rows end within a word.
    rows = {"gpt2": {("lm_head",)}, "gpt2-untied-gelu-odd": {("lm_head",)}}.get(name)
    assert {names for names, done in hits if done} == (rows or {names for names, _ in hits})
    model.close()
    plain.close()


BEFORE = """
import json, sys
import daskllm
from daskllm.engine.kernels.cpu import panels

made, taken, begin, take = [], [], panels.Filling.__init__, panels.Filling.take

def noted(self, products, code):
    made.append([len(products), "torch" in sys.modules])
    begin(self, products, code)

def waited(self, name):
    self._thread.join()
    found = take(self, name)
    taken.append(found[1])
    return found

panels.Filling.__init__, panels.Filling.take = noted, waited
llm = daskllm.load(sys.argv[1], answers=None)
(answer,) = llm.generate([[5, 6, 7]], max_tokens=8, ignore_eos=True)
print(json.dumps([made, taken, answer.token_ids]))
"""


def test_a_process_without_torch_lays_out_all_of_a_model_and_answers_the_same(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model", "bfloat16")
    llm = daskllm.load(path, answers=None)
    (answer,) = llm.generate([[5, 6, 7]], max_tokens=8, ignore_eos=True)
    llm.close()
    done = subprocess.run(
        [sys.executable, "-c", BEFORE, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made, taken, tokens = json.loads(done.stdout)
    assert made == [[3 * 4 + 1, False]]
    assert taken == [True] * 13
    assert tokens == list(answer.token_ids)


class _Slow:
    """Lays the first strip out, in its way, and waits to be told to stop."""

    def call(self, pointer: int) -> None:
        arguments = np.frombuffer((ctypes.c_int64 * FILL_FIELDS).from_address(pointer), np.int64)
        arguments[FILL_DONE] = 1
        while not arguments[FILL_STOP]:
            time.sleep(0.001)


def test_what_is_not_there_when_it_is_asked_for_is_left_to_packing() -> None:
    weight = Stored(0, 0, COLUMNS, 4)
    filling = Filling({"a": [weight], "b": [weight, weight], "c": [weight]}, _Slow())  # type: ignore[arg-type]
    while not filling._arguments[FILL_DONE]:
        time.sleep(0.001)
    first = filling.take("a")
    assert first is not None
    assert first[1]
    assert filling._thread.is_alive()
    second = filling.take("b")
    assert second is not None
    assert (second[0].nbytes, second[1]) == (2 * weight.nbytes, False)
    assert not filling._thread.is_alive()  # else it would write where packing does
    third = filling.take("c")
    assert third is not None
    assert not third[1]
    assert filling.take("a") is None


def test_of_a_file_that_is_shorter_than_it_says_nothing_is_taken_for_laid_out(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(np.arange(3 * COLUMNS * 2, dtype=np.int32).tobytes())
    descriptor = os.open(file, os.O_RDONLY)
    whole, short = Stored(descriptor, 0, COLUMNS, 2), Stored(descriptor, COLUMNS * 8, 3 * COLUMNS, 2)
    filling = Filling({"whole": [whole], "short": [short], "after": [whole]}, FILL.load())
    filling._thread.join(60)
    found = {name: filling.take(name) for name in ("whole", "short", "after")}
    os.close(descriptor)
    assert [taken[1] for taken in found.values() if taken] == [True, False, False]
    assert found["whole"] is not None
    laid = np.frombuffer(found["whole"][0], np.int32).reshape(2, COLUMNS)
    assert (laid == np.arange(COLUMNS * 2).reshape(COLUMNS, 2).T).all()


@pytest.mark.parametrize("outputs", [3, 64 * COLUMNS * 2 + 3])
def test_memory_that_is_only_sent_for_is_not_taken_for_laid_out(outputs: int) -> None:
    filling = Filling({"a": [Stored(NOWHERE, 0, outputs, 5)]}, FILL.load())
    filling._thread.join(60)
    assert filling._arguments[FILL_DONE] == filling._arguments[1] > 0
    found = filling.take("a")
    assert found is not None
    assert (found[0].nbytes, found[1]) == (-(-outputs // COLUMNS) * COLUMNS * 5 * 4, False)
    assert not any(found[0])


def test_weights_of_many_strips_are_what_packing_makes(tmp_path: Path) -> None:
    sizes = [64 * COLUMNS * 2 + 3, 5, 9 * COLUMNS]
    weights = [torch.randn(outputs, 37 * 2).bfloat16() for outputs in sizes]
    file = tmp_path / "weights"
    file.write_bytes(b"".join(w.view(torch.int16).numpy().tobytes() for w in weights))
    descriptor = os.open(file, os.O_RDONLY)
    starts = np.cumsum([0, *(w.nbytes for w in weights)])
    stored = [Stored(descriptor, int(a), n, 37) for a, n in zip(starts, sizes, strict=False)]
    filling = Filling({"a": stored}, FILL.load())
    filling._thread.join(60)
    os.close(descriptor)
    found = filling.take("a")
    assert found is not None
    assert found[1]
    laid, packed = gemm.pack(weights, None, found), gemm.pack(weights, None)
    assert torch.equal(laid.panels, packed.panels)
    first = 0
    for weight in weights:
        panels = laid.panels[first : first + panels_of(len(weight))]
        rows = panels.permute(0, 2, 1, 3).reshape(-1, 37 * 2)
        assert torch.equal(rows[: len(weight)], weight)
        assert not rows[len(weight) :].any()
        first += len(panels)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", ["load", "close", "error"])
def test_files_and_thread_end_with_loading(how: str, tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model", max_shard_size="40KB")
    spec, checkpoint = ModelSpec(path=str(path), device="cpu"), open_checkpoint(str(path))
    before = len(os.listdir("/proc/self/fd"))
    ahead = Ahead(spec, checkpoint)
    filling = ahead._filling
    assert filling is not None
    assert len(os.listdir("/proc/self/fd")) > before
    model = ResidentModel.open(spec, checkpoint, ahead)
    if how == "load":
        model.load(layer_names(model.config))
    elif how == "close":
        model.close()
    else:
        with pytest.raises(ValueError, match="unknown layer"):
            model.load(["layers.99"])
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not filling._thread.is_alive()
    assert ahead.take("head", ("lm_head",)) is None
    model.close()


@pytest.mark.parametrize("why", ["int8", "widened", "not compiled", "gpu", "no memory"])
def test_nothing_is_laid_out_that_packing_does_not_make_of_files(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model", "bfloat16")
    given: dict[str, Any] = {"device": "cpu"}
    if why == "int8":
        given["quantize"] = "int8"
    elif why == "widened":
        given["dtype"] = "float32"
    elif why == "gpu":
        given["device"] = "cuda"
    elif why == "no memory":
        monkeypatch.setattr("daskllm.machine.available_memory", lambda: 1000)
    else:
        monkeypatch.setattr(Kernel, "find", lambda kernel: None)
    checkpoint = open_checkpoint(str(path))
    ahead = Ahead(ModelSpec(path=str(path), **given), checkpoint)
    assert all(found is None for found in _taken(ahead, checkpoint).values())
    assert not ahead._files
    checkpoint.close()


@pytest.mark.parametrize("change", ["replaced", "gone"])
def test_files_that_are_others_by_now_are_left_to_whoever_says_so(change: str, tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    checkpoint = open_checkpoint(str(path))
    file = path / "model.safetensors"
    if change == "gone":
        file.unlink()
    else:
        other = tmp_path / "other"
        other.write_bytes(file.read_bytes() + b" ")
        os.replace(other, file)
    assert checkpoint.descriptor("lm_head.weight") is None
    ahead = Ahead(ModelSpec(path=str(path), device="cpu"), checkpoint)
    _wait(ahead)
    assert [found and found[1] for found in _taken(ahead, checkpoint).values()] == [False] * 13
    ahead.close()
    checkpoint.close()


def test_a_descriptor_reads_the_tensor(tmp_path: Path) -> None:
    path = tiny.make_model("llama-gqa", tmp_path / "model")
    checkpoint = open_checkpoint(str(path))
    _, start, end = checkpoint.span("lm_head.weight")
    descriptor = checkpoint.descriptor("lm_head.weight")
    assert descriptor is not None
    read = torch.frombuffer(bytearray(os.pread(descriptor, end - start, start)), dtype=torch.float32)
    os.close(descriptor)
    assert torch.equal(read, checkpoint.tensor("lm_head.weight").flatten())
    checkpoint.close()
