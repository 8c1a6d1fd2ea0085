"""From a checkpoint's tensors to blocks in the store, a layer at a time.

It knows shapes, types and layouts. It refuses to know families (``models`` says where a block comes from) and
file formats (``checkpoint`` reads them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from daskllm.blocks import array
from daskllm.blocks.store import STORE, BlockKey, BlockStore
from daskllm.checkpoint import Checkpoint
from daskllm.models import BlockSources, DecoderConfig, TensorSource, layer_names, sources
from daskllm.types import ModelError

__all__ = ["load_layers", "release_packed"]


def load_layers(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    layers: Iterable[str],
    *,
    model: str,
    version: int = 0,
    device: str,
    dtype: str,
    without: Collection[str] = (),
    store: BlockStore = STORE,
) -> None:
    """Put some of a model's layers into a store, all of them or none.

    A block whose type and layout are the file's stays a view of the mapped file. The others are converted
    one at a time, so that no more than one tensor is in memory twice. A tied head shares the embedding's
    array when both are loaded here or the embedding is in the store already.

    Args:
        layers: names as `layer_names` gives them.
        model, version: what the blocks are kept under.
        device: "cpu" or "cuda".
        dtype: the blocks' type, "float32", "bfloat16" or "float16".
        without: names of blocks of these layers that are not wanted.

    Raises:
        ModelError: a tensor is missing or has another shape or type than the config calls for; the message
            names file and tensor.
        ValueError: an unknown layer or dtype.
    """
    wanted = list(layers)
    unknown = sorted(set(wanted) - set(layer_names(config)))
    if unknown:
        raise ValueError(f"unknown layer {unknown[0]!r}; this model has {', '.join(layer_names(config))}")
    if dtype not in array.DTYPES:
        raise ValueError(f"dtype must be {', '.join(array.DTYPES)}, not {dtype!r}")
    found = sources(config, checkpoint.names)
    _check(checkpoint, found, wanted)
    if "head" in wanted:
        _check_tied(checkpoint, config, found)
    made = _held_twin(config, found, model, version, store, device, dtype)
    blocks = {layer: {n: s for n, s in found[layer].items() if n not in without} for layer in wanted}
    checkpoint.fetch({s.name for layer in wanted for s in blocks[layer].values() if s not in made})
    ready: dict[BlockKey, array.Block] = {}
    for layer in wanted:
        for name, block in _layer(checkpoint, blocks[layer], made, device, dtype).items():
            ready[BlockKey(model, version, layer, name)] = block
    store.put_all(ready)


def _layer(
    checkpoint: Checkpoint,
    blocks: Mapping[str, TensorSource],
    made: dict[TensorSource, array.Block],
    device: str,
    dtype: str,
) -> dict[str, array.Block]:
    """One layer's blocks by name; ``made`` holds what is done already and grows."""
    copied = []
    for source in set(blocks.values()) - set(made):
        tensor = checkpoint.tensor(source.name)
        shaped = _shaped(tensor, source, dtype)
        made[source] = array.to_device(array.from_torch(shaped), device)
        is_view = shaped.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if not is_view or device != "cpu":
            copied.append(array.from_torch(tensor))
    array.drop_pages(*copied)  # else the file would stay resident beside its conversion
    return {name: made[source] for name, source in blocks.items()}


def release_packed(
    model: str, layer: str, *, version: int = 0, store: BlockStore = STORE, names: Collection[str]
) -> None:
    """Let go of the memory of blocks that a kernel has copied into its own form.

    Views of the file stay in the store and give their pages back, since they can be read again at any time;
    blocks in ordinary memory would be a second copy of the weights and leave the store.

    Args:
        names: the blocks of the layer that were copied.
    """
    keys = [BlockKey(model, version, layer, name) for name in names]
    for key, dropped in zip(keys, array.drop_pages(*map(store.get, keys)), strict=True):
        if dropped is None:
            store.drop_block(key)


def _held_twin(
    config: DecoderConfig,
    found: BlockSources,
    model: str,
    version: int,
    store: BlockStore,
    device: str,
    dtype: str,
) -> dict[TensorSource, array.Block]:
    """The embedding of a tied model when either of its two names is in the store already."""
    if config.tied:
        held = store.keys(model)
        for layer, name in (("embed", "tokens.weight"), ("head", "lm_head.weight")):
            key = BlockKey(model, version, layer, name)
            block = store.get(key) if key in held else None
            if block is not None and array.holds(block, dtype) and array.is_on(block, device):
                return {found[layer][name]: block}
    return {}


def _check(checkpoint: Checkpoint, found: BlockSources, wanted: list[str]) -> None:
    for layer in wanted:
        for source in found[layer].values():
            shape, dtype = checkpoint.shape(source.name), checkpoint.dtype(source.name)
            where = f"{checkpoint.file(source.name)}: tensor {source.name!r}"
            if shape != source.shape:
                raise ModelError(f"{where} has shape {shape}, but config.json makes it {source.shape}")
            if dtype not in array.DTYPES:
                raise ModelError(f"{where} is of type {dtype}; only {', '.join(array.DTYPES)} are read")


def _check_tied(checkpoint: Checkpoint, config: DecoderConfig, found: BlockSources) -> None:
    """A head that is in the file although it is tied must be the embedding, or one of them would be lost."""
    embedding = found["embed"]["tokens.weight"].name
    if not config.tied or "lm_head.weight" not in checkpoint.names or embedding == "lm_head.weight":
        return
    if not torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor(embedding)):
        raise ModelError(
            f"{checkpoint.file('lm_head.weight')}: tensor 'lm_head.weight' differs from {embedding!r}, but "
            "config.json has tie_word_embeddings=true; set it to false if the head is meant"
        )


def _shaped(tensor: torch.Tensor, source: TensorSource, dtype: str) -> torch.Tensor:
    """The block's part of a tensor in the block's layout and type; a view where that is possible."""
    if source.transpose:
        tensor = tensor.t()
    if source.rows is not None:
        tensor = tensor[slice(*source.rows)]
    return tensor.to(array.DTYPES[dtype]).contiguous()
