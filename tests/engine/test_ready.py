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
from tests import tiny

CODE = """
import json, sys
from daskllm.engine.kernels.cpu.team import Kernel

taken, load = {}, Kernel.load

def noted(kernel):
    compiled = load(kernel)
    taken[kernel._function.__name__] = compiled.cache_hits
    return compiled

Kernel.load = noted
import daskllm
from daskllm import demo

llm = daskllm.load(demo.model_path(), answers=None, **json.loads(sys.argv[1]))
opened = dict(taken)
llm.generate([[5, 6, 7]], max_tokens=3, ignore_eos=True)
print(json.dumps([opened, taken]))
"""


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"dtype": "float32"}, {"_stack_f32", "_norm_f32", "_linear_f32"}),
        (
            {"dtype": "float32", "quantize": "int8", "kv_dtype": "int8"},
            {"_stack_f32", "_norm_f32", "_linear_f32", "_quantise_f32"},
        ),
    ],
    ids=["float32", "int8"],
)
def test_a_second_process_compiles_nothing_and_loads_what_it_runs(
    given: dict[str, Any], needed: set[str]
) -> None:
    daskllm.load(demo.model_path(), answers=None, **given).close()  # where nothing has compiled them yet
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    opened, taken = json.loads(done.stdout)
    assert set(opened) == needed
    assert taken == dict.fromkeys(needed, 1)  # each from the cache, and none of them in the midst of a step


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
