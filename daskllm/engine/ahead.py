"""Products laid out while torch is being imported, which takes a second, on one core.

It knows which of a model's weights are one product, and where they are in its files. Nothing here needs
torch; `ResidentModel` takes what is there when it comes to it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from daskllm import machine
from daskllm.models import DecoderConfig, TensorSource, describe, layer_names, sources

if TYPE_CHECKING:
    from daskllm.checkpoint import Checkpoint
    from daskllm.engine.kernels.cpu.panels import Filling, Stored
    from daskllm.types import ModelSpec

__all__ = ["Ahead", "products"]

_ITEMSIZES = {"float32": 4, "bfloat16": 2}


def products(config: DecoderConfig, layer: str) -> tuple[tuple[str, ...], ...]:
    """The weights of a layer that are multiplied as one, in the order in which they are packed."""
    if layer == "embed":
        return ()
    if layer == "head":
        return (("lm_head",),)
    return (("q", "k", "v"), ("o",), (("gate", "up") if config.gated else ("up",)), ("down",))


class Ahead:
    """A model's products, laid out by a thread until the first is wanted that is not there yet.

    Args:
        spec, checkpoint: the model and its files. Nothing is done for one whose weights are not packed as
            they are in the files, or that a GPU takes, or for which there is no memory; nor where the code
            for it would have to be compiled.

    Raises:
        ModelError: the files describe no known model, or lack a tensor.
    """

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, int | None] = {}
        self._filling: Filling | None = None
        self._lock = threading.Lock()
        config = describe(checkpoint.config)
        dtype = config.dtype if spec.dtype == "auto" else spec.dtype
        on_cpu = spec.device == "cpu" or (spec.device == "auto" and find_spec("cupy") is None)
        if on_cpu and spec.quantize is None and dtype in _ITEMSIZES:
            self._begin(config, dtype)

    def _begin(self, config: DecoderConfig, dtype: str) -> None:
        found = sources(config, self._checkpoint.names)
        # The head first, as `ResidentModel.load` does it.
        named = {
            (layer, names): [found[layer][f"{name}.weight"] for name in names]
            for layer in reversed(layer_names(config))
            for names in products(config, layer)
        }
        weights = [weight for product in named.values() for weight in product]
        held = self._checkpoint
        if any(held.dtype(w.name) != dtype or held.shape(w.name) != w.shape for w in weights):
            return
        # Here, since LLVM is not loaded where it is not used.
        from daskllm.engine.kernels.cpu.panels import FILL, Filling
        from daskllm.engine.kernels.cpu.registers import DENIED

        code = None if DENIED else FILL.find()
        if code is None:
            return
        try:
            stored: dict[Hashable, list[Stored]] = {
                n: [self._stored(w, _ITEMSIZES[dtype]) for w in product] for n, product in named.items()
            }
            if sum(w.nbytes for product in stored.values() for w in product) < machine.available_memory():
                with suppress(OSError, RuntimeError):  # no such memory, no thread
                    self._filling = Filling(stored, code)
        finally:
            if self._filling is None:
                self.close()

    def _stored(self, weight: TensorSource, itemsize: int) -> Stored:
        from daskllm.engine.kernels.cpu.fields import NOWHERE
        from daskllm.engine.kernels.cpu.panels import Stored

        outputs, inputs = weight.block_shape
        words = -(-inputs * itemsize // 4)
        file = None
        if inputs * itemsize % 4 == 0 and not weight.transpose:
            path = str(self._checkpoint.file(weight.name))
            if path not in self._files:
                self._files[path] = self._checkpoint.descriptor(weight.name)
            file = self._files[path]
        if file is None:
            return Stored(NOWHERE, 0, outputs, words)
        _, start, _ = self._checkpoint.span(weight.name)
        first = 0 if weight.rows is None else weight.rows[0]
        return Stored(file, start + first * inputs * itemsize, outputs, words)

    def take(self, layer: str, names: tuple[str, ...]) -> tuple[memoryview, bool] | None:
        """Memory for a product's panels, to keep, and whether they are there; None where nothing is known."""
        with self._lock:
            return None if self._filling is None else self._filling.take((layer, names))

    def close(self) -> None:
        """Have the thread end and let go of what was not taken."""
        with self._lock:
            if self._filling is not None:
                self._filling.stop()
            self._filling = None
            while self._files:
                _, file = self._files.popitem()
                if file is not None:
                    os.close(file)
