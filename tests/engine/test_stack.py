"""A model's layers in one call against the same layers one operation at a time: equal to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from daskllm.engine.batch import Batch, Chunk
from daskllm.engine.kernels.composed import Composed
from daskllm.engine.kernels.cpu import operations as cpu
from daskllm.engine.kernels.cpu.stack import Stack, StackInt8, StackInt8KV8, StackKV8
from daskllm.engine.kernels.int8 import halves
from daskllm.engine.kvcache import KVCache
from daskllm.engine.layers import ResidentModel
from daskllm.engine.sizes import BLOCK_SIZE
from daskllm.models import layer_names
from daskllm.types import ModelSpec
from tests import tiny

CHUNKS = (
    Chunk(list(range(150)), 0, [3, 9, 1, 4, 0]),
    Chunk([5], 40, [7, 2]),
    Chunk([6, 7, 8], 30, [5, 6, 8]),
)


def opened(path: Path, dtype: str, **options: Any) -> ResidentModel:
    return ResidentModel.open(ModelSpec(path=str(path), dtype=dtype, device="cpu", **options))


def cache(model: ResidentModel, layers: Sequence[object]) -> KVCache:
    """Ten blocks for each layer, with something in them."""
    config = model.config
    made = KVCache(10, len(layers), config.num_kv_heads, config.head_dim, model.kv_torch_dtype, "cpu")
    torch.manual_seed(1)
    for tensors, rows in ((made.keys, config.head_dim), (made.values, BLOCK_SIZE)):
        for tensor in tensors:
            if tensor.dtype == torch.int8:
                numbers, scales = halves(tensor, rows)
                numbers.random_(1, 127)
                scales.uniform_(0.001, 0.03)
            else:
                tensor.copy_(torch.randn(tensor.shape))
    return made


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("threads", [1, 2])
def test_one_call_is_the_operations_in_turn(
    name: str, dtype: str, quantize: str | None, kv_dtype: str, threads: int, tmp_path: Path
) -> None:
    if kv_dtype == "int8" and (name == "llama-tied-odd" or threads == 1):
        return  # heads of 22; and one way of sharing the work out is as good as the other
    model = opened(tiny.make_model(name, tmp_path), dtype, quantize=quantize, kv_dtype=kv_dtype)
    layers = [model.layer(one) for one in layer_names(model.config) if one.startswith("layers.")]
    found = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for kind in (Composed, Stack):
            held = cache(model, layers)
            both = (layers, held.keys, held.values, model.config)
            run = Composed(cpu, *both) if kind is Composed else cpu.stack(*both)
            results = []
            for chunks in (CHUNKS, CHUNKS[1:]):  # the second finds the room that the first made
                batch = Batch.of(chunks)
                torch.manual_seed(2)
                hidden = torch.randn(len(batch.tokens), model.config.hidden_size).to(model.torch_dtype)
                delta = run(hidden, batch, model.angles.upto(200))
                results += [hidden, delta.clone()]
            found.append([*results, *held.keys, *held.values])
    finally:
        torch.set_num_threads(before)
        model.close()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, Stack),
        ({"quantize": "int8"}, StackInt8),
        ({"kv_dtype": "int8"}, StackKV8),
        ({"quantize": "int8", "kv_dtype": "int8"}, StackInt8KV8),
    ],
)
def test_seconds_are_told_by_phase(options: dict[str, str], kind: type[Stack], tmp_path: Path) -> None:
    model = opened(tiny.make_model("llama-gqa", tmp_path), "bfloat16", **options)
    layers = [model.layer("layers.0"), model.layer("layers.1")]
    held = cache(model, layers)
    run = cpu.stack(layers, held.keys, held.values, model.config)
    assert type(run) is kind
    run(torch.zeros(154, 64, dtype=torch.bfloat16), Batch.of(CHUNKS), model.angles.upto(200))
    assert len(run.seconds) == len(kind.phases)
    assert (run.seconds > 0).all()
    model.close()


def test_an_odd_width_goes_one_operation_at_a_time() -> None:
    sizes = {"num_heads": 1, "head_dim": 44, "intermediate_size": 70}
    keys = [torch.zeros(1, dtype=torch.bfloat16)]
    layers = [SimpleNamespace(qkv=cpu.pack([torch.zeros(45, 45, dtype=torch.bfloat16)], None))]
    run = cpu.stack(layers, keys, keys, SimpleNamespace(hidden_size=45, **sizes))
    assert isinstance(run, Composed)
