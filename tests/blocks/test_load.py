"""Loading layers: what stays a view of the file, what is converted, and that a failure leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daskllm.blocks import array
from daskllm.blocks.load import load_layers
from daskllm.blocks.store import BlockKey, BlockStore
from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.models import DecoderConfig, describe, layer_names
from daskllm.types import ModelError
from tests.tiny import make_model


def _load(
    path: Path, layers: list[str] | None = None, **options: Any
) -> tuple[BlockStore, Checkpoint, DecoderConfig]:
    checkpoint = open_checkpoint(path)
    config = describe(checkpoint.config)
    options = {"store": BlockStore(), "model": "m", "device": "cpu", "dtype": config.dtype} | options
    load_layers(checkpoint, config, layer_names(config) if layers is None else layers, **options)
    return options["store"], checkpoint, config


def _rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    held = load_file(path / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in held.items() if v is not None}, path / "model.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama-gqa", tmp_path_factory.mktemp("llama"), dtype="bfloat16")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def test_blocks_of_the_files_own_type_are_views(llama: Path) -> None:
    store, checkpoint, _ = _load(llama)
    block = store.get(BlockKey("m", 0, "layers.1", "gate.weight"))
    source = checkpoint.tensor("model.layers.1.mlp.gate_proj.weight")
    assert block.ctypes.data == source.data_ptr()
    assert torch.equal(array.to_torch(block, "bfloat16"), source)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types_are_converted(llama: Path, dtype: str) -> None:
    store, checkpoint, _ = _load(llama, dtype=dtype)
    for name, tensor in (("q.weight", "self_attn.q_proj"), ("input_norm.weight", "input_layernorm")):
        block = store.get(BlockKey("m", 0, "layers.0", name))
        source = checkpoint.tensor(f"model.layers.0.{tensor}.weight")
        assert torch.equal(array.to_torch(block, dtype), source.to(array.DTYPES[dtype]))


@pytest.mark.parametrize(("dtype", "given_back"), [("bfloat16", False), ("float32", True)])
def test_the_file_does_not_stay_resident_beside_its_conversion(
    llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, given_back: bool
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(array, "drop_pages", lambda *blocks: dropped.extend(b.nbytes for b in blocks))
    store, checkpoint, _ = _load(llama, dtype=dtype)
    assert len(dropped) == (len(checkpoint.names) if given_back else 0)
    assert sum(dropped) * 2 == (store.nbytes() if given_back else 0)


def test_gpt2_is_transposed_and_split(gpt2: Path) -> None:
    store, checkpoint, _ = _load(gpt2)
    fused = checkpoint.tensor("transformer.h.2.attn.c_attn.weight")
    bias = checkpoint.tensor("transformer.h.2.attn.c_attn.bias")
    for part, name in enumerate("qkv"):
        rows = slice(48 * part, 48 * part + 48)
        weight = array.to_torch(store.get(BlockKey("m", 0, "layers.2", f"{name}.weight")), "float32")
        assert weight.is_contiguous()
        assert torch.equal(weight, fused.t()[rows])
        piece = store.get(BlockKey("m", 0, "layers.2", f"{name}.bias"))
        assert piece.ctypes.data == bias[rows].data_ptr()


def test_layers_and_versions_are_kept_apart(llama: Path) -> None:
    store, _, _ = _load(llama, ["layers.1"])
    assert {key.layer for key in store.keys("m")} == {"layers.1"}
    _load(llama, ["head"], version=7, model="other", store=store)
    assert {(key.version, key.layer) for key in store.keys("other")} == {(7, "head")}
    assert {(key.version, key.layer) for key in store.keys("m")} == {(0, "layers.1")}


def test_blocks_that_are_not_wanted_stay_in_the_file(gpt2: Path) -> None:
    store, *_ = _load(gpt2, ["embed"], without=["tokens.weight"])
    assert [key.name for key in store.keys("m")] == ["positions.weight"]


@pytest.mark.parametrize("order", [[["embed", "head"]], [["embed"], ["head"]], [["head"], ["embed"]]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_is_the_embeddings_array(gpt2: Path, order: list[list[str]], dtype: str) -> None:
    store = BlockStore()
    for layers in order:
        _load(gpt2, layers, dtype=dtype, store=store)
    embedding = store.get(BlockKey("m", 0, "embed", "tokens.weight"))
    assert store.get(BlockKey("m", 0, "head", "lm_head.weight")) is embedding


def test_a_tied_head_in_the_file_must_be_the_embedding(gpt2: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(gpt2, tmp_path / "copy"))
    embedding = load_file(path / "model.safetensors")["transformer.wte.weight"]
    _rewrite(path, lm_head__weight=embedding.clone())
    _load(path)
    _rewrite(path, lm_head__weight=embedding + 1)
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor 'lm_head\.weight' differs"):
        _load(path)


def test_a_wrong_shape_names_file_and_tensor_and_leaves_nothing(copy: Path) -> None:
    _rewrite(copy, model__norm__weight=torch.ones(63, dtype=torch.bfloat16))
    store = BlockStore()
    with pytest.raises(
        ModelError, match=r"model\.safetensors: tensor 'model\.norm\.weight' has shape \(63,\).*\(64,\)"
    ):
        _load(copy, store=store)
    assert store.keys() == []


def test_a_failure_midway_leaves_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that no check foresees, such as memory running out."""
    read, calls = Checkpoint.tensor, []

    def failing(self: Checkpoint, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) > 5:
            raise MemoryError
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", failing)
    store = BlockStore()
    with pytest.raises(MemoryError):
        _load(llama, store=store)
    assert store.keys() == []


def test_a_type_that_is_no_number_for_a_weight(copy: Path) -> None:
    _rewrite(copy, lm_head__weight=torch.ones(288, 64, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"tensor 'lm_head\.weight' is of type int8; only float32"):
        _load(copy)


def test_a_missing_tensor_and_one_too_many(copy: Path) -> None:
    _rewrite(copy, model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    with pytest.raises(
        ModelError, match=r"tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' that its config"
    ):
        _load(copy)
    _rewrite(copy, model__layers__0__self_attn__q_proj__bias=None, lm_head__weight=None)
    with pytest.raises(ModelError, match=r"no tensor 'lm_head\.weight'"):
        _load(copy)


def test_bad_calls(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown layer 'layers\.3'; this model has embed, layers\.0"):
        _load(llama, ["layers.3"])
    with pytest.raises(ValueError, match="not 'int8'"):
        _load(llama, dtype="int8")
