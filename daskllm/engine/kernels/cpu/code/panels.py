"""Weights laid out in panels, from memory or from a file; see `daskllm.engine.kernels.cpu.panels`."""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from daskllm.engine.kernels.cpu.code.memory import array, workspace
from daskllm.engine.kernels.cpu.code.simd import compiled
from daskllm.engine.kernels.cpu.code.team import peek, take
from daskllm.engine.kernels.cpu.fields import (
    FILL_BUFFER,
    FILL_DONE,
    FILL_FIELDS,
    FILL_READ,
    FILL_STOP,
    FILL_TABLE,
    FROM,
    IN_MEMORY,
    NOWHERE,
    OUTPUTS,
    STRIP_FIELDS,
    TO,
    WHICH_FILE,
    WORDS,
)
from daskllm.engine.kernels.cpu.registers import COLUMNS

__all__ = ["fill"]

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_RUN = 16
"""Words of an output taken at a time: a cache line, which those of other outputs could push out later."""


@intrinsic
def _pread(typingctx, function, file, to, count, offset):  # type: ignore[no-untyped-def]
    """The C library's ``pread(file, to, count, offset)``."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_I64, [_I32, cgutils.voidptr_t, _I64, _I64])
        pread = builder.inttoptr(args[0], kind.as_pointer())
        given = builder.trunc(args[1], _I32), builder.inttoptr(args[2], cgutils.voidptr_t), *args[3:]
        return builder.call(pread, given)

    return types.int64(*[types.int64] * 5), codegen


@compiled
def _panel(source, outputs, words, to, at, lines):  # type: ignore[no-untyped-def]
    """Lay ``source [outputs, words]`` into ``to[at:]`` as ``[words, COLUMNS]``, zeros for missing outputs."""
    lines[outputs * _RUN : COLUMNS * _RUN] = 0
    for first in range(0, words, _RUN):
        count = min(_RUN, words - first)
        for output in range(outputs):
            for word in range(count):
                lines[output * _RUN + word] = source[output * words + first + word]
        for word in range(count):
            for output in range(COLUMNS):
                to[at + (first + word) * COLUMNS + output] = lines[output * _RUN + word]


def fill(pointer):  # type: ignore[no-untyped-def]
    a = numba.carray(pointer, (FILL_FIELDS,), np.int64)
    table = array(a[FILL_TABLE], a[1] * STRIP_FIELDS, np.int64)
    lines = workspace(COLUMNS * _RUN, np.int32)
    while True:
        strip = take(a, 0)
        if strip >= a[1] or peek(a, FILL_STOP) != 0:
            return
        fields = table[strip * STRIP_FIELDS : (strip + 1) * STRIP_FIELDS]
        file, outputs, words = fields[WHICH_FILE], fields[OUTPUTS], fields[WORDS]
        to = array(fields[TO], -(-outputs // COLUMNS) * COLUMNS * words, np.int32)
        if file == NOWHERE:
            to[:] = 0
            outputs = 0
        for first in range(0, outputs, COLUMNS):
            count = min(COLUMNS, outputs - first)
            place, size = fields[FROM] + first * words * 4, count * words * 4
            if file != IN_MEMORY:
                # Less than all of it is for whoever reads it by other means, and says what is wrong.
                if _pread(a[FILL_READ], file, a[FILL_BUFFER], size, place) != size:
                    return
                place = a[FILL_BUFFER]
            _panel(array(place, count * words, np.int32), count, words, to, first * words, lines)
        take(a, FILL_DONE)
