"""Where packed weights lie: one after the other in large regions of large pages.

Every decode step reads all of them. Over pages of 4 KiB a core looks up a page for every 64 cache lines, and
what it fetches ahead ends with the page; over pages of 2 MiB neither shows. A page of that size needs as much
memory in one piece, which most matrices do not fill alone. Where the kernel has no such pages, regions are
memory like any other (https://docs.kernel.org/admin-guide/mm/transhuge.html).

Models share the region that is being filled: of one that is closed, up to 64 MiB stay until what lies beside
them has gone too.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch

__all__ = ["room"]

_LINE = 64
"""Bytes: no load of a vector spans two cache lines."""
_PAGE = 2 << 20
_REGION = 64 << 20
"""Bytes of a region; what no matrix has been laid into takes no memory."""

_lock = threading.Lock()
# The region that is being filled and how far it is. Matrices keep it alive, and nothing else.
_region: weakref.ref[mmap.mmap] | None = None
_filled = 0


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros for weights, of this shape, that begins at a cache line.

    Its memory goes back when this tensor and all that came from the same region are gone.

    >>> room((3, 16), torch.bfloat16).data_ptr() % 64
    0
    """
    global _region, _filled
    count = math.prod(shape)
    size = -(-count * dtype.itemsize // _LINE) * _LINE
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    with _lock:
        region = None if _region is None else _region()
        if region is None or _filled + size > len(region):
            region = _map(max(_REGION, -(-size // _PAGE) * _PAGE))
            _region, _filled = weakref.ref(region), 0
        begin = _filled
        _filled += size
    return torch.frombuffer(region, dtype=dtype, count=count, offset=begin).view(*shape)


def _map(size: int) -> mmap.mmap:
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without
            region.madvise(mmap.MADV_HUGEPAGE)
    return region
