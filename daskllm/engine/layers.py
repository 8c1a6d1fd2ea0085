"""A model's layers as the kernels read them, made from blocks one layer at a time.

`ResidentModel` is one model in one process: which layers are held, on which device and in which type. It
knows blocks and kernels; it refuses to know how layers are run and who asks.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from daskllm.blocks import array
from daskllm.blocks.load import load_layers, release_packed
from daskllm.blocks.store import STORE, BlockKey
from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.engine import kernels
from daskllm.engine.ahead import Ahead, products
from daskllm.engine.angles import Angles
from daskllm.engine.batch import Batch
from daskllm.models import DecoderConfig, describe, layer_names
from daskllm.types import ModelSpec

__all__ = [
    "DecoderLayer",
    "Embedding",
    "Head",
    "Layer",
    "Norm",
    "ResidentModel",
    "compute_dtype",
    "pick_device",
]


@dataclass(frozen=True, slots=True)
class Norm:
    """Weight and bias ``[hidden]`` of a norm."""

    weight: torch.Tensor
    bias: torch.Tensor | None


_LOOKUPS = 128
"""Token rows read from a mapped file before its pages are given back: each can map 64 KiB, 8 MiB in all (and
ten times that where the system keeps files in large pages)."""


class _Rows(Protocol):
    """A packed matrix that gives rows back."""

    def rows(self, outputs: torch.Tensor) -> torch.Tensor: ...


class Embedding:
    """Token rows ``[vocab, hidden]``, and position rows where positions are learnt.

    Those of a packed head that is tied to them are read there. Token rows that are a view of the model's file
    are read where they lie. Their pages are given back every so often, or a long table would come to hold all
    of a large vocabulary for the few rows that a step reads.
    """

    def __init__(self, tokens: torch.Tensor | _Rows, positions: torch.Tensor | None) -> None:
        self.tokens, self.positions = tokens, positions
        self._pages: array.Pages | None = None
        if isinstance(tokens, torch.Tensor):
            self._pages = array.pages(array.from_torch(tokens))[0]
        self._lookups = 0

    def rows(self, batch: Batch) -> torch.Tensor:
        """The residual stream ``[rows, hidden]`` of a batch before the first layer."""
        if not isinstance(self.tokens, torch.Tensor):
            hidden = self.tokens.rows(batch.tokens)
        elif self._pages is None:
            hidden = F.embedding(batch.tokens, self.tokens)
        else:
            hidden = torch.cat([self._mapped(self.tokens, p) for p in batch.tokens.split(_LOOKUPS)])
        if self.positions is not None:
            hidden += F.embedding(batch.positions, self.positions)
        return hidden

    def _mapped(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        assert self._pages is not None
        rows = F.embedding(tokens, table)
        self._lookups += len(tokens)
        if self._lookups >= _LOOKUPS:
            self._pages.drop()
            self._lookups = 0
        return rows


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer; q, k, v are one product, and so are gate and up."""

    input_norm: Norm
    qkv: Any
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: Any
    post_norm: Norm
    gate_up: Any
    down: Any
    window: int | None


@dataclass(frozen=True, slots=True)
class Head:
    """The last norm and the product with the vocabulary."""

    norm: Norm
    lm_head: Any


Layer = Embedding | DecoderLayer | Head

_numbers = itertools.count()


