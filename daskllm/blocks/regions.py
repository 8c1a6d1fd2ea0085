"""Where packed weights lie: one after the other in large regions of large pages.

Every decode step reads all of them. Over pages of 4 KiB a core looks up a page for every 64 cache lines, and
what it fetches ahead ends with the page; over pages of 2 MiB neither shows. A page of that size needs as much
memory in one piece, which most matrices do not fill alone. Where the kernel has no such pages, regions are
memory like any other (https://docs.kernel.org/admin-guide/mm/transhuge.html).

Models share the region that is being filled: of one that is closed, up to 64 MiB stay until what lies beside
them has gone too.

Memory that a machine has not used before takes longer to come than weights take to be copied there: 256 MiB
took a virtual machine 0.6 s, and 0.03 s when it had it before. So it can be sent for early (`prepare`), as
one region, which is a single model's.
"""

from __future__ import annotations

import ctypes
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

__all__ = ["prepare", "release", "room"]

_LINE = 64
"""Bytes: no load of a vector spans two cache lines."""
_PAGE = 2 << 20
_REGION = 64 << 20
"""Bytes of a region; what no matrix has been laid into takes no memory."""

_lock = threading.Lock()
# The region that is being filled and how far it is. Matrices keep it alive, and nothing else.
_region: weakref.ref[mmap.mmap] | None = None
_filled = 0
# One that is prepared, until what is laid into it is there, and whether nothing has been yet.
_prepared: mmap.mmap | None = None
_empty = False


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros for weights, of this shape, that begins at a cache line.

    Its memory goes back when this tensor and all that came from the same region are gone.

    >>> import torch
    >>> room((3, 16), torch.bfloat16).data_ptr() % 64
    0
    """
    import torch  # not above: memory is prepared while it is imported

    global _region, _filled, _empty
    count = math.prod(shape)
    size = -(-count * dtype.itemsize // _LINE) * _LINE
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    _empty = False  # before the lock, which whoever touches pages would have again and again
    with _lock:
        region = None if _region is None else _region()
        if region is None or _filled + size > len(region):
            region = _map(max(_REGION, size))
            _region, _filled = weakref.ref(region), 0
        begin = _filled
        _filled += size
    return torch.frombuffer(region, dtype=dtype, count=count, offset=begin).view(*shape)


def prepare(nbytes: int) -> None:
    """Send for the memory of so many bytes of weights, which are laid into it next; `release` follows them.

    A thread touches its pages until the first of them is wanted, so that this is for whoever has other things
    to do first.

    >>> prepare(1 << 20)
    >>> release()
    """
    global _region, _filled, _prepared, _empty
    with _lock:
        _prepared = _map(nbytes)
        _region, _filled, _empty = weakref.ref(_prepared), 0, True
    threading.Thread(target=_touch, args=(_region,), name="daskllm-memory", daemon=True).start()


def release() -> None:
    """Have memory that was prepared go with what lies in it, and now what nothing lies in."""
    global _region, _prepared, _empty
    _empty = False
    with _lock:
        if _prepared is not None and _region is not None and _region() is _prepared:
            begin = -(-_filled // _PAGE) * _PAGE
            if hasattr(mmap, "MADV_DONTNEED") and begin < len(_prepared):
                _prepared.madvise(mmap.MADV_DONTNEED, begin)
            _region = None
        _prepared = None


def _touch(prepared: weakref.ref[mmap.mmap]) -> None:
    # A byte of each page, outside of the interpreter. Not by madvise, which nobody can map memory beside: it
    # took an import of torch half a second longer.
    memset = ctypes.CDLL(None).memset
    offset, size = 0, _PAGE
    while offset < size:
        with _lock:  # a page that is in use is not to be written to
            region = prepared()
            if region is None or region is not _prepared or not _empty:
                return
            size = len(region)
            memset(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(region)) + offset), 0, 1)
        offset += _PAGE


def _forget() -> None:
    """In a child of fork, where nobody touches pages and nobody gives a lock back."""
    global _lock, _region, _prepared, _empty
    _lock, _region, _prepared, _empty = threading.Lock(), None, None, False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _map(size: int) -> mmap.mmap:
    size = -(-size // _PAGE) * _PAGE
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel that was built without
            region.madvise(mmap.MADV_HUGEPAGE)
    return region
