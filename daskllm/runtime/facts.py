"""What the files of one version of a model tell of it, read when it is first asked for.

It owns what a handle knows without an open model: description, tokenizer, graph. It refuses to read a weight.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from daskllm.models import DecoderConfig, describe
from daskllm.runtime.loading import files_of
from daskllm.runtime.sizes import graph_of
from daskllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from daskllm.checkpoint import Checkpoint
    from daskllm.graph import LayerGraph
    from daskllm.types import ModelSpec

__all__ = ["Facts"]


class Facts:
    """One version's.

    Args:
        spec: which version.
        config: its description, where that is known; its directory may hold another model later.
    """

    def __init__(self, spec: ModelSpec, config: DecoderConfig | None = None) -> None:
        self.spec = spec
        if config is not None:
            self.config = config

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its files, here or borrowed from workers."""
        return files_of(self.spec)

    @cached_property
    def config(self) -> DecoderConfig:
        """What it is, in numbers."""
        return describe(self.checkpoint.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return Tokenizer.from_directory(self.checkpoint.path)

    @cached_property
    def graph(self) -> LayerGraph:
        """Its layers with their costs, in the type that it is loaded in."""
        return graph_of(self.spec, self.config)
