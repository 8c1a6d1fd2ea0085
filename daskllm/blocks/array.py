"""What a block is: a NumPy array in memory, or a CuPy array on a GPU, that torch views without a copy.

The only module that imports CuPy. NumPy has no bfloat16, so those blocks travel as their uint16 bits; only
`to_torch` needs to be told. Nothing here knows what a block means.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.utils.dlpack

__all__ = [
    "DTYPES",
    "Block",
    "Pages",
    "drop_pages",
    "files_stay",
    "from_torch",
    "holds",
    "is_on",
    "nbytes",
    "pages",
    "to_device",
    "to_torch",
]

Block: TypeAlias = Any
"""A C-contiguous ``numpy.ndarray`` or ``cupy.ndarray`` of float32, float16 or uint16 (bfloat16's bits)."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MADV_DONTNEED = 4
_found = threading.local()


def from_torch(tensor: torch.Tensor) -> Block:
    """A block that shares the memory of a contiguous tensor, on the tensor's own device.

    Raises:
        TypeError: the tensor's type is none of float32, bfloat16, float16.
        ValueError: it is not contiguous.

    Example:
        >>> block = from_torch(torch.ones(2, dtype=torch.bfloat16))
        >>> block
        array([16256, 16256], dtype=uint16)
        >>> to_torch(block, "bfloat16")
        tensor([1., 1.], dtype=torch.bfloat16)
    """
    if tensor.dtype not in DTYPES.values():
        raise TypeError(f"a block is {', '.join(DTYPES)}, not {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"a block is contiguous; this tensor of shape {tuple(tensor.shape)} is strided")
    bits = tensor.detach()
    return _wrap(bits.view(torch.uint16) if tensor.dtype == torch.bfloat16 else bits)


def to_torch(block: Block, dtype: str) -> torch.Tensor:
    """A tensor that shares a block's memory; ``dtype`` tells uint16 bits apart ("bfloat16").

    Raises:
        TypeError: the block does not hold this type.
    """
    if not holds(block, dtype):
        raise TypeError(f"a block of {block.dtype} does not hold {dtype!r}")
    bits = _unwrap(block)
    return bits.view(torch.bfloat16) if dtype == "bfloat16" else bits


def holds(block: Block, dtype: str) -> bool:
    """Whether a block's elements are of this type.

    >>> holds(np.zeros(2, np.uint16), "bfloat16"), holds(np.zeros(2, np.uint16), "float16")
    (True, False)
    """
    return dtype in DTYPES and block.dtype == ("uint16" if dtype == "bfloat16" else dtype)


def to_device(block: Block, device: str) -> Block:
    """The block on "cpu" or "cuda" (or "cuda:1"); itself when it is there already.

    Memory on a GPU comes from torch's pool, so that blocks and the engine's own tensors share one.

    Raises:
        ImportError: a GPU is asked for and CuPy is not installed.
        ValueError: another device.
    """
    target = torch.device(device)
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", not {device!r}')
    if is_on(block, device):
        return block
    if target.type == "cuda":
        _cupy()  # before a byte is moved
    return _wrap(_unwrap(block).to(target))


def is_on(block: Block, device: str) -> bool:
    """Whether a block is on a device; "cuda" is any GPU.

    >>> is_on(np.zeros(2, np.float32), "cpu")
    True
    """
    target = torch.device(device)
    if isinstance(block, np.ndarray) or target.type == "cpu":
        return isinstance(block, np.ndarray) and target.type == "cpu"
    return target.index in (None, block.device.id)


def _wrap(bits: torch.Tensor) -> Block:
    return bits.numpy() if bits.device.type == "cpu" else _cupy().from_dlpack(bits)


def _unwrap(block: Block) -> torch.Tensor:
    return torch.from_numpy(block) if isinstance(block, np.ndarray) else torch.utils.dlpack.from_dlpack(block)


def nbytes(block: Block) -> int:
    """A block's size in bytes."""
    return int(block.nbytes)


@dataclass(frozen=True, slots=True)
class Pages:
    """The whole pages of a block that is a view of a mapped file.

    Attributes:
        first: address of the first.
        nbytes: bytes of them together.
    """

    first: int
    nbytes: int

    def drop(self) -> int:
        """Give back the memory they take; the next touch reads them again.

        Returns:
            How many bytes were given back.
        """
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        gone = self.nbytes and not madvise(
            ctypes.c_void_p(self.first), ctypes.c_size_t(self.nbytes), _MADV_DONTNEED
        )
        return self.nbytes if gone else 0


def pages(*blocks: Block) -> list[Pages | None]:
    """The pages of each block; None for one in ordinary memory or on a GPU, and where there is no ``/proc``.

    Whole pages only, and never outside a file's mapping: to drop those of ordinary memory would zero it.

    Example:
        >>> pages(np.zeros(1 << 20, np.float32))
        [None]
    """
    if not blocks or not os.path.exists("/proc/self/maps"):
        return [None] * len(blocks)
    page, files = os.sysconf("SC_PAGE_SIZE"), _files_of([b for b in blocks if isinstance(b, np.ndarray)])
    found: list[Pages | None] = []
    for block in blocks:
        if not isinstance(block, np.ndarray) or not _within(block, files):
            found.append(None)
            continue
        start = block.ctypes.data
        first, last = -(-start // page) * page, (start + block.nbytes) // page * page
        found.append(Pages(first, max(0, last - first)))
    return found


def drop_pages(*blocks: Block) -> list[int | None]:
    """Give back the memory of blocks that are views of a mapped file.

    For blocks that have just been copied into a kernel's packed form and stay only as the source.

    Returns:
        How many bytes of each were given back; None for one that has no `pages`.

    Example:
        >>> drop_pages(np.zeros(1 << 20, np.float32))
        [None]
    """
    return [None if mapped is None else mapped.drop() for mapped in pages(*blocks)]


@contextmanager
def files_stay() -> Iterator[None]:
    """Within it the files that this thread asks `pages` of stay mapped, so that they are looked for once.

    Example:
        >>> with files_stay():
        ...     pages(np.zeros(1 << 20, np.float32))
        [None]
    """
    _found.files = []
    try:
        yield
    finally:
        _found.files = None


def _files_of(blocks: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """The mapped files that these blocks view, and more. A process has thousands: to list them takes 2 ms."""
    known: list[tuple[int, int]] | None = getattr(_found, "files", None)
    if known and all(_within(block, known) for block in blocks):
        return known
    files = _mapped_files()
    if known is not None:  # not those of others, which others may let go
        _found.files = known + [file for file in files if any(_within(block, [file]) for block in blocks)]
    return files


def _within(block: np.ndarray, ranges: list[tuple[int, int]]) -> bool:
    start, stop = block.ctypes.data, block.ctypes.data + block.nbytes
    return any(low <= start and stop <= high for low, high in ranges)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that view files (``man 5 proc_pid_maps``).

    Device files and deleted ones are left out: some kinds of ordinary memory go by such names.
    """
    ranges = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if "/" not in line or " /dev/" in line or line.endswith("(deleted)\n"):
                continue  # as most are: a process has thousands
            span, _, _, _, inode, _ = line.split(maxsplit=5)
            if inode != "0":
                low, high = span.split("-")
                ranges.append((int(low, 16), int(high, 16)))
    return ranges


def _cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            'blocks on a GPU are CuPy arrays, and CuPy is not installed: pip install "daskllm[gpu]"'
        ) from error
    module: ModuleType = cupy
    return module