class ResidentModel:
    """One model's layers in this process, each loaded and packed when it is first asked for.

    Where kernels pack a copy, a layer's blocks are let go as soon as it is packed, so that no more than one
    layer is ever in memory twice.

    Attributes:
        config: the whole model's description.
        checkpoint: its files.
        version: of its weights.
        device: "cpu" or "cuda".
        dtype: what weights are kept and multiplied in.
        quantize: "int8" where products are of weights and inputs in eight bits, else None.
        kv_dtype: what keys and values are kept in: "int8", else as `dtype`.
        kernels: the operations for both.
        angles: of its rotary positions.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        device: str,
        dtype: str,
        version: int = 0,
        quantize: str | None = None,
        kv_dtype: str = "auto",
        ahead: Ahead | None = None,
    ) -> None:
        self.checkpoint, self.config, self.device, self.dtype = checkpoint, config, device, dtype
        self.version, self.quantize = version, quantize
        self.kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
        self.kernels = kernels.select(device, array.DTYPES[dtype])
        self.angles = Angles(config, device)
        # The same files may be open twice, with other settings: each has blocks of its own.
        self._model = f"{checkpoint.identity}/{dtype}/{device}/{next(_numbers)}"
        self._ahead = ahead
        self._layers: dict[str, Layer] = {}
        self._sizes: dict[str, int] = {}
        self._copied: list[str] = []  # blocks of the layer in preparation that packing has copied
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, spec: ModelSpec, checkpoint: Checkpoint | None = None, ahead: Ahead | None = None
    ) -> ResidentModel:
        """Open a model's files; no layer is loaded yet.

        Args:
            checkpoint: the files, where they are open already.
            ahead: what is laid out of them already; `load` and `close` end it.

        Raises:
            ModelError: the directory cannot be read or describes no known model.
            ValueError: the device asked for is not there, or it or the model cannot do what is asked.
        """
        checkpoint = checkpoint or open_checkpoint(spec.path, spec.revision)
        config = describe(checkpoint.config)
        device = pick_device(spec.device)
        if device != "cpu" and spec.quantize is not None:
            raise ValueError(f'quantize="{spec.quantize}" is for CPUs in this version: add device="cpu"')
        if spec.kv_dtype != "auto":
            _check_kv_dtype(spec.kv_dtype, config, device)
        dtype = compute_dtype(config.dtype if spec.dtype == "auto" else spec.dtype, device)
        return cls(checkpoint, config, device, dtype, spec.version, spec.quantize, spec.kv_dtype, ahead)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return array.DTYPES[self.dtype]

    @property
    def kv_torch_dtype(self) -> torch.dtype:
        """`kv_dtype` as torch has it."""
        return torch.int8 if self.kv_dtype == "int8" else array.DTYPES[self.kv_dtype]

    def load(self, layers: Sequence[str]) -> None:
        """Some layers, or all, and the operations that their steps run, ready to run.

        Args:
            layers: their names, in the order in which a token passes them.

        Raises:
            ModelError: a tensor is missing, cut short or of another shape. Nothing of the model stays.
        """
        self.kernels.load(self.torch_dtype, self.quantize is not None, self.kv_torch_dtype, self.config)
        # The head first: while it is copied, what may be the largest matrix is in memory twice, and an
        # embedding that is tied to it then needs no memory of its own.
        try:
            with array.files_stay():
                for name in reversed(layers):
                    self.layer(name)
        finally:
            self._end_ahead()

    def layer(self, name: str) -> Layer:
        """One layer, ready to run; `daskllm.models.layer_names` has their names.

        Raises:
            ModelError: a tensor is missing, cut short or of another shape. Nothing of the model stays.
        """
        with self._lock:
            if name not in self._layers:
                try:
                    self._layers[name] = self._prepare(name)
                except BaseException:
                    self._layers.clear()
                    STORE.drop(self._model)
                    raise
            return self._layers[name]

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the layers that are loaded."""
        return tuple(name for name in layer_names(self.config) if name in self._layers)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the weights of each layer that is held; rows that a tied head gives count there."""
        return {name: self._sizes[name] for name in self.held}

    def close(self) -> None:
        """Let all layers and files go."""
        self.checkpoint.close()  # first, so that whoever waits for files under the lock gives up
        self._end_ahead()
        with self._lock:
            self._layers.clear()
            STORE.drop(self._model)

    def _end_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def block(self, layer: str, name: str) -> torch.Tensor:
        """One block as it is, for whoever runs a part of a layer; loaded where that is needed."""
        with self._lock:
            key = BlockKey(self._model, self.version, layer, name)
            if STORE.find(key) is None:
                self._load(layer)
            return array.to_torch(STORE.get(key), self.dtype)

    def _load(self, name: str, without: Collection[str] = ()) -> None:
        load_layers(
            self.checkpoint,
            self.config,
            [name],
            model=self._model,
            version=self.version,
            device=self.device,
            dtype=self.dtype,
            without=without,
        )

    def _prepare(self, name: str) -> Layer:
        # A table that is read in the head would be converted, where that is needed, for nobody.
        tied = name == "embed" and self._tied() is not None
        self._load(name, ("tokens.weight",) if tied else ())
        self._copied = []
        # Packing lets blocks go; what it makes of them is of their size, unless `_linear` says otherwise.
        self._sizes[name] = STORE.nbytes(self._model, name)
        layer = self._assemble(name)
        if (self.kernels.PACKS or self.quantize) and self._copied:
            release_packed(self._model, name, version=self.version, names=self._copied)
        return layer

    def _assemble(self, name: str) -> Layer:
        if name == "embed":
            tokens = self._tied() or self._block(name, "tokens.weight")
            return Embedding(tokens, self._optional(name, "positions.weight"))
        if name == "head":
            return Head(self._norm(name, "norm"), self._linear(name, "lm_head"))
        q_norm, k_norm = (self._optional(name, f"{part}_norm.weight") for part in "qk")
        qkv, o, mlp, down = (self._linear(name, *names) for names in products(self.config, name))
        return DecoderLayer(
            input_norm=self._norm(name, "input_norm"),
            qkv=qkv,
            qk_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
            o=o,
            post_norm=self._norm(name, "post_norm"),
            gate_up=mlp,
            down=down,
            window=self.config.windows[int(name.split(".")[1])],
        )

    def _tied(self) -> _Rows | None:
        """A tied head's rows where it has been packed by now, and keeps them."""
        head = self._layers.get("head")
        if self.config.tied and isinstance(head, Head) and hasattr(head.lm_head, "rows"):
            tied: _Rows = head.lm_head
            return tied
        return None

    def _block(self, layer: str, name: str) -> torch.Tensor:
        return array.to_torch(STORE.get(BlockKey(self._model, self.version, layer, name)), self.dtype)

    def _optional(self, layer: str, name: str) -> torch.Tensor | None:
        block = STORE.find(BlockKey(self._model, self.version, layer, name))
        return None if block is None else array.to_torch(block, self.dtype)

    def _norm(self, layer: str, name: str) -> Norm:
        return Norm(self._block(layer, f"{name}.weight"), self._optional(layer, f"{name}.bias"))

    def _linear(self, layer: str, *names: str) -> Any:
        weights = [self._block(layer, f"{name}.weight") for name in names]
        biases = [b for name in names if (b := self._optional(layer, f"{name}.bias")) is not None]
        laid = None if self._ahead is None else self._ahead.take(layer, names)
        # A head's pages may have been read where nobody packs it: to see that it is the embedding.
        if laid is None or not laid[1] or layer == "head":
            self._copied += [f"{name}.weight" for name in names]
        if self.quantize is None:
            return self.kernels.pack(weights, biases or None, laid)
        packed = self.kernels.pack_int8(weights, biases or None)
        self._sizes[layer] += packed.nbytes - sum(block.nbytes for block in (*weights, *biases))
        return packed


def pick_device(device: str) -> str:
    """Where this process computes: "cpu" or "cuda"; ValueError where it has no GPU and one is asked for."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda" but torch sees no GPU; use device="cpu" or "auto"')
    return device


def _check_kv_dtype(kv_dtype: str, config: DecoderConfig, device: str) -> None:
    """Refuse keys and values in eight bits where there are none (ValueError)."""
    if device != "cpu":
        raise ValueError(f'kv_dtype="{kv_dtype}" is for CPUs in this version: add device="cpu"')
    if config.head_dim % 4:
        raise ValueError(
            f'kv_dtype="{kv_dtype}" takes heads by fours of numbers, and this model has head_dim='
            f'{config.head_dim}: leave kv_dtype="auto"'
        )


def compute_dtype(wanted: str, device: str) -> str:
    """The type that weights of another type are kept and multiplied in.

    Kernels for CPUs have no float16: such weights are widened to float32, which changes none of them.
    Bfloat16 stays as it is, also where a CPU cannot multiply it: it is widened in registers.
    """
    return "float32" if device == "cpu" and wanted == "float16" else wanted
