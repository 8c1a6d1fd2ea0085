"""What this CPU's registers hold, and so the shapes in which weights and rows are multiplied.

Packed weights, buffers and compiled code must agree on these. Matrix registers (Intel AMX) hold sixteen rows
of 64 bytes each. Where there are none, a tile of a product is kept in vectors: 512 bits wide and 32 of them
with AVX-512, fewer and narrower elsewhere.
"""

from __future__ import annotations

import ctypes
import platform
import sys

import llvmlite.binding

__all__ = [
    "AMX",
    "BFLOAT16",
    "COLUMNS",
    "DENIED",
    "INT8_COLUMNS",
    "INT8_ROWS",
    "LANES",
    "ROWS",
    "SLACK",
    "TILE_HEIGHT",
    "VECTORS",
    "VECTOR_ROWS",
    "VNNI",
    "WIDENED",
    "WORDS",
]

_ARCH_REQ_XCOMP_PERM, _XTILEDATA = 0x1023, 18  # https://docs.kernel.org/arch/x86/xstate.html
_SYS_ARCH_PRCTL = 158

_FEATURES = llvmlite.binding.get_host_cpu_features()
_WIDE = bool(_FEATURES.get("avx512f"))


def _amx() -> bool:
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    return here and _WIDE and all(_FEATURES.get(name) for name in ("amx-bf16", "amx-int8", "amx-tile"))


def _granted() -> bool:
    """Whether the kernel lets this process use the registers, which it wants to be asked for once."""
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


LANES = 16
"""Of a vector of float32, on any CPU: one register with AVX-512, two or four elsewhere."""
BFLOAT16 = bool(_FEATURES.get("avx512bf16"))
"""Whether bfloat16 is multiplied, and rounded to, by instructions of its own."""
VNNI = bool(_FEATURES.get("avx512vnni"))
"""Whether eight-bit integers are multiplied by an instruction of their own."""
WORDS = bool(_FEATURES.get("avx2")) and not VNNI
"""Whether there are products of words, to multiply eight-bit integers by."""
AMX = _amx()
"""Whether products of bfloat16 and of int8 are done in matrix registers."""
DENIED = AMX and not _granted()
"""The machine has matrix registers, but the system does not let this process use them."""

WIDENED = not AMX and not (BFLOAT16 and llvmlite.binding.get_host_cpu_name().startswith("znver"))
"""Whether bfloat16 is multiplied as float32: where nothing narrower is multiplied, and on Intel's CPUs. The
one measured, an Emerald Rapids, takes twice as long for a dot product of pairs as for two multiply-adds."""

TILE_HEIGHT = 16
"""Rows of a matrix register."""
SLACK = TILE_HEIGHT - 1
"""Rows that may be read behind the last one, whatever they are."""

VECTOR_ROWS = 12 if _WIDE else 6
"""Rows of a tile in vectors at most: with two vectors of columns, 24 of 32 registers hold sums."""
VECTORS = 2 if _WIDE else 1
COLUMNS = VECTORS * LANES
"""Outputs of a panel of weights."""
ROWS = 2 * TILE_HEIGHT if AMX else VECTOR_ROWS
"""Rows of any tile at most: with 32 columns, four matrix registers hold sums."""

INT8_ROWS, INT8_COLUMNS = (TILE_HEIGHT, 6) if AMX else (4, 6)
"""Rows, and times sixteen output channels, of a tile of integers. In matrix registers, six hold sums. In
vectors, 24 sums, six weights and an input fill 32 of them (8 by 3, 6 by 4, 12 by 2 were slower, by 3% at 32
rows and 40% and more at one)."""
