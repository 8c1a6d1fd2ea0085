"""Weights laid out in panels: on torch's threads from memory, or from files while torch is imported.

A panel is `COLUMNS` outputs side by side, a word (four bytes) of inputs of each before the next word: one
step of a product's inner loop reads one stretch of memory.

Laying a model out takes as long as reading and writing its weights, and their memory as long again to come.
Importing torch takes longer than both, and one core. So a thread does it meanwhile (`Filling`), in one call
of compiled code: a thread that comes back to the interpreter waits some milliseconds for it each time.
Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from daskllm.blocks import regions
from daskllm.engine.kernels.cpu.compiled import Kernel, Loaded
from daskllm.engine.kernels.cpu.fields import (
    FILL_BUFFER,
    FILL_DONE,
    FILL_FIELDS,
    FILL_READ,
    FILL_STOP,
    FILL_TABLE,
    NOWHERE,
)
from daskllm.engine.kernels.cpu.registers import COLUMNS

__all__ = ["FILL", "Filling", "Stored", "panels_of", "strips_of"]

FILL = Kernel("panels", "fill")

_STRIP = 4
"""Panels of a strip, which one thread lays out: small weights, too, are work for several."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight ``[outputs, inputs]`` in a file.

    Attributes:
        file: a descriptor; `NOWHERE` where only memory is sent for, and others lay the weight out.
        offset: of its first byte.
        outputs: its rows.
        words: inputs of each, in fours of bytes.
    """

    file: int
    offset: int
    outputs: int
    words: int

    @property
    def nbytes(self) -> int:
        """Of its panels."""
        return panels_of(self.outputs) * COLUMNS * self.words * 4


def panels_of(outputs: int) -> int:
    """Panels that a weight takes.

    >>> panels_of(COLUMNS + 1)
    2
    """
    return -(-outputs // COLUMNS)


def strips_of(file: int, place: int, outputs: int, words: int, to: int) -> list[tuple[int, ...]]:
    """The strips of one weight, for `FILL`: its file and where it begins there, sizes, and where it goes."""
    step = _STRIP * COLUMNS
    return [
        (file, place + first * words * 4, min(step, outputs - first), words, to + first * words * 4)
        for first in range(0, outputs, step)
    ]


class Filling:
    """Panels that a thread lays out from files, one product's after the other, until they are asked for.

    Args:
        products: in order, each product's weights by a name of it.
        code: `FILL`, loaded.

    Raises:
        OSError: there is no such memory.
        RuntimeError: there is no thread.
    """

    def __init__(self, products: Mapping[Hashable, Sequence[Stored]], code: Loaded) -> None:
        weights = [weight for product in products.values() for weight in product]
        memory = regions.own(sum(weight.nbytes for weight in weights))
        begin = np.frombuffer(memory, np.uint8).ctypes.data
        strips: list[tuple[int, ...]] = []
        # Each product's memory, and how many strips are done when it is; none of one that is not laid out.
        self._products: dict[Hashable, tuple[memoryview, int | None]] = {}
        place = 0
        for name, product in products.items():
            first = place
            for w in product:
                strips += strips_of(w.file, w.offset, w.outputs, w.words, begin + place)
                place += w.nbytes
            whole = all(w.file != NOWHERE for w in product)
            self._products[name] = memory[first:place], len(strips) if whole else None
        self._table = np.array(strips, np.int64)
        self._buffer = np.empty(COLUMNS * max(w.words for w in weights), np.int32)
        self._arguments = np.zeros(FILL_FIELDS, np.int64)
        self._arguments[1] = len(strips)
        self._arguments[FILL_TABLE] = self._table.ctypes.data
        self._arguments[FILL_READ] = ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value or 0
        self._arguments[FILL_BUFFER] = self._buffer.ctypes.data
        # Nothing of it may go before the thread does: it is given this object itself.
        self._thread = threading.Thread(target=self._fill, args=(code,), name="daskllm-panels", daemon=True)
        self._thread.start()

    def _fill(self, code: Loaded) -> None:
        code.call(self._arguments.ctypes.data)

    def take(self, name: Hashable) -> tuple[memoryview, bool] | None:
        """A product's memory, to keep, and whether its panels are there by now; if not, the thread ends."""
        memory, strips = self._products.pop(name, (None, None))
        if memory is None:
            return None
        if strips is None or self._arguments[FILL_DONE] < strips:
            self.stop()
        return memory, strips is not None and bool(self._arguments[FILL_DONE] >= strips)

    def stop(self) -> None:
        """Have the thread end, after the strip that it is at."""
        self._arguments[FILL_STOP] = 1
        self._thread.join()
