"""Where packed weights lie: one after the other in large regions of large pages.

Every decode step reads all of them. Over pages of 4 KiB a core looks up a page for every 64 cache lines, and
what it fetches ahead ends with the page; over pages of 2 MiB neither shows. A page of that size needs as much
memory in one piece, which most matrices do not fill alone. Where the kernel has no such pages, regions are
memory like any other (https://docs.kernel.org/admin-guide/mm/transhuge.html).

Models share the region that is being filled: of one that is closed, up to 64 MiB stay until what lies beside
them has gone too.

A model that is opened before torch is there has a region of its own (`own`), which is filled meanwhile:
memory that a machine has not used before takes longer to come than weights take to be copied there (256 MiB
took a virtual machine 0.6 s, and 0.03 s when it had it before).
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["own", "room"]

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

    >>> import torch
    >>> room((3, 16), torch.bfloat16).data_ptr() % 64
    0
    """
    import torch  # not above: models have their regions while it is imported

    global _region, _filled
    count = math.prod(shape)
    size = -(-count * dtype.itemsize // _LINE) * _LINE
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    with _lock:
        region = None if _region is None else _region()
        if region is None or _filled + size > len(region):
            region = _map(max(_REGION, size))
            _region, _filled = weakref.ref(region), 0
        begin = _filled
        _filled += size
    return torch.frombuffer(region, dtype=dtype, count=count, offset=begin).view(*shape)


def own(nbytes: int) -> memoryview:
    """Zeros for weights of one model, beginning at a page; their memory comes when they are written to.

    It goes back when nothing views it any more.

    >>> own(100).nbytes
    100
    """
    return memoryview(_map(nbytes))[:nbytes]


def _forget() -> None:
    """In a child of fork, where nobody gives a lock back."""
    global _lock, _region
    _lock, _region = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _map(size: int) -> mmap.mmap:
    size = -(-size // _PAGE) * _PAGE
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without
            region.madvise(mmap.MADV_HUGEPAGE)
    return region
