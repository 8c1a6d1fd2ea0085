"""The layers of a specified model with their costs, as it is opened and not as its files are.

It owns which of a specification's settings change what a layer costs. It refuses to know what is done with
the costs (`placing`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from daskllm.graph import LayerGraph

if TYPE_CHECKING:
    from daskllm.models import DecoderConfig
    from daskllm.types import ModelSpec

__all__ = ["dtype_of", "graph_of"]


def dtype_of(spec: ModelSpec, config: DecoderConfig) -> str:
    """The type asked for, the checkpoint's own for "auto"."""
    return config.dtype if spec.dtype == "auto" else spec.dtype


def graph_of(spec: ModelSpec, config: DecoderConfig) -> LayerGraph:
    """The model's graph of layers, with the bytes of its types."""
    return LayerGraph.of(config, dtype_of(spec, config), quantize=spec.quantize, kv_dtype=spec.kv_dtype)
