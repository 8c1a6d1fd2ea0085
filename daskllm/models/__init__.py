"""One small file per family: a config.json and tensor names in, a description of the decoder out.

`describe` and `sources` find the family by ``model_type``; above this room no family's name is known. To add
one, write its file (``FIELDS``, ``describe``, ``sources``) and list it here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from daskllm.models import gpt2, llama, mistral, qwen2, qwen3
from daskllm.models.description import BlockSources, DecoderConfig, Rope, TensorSource, layer_names
from daskllm.models.fields import Fields
from daskllm.types import ModelError

__all__ = [
    "FAMILIES",
    "BlockSources",
    "DecoderConfig",
    "Rope",
    "TensorSource",
    "describe",
    "end_tokens",
    "layer_names",
    "sources",
]

FAMILIES: Mapping[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def describe(config: Mapping[str, Any]) -> DecoderConfig:
    """What decoder a ``config.json`` describes.

    Raises:
        ModelError: an unknown architecture, a needed field that is missing, or a field whose value would
            change the logits in a way that is not built; the message names the field.

    Example:
        >>> describe({"model_type": "mamba"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        daskllm.types.ModelError: config.json: model_type 'mamba' is not supported; known: gpt2, ...
    """
    kind = config.get("model_type")
    if kind is None:
        raise ModelError("config.json has no model_type")
    if kind not in FAMILIES:
        remote = " by its own remote code (auto_map), which is never run" if "auto_map" in config else ""
        raise ModelError(
            f"config.json: model_type {kind!r} is not supported{remote}; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    description: DecoderConfig = family.describe(Fields(config, family.FIELDS))
    return description


def sources(config: DecoderConfig, names: Collection[str]) -> BlockSources:
    """Where each block of each layer comes from in a checkpoint.

    Args:
        names: all tensors of the checkpoint, with the family's prefix ("model.", "transformer.") or without.

    Raises:
        ModelError: a needed tensor is missing, or one is there that the config has no place for.
    """
    found: BlockSources = FAMILIES[config.family].sources(config, names)
    return found


def end_tokens(generation_config: Mapping[str, Any], config: DecoderConfig) -> tuple[int, ...]:
    """The ids that end a text: those of a ``generation_config.json``, else those of the description."""
    found = generation_config.get("eos_token_id")
    if found is None:
        return config.eos_token_ids
    return tuple(found) if isinstance(found, list) else (int(found),)
