"""What opening a model compiles, and the most memory that it ever takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import daskllm
from daskllm import demo
from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.kernels.cpu.compiled import Kernel
from daskllm.engine.layers import ResidentModel
from daskllm.engine.stage import open_runner
from daskllm.models import layer_names
from daskllm.types import ModelSpec
from tests import tiny

CODE = """
import contextlib, json, sys
from distributed import Client, LocalCluster
from daskllm.engine.kernels.cpu.compiled import Kernel

taken, load = set(), Kernel.load

def noted(kernel):
    taken.add(f"{kernel.module}.{kernel.name}")
    found = load(kernel)
    assert not kernel.was_compiled, kernel
    return found

Kernel.load = noted
import daskllm
from daskllm import demo

given = json.loads(sys.argv[1])
with contextlib.ExitStack() as closing:
    if "stages" in given:
        workers = dict(n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0")
        given["client"] = closing.enter_context(Client(closing.enter_context(LocalCluster(**workers))))
    llm = daskllm.load(demo.model_path(), answers=None, **given)
    opened = list(taken)
    llm.generate([[5, 6, 7]], max_tokens=3, ignore_eos=True)
    llm.close()
print(json.dumps([opened, list(taken), "numba" in sys.modules]))
"""

WIDE = {"stack.stack_f32", "rows.norm_f32", "gemm.linear_f32", "panels.fill"}


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        pytest.param({"dtype": "float32"}, WIDE, id="float32"),
        pytest.param({"dtype": "float32", "stages": 2}, WIDE, id="stages", marks=pytest.mark.cluster),
        pytest.param(
            {"dtype": "float32", "quantize": "int8", "kv_dtype": "int8"},
            {"stack_int8_kv8.stack_f32", "rows.norm_f32", "int8.linear_f32", "int8.quantise_f32"},
            id="int8",
        ),
    ],
)
def test_a_second_process_compiles_nothing_imports_no_compiler_and_loads_what_it_runs(
    given: dict[str, Any], needed: set[str]
) -> None:
    whole = {name: value for name, value in given.items() if name != "stages"}
    daskllm.load(demo.model_path(), answers=None, **whole).close()  # where nothing has compiled them yet
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    opened, taken, numba = json.loads(done.stdout)
    assert set(opened) == set(taken) == needed  # none of them in the midst of a step
    assert not numba


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_an_odd_width_has_its_operations_before_its_first_step(
    kv_dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.CONFIGS["llama-gqa"] | {"intermediate_size": 71}
    monkeypatch.setitem(tiny.CONFIGS, "odd-width", config)
    path = tiny.make_model("odd-width", tmp_path / "model", dtype="bfloat16")
    taken: set[Kernel] = set()
    load = Kernel.load

    def noted(kernel: Kernel) -> Any:
        taken.add(kernel)
        return load(kernel)

    monkeypatch.setattr(Kernel, "load", noted)
    model = ResidentModel.open(ModelSpec(path=str(path), device="cpu", kv_dtype=kv_dtype))
    names = layer_names(model.config)
    model.load(names)
    opened = set(taken)
    runner = open_runner(model, names, 1)
    runner.logits(runner.run(Batch.of([Chunk([5, 6, 7], 0, range(1), range(2, 3))])))
    assert taken == opened
    model.close()


PEAK = """
import sys
from pathlib import Path

import daskllm
from daskllm import demo

def size(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

daskllm.load(demo.model_path(), dtype="bfloat16", answers=None).close()  # imports and kernels
Path("/proc/self/clear_refs").write_text("5")  # the most so far is now what there is
before = size("VmRSS")
llm = daskllm.load(sys.argv[1], kv_memory="1 MiB", answers=None)
held = llm.session().model.nbytes()
del held["embed"]  # one tensor in two layers
print(size("VmHWM") - before - sum(held.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_a_large_head_is_not_in_memory_twice_beside_all_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"vocab_size": 65536, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    config = tiny.CONFIGS["llama-gqa"] | wide | {"tie_word_embeddings": True}  # 64 MiB of head, 60 of layers
    monkeypatch.setitem(tiny.CONFIGS, "wide-head", config)
    path = tiny.make_model("wide-head", tmp_path / "model", dtype="bfloat16")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 40 << 20
