"""The files of one checkpoint as bytes that can be handed on: all of them, or the ranges that came so far.

A shelf is either a directory's files, kept open so that they are there when the directory no longer is, or a
copy that is filled range by range, in files of full size that take no room where nothing was written yet. It
owns what is there and where. It refuses to know what the bytes mean, and who sends them.
"""

from __future__ import annotations

import os
import shutil
import threading
import weakref
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from daskllm.checkpoint import Checkpoint
from daskllm.types import ModelError

__all__ = ["FileOffer", "Ranges", "Shelf", "checksum"]


@dataclass(frozen=True, slots=True)
class FileOffer:
    """What somebody has of a file.

    Attributes:
        size: of the whole file, in bytes.
        head: bytes at its start that every copy needs.
        have: first and end of each range that is there; None: all.
    """

    size: int
    head: int
    have: tuple[tuple[int, int], ...] | None

    def covers(self, start: int, stop: int) -> bool:
        """Whether all bytes from ``start`` up to ``stop`` are there."""
        return self.have is None or any(low <= start and stop <= high for low, high in self.have)


Offer: TypeAlias = dict[str, FileOffer]


class Ranges:
    """A set of bytes as ranges that neither touch nor overlap.

    Example:
        >>> ranges = Ranges()
        >>> ranges.add(0, 4); ranges.add(8, 12); ranges.add(4, 6)
        >>> ranges.all(), ranges.covers(1, 6), ranges.covers(5, 9), ranges.covers(7, 7)
        (((0, 6), (8, 12)), True, False, True)
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Have these bytes too."""
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    def covers(self, start: int, stop: int) -> bool:
        """Whether all of these bytes are there; none always are."""
        place = bisect_right(self._starts, start) - 1
        return start >= stop or (place >= 0 and stop <= self._stops[place])

    def all(self) -> tuple[tuple[int, int], ...]:
        """The ranges, in order."""
        return tuple(zip(self._starts, self._stops, strict=True))


class _File:
    """One open file; it is closed when nobody has it any more, since a number that another file has got
    meanwhile would be read without an error."""

    def __init__(self, path: Path, head: int, have: Ranges | None, flags: int = os.O_RDONLY) -> None:
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, self.number)
        self.head, self.have = head, have
        self.stamp = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        stat = os.fstat(self.number)
        return stat.st_size, stat.st_mtime_ns

    @property
    def unchanged(self) -> bool:
        """Whether it holds what it held when it was opened; a copy is written here alone."""
        return self.have is not None or self.stamp == self._stamp()

    @property
    def size(self) -> int:
        return self.stamp[0]


@dataclass(eq=False)
class Shelf:
    """A checkpoint's files; `of` and `empty` make one. Its methods may be called from any thread.

    Attributes:
        directory: of a copy, whose directory goes with it; None where the files are somebody else's.
    """

    files: Mapping[str, _File]
    directory: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Shelf:
        """All files of a directory."""
        return cls({name: _File(path, head, None) for name, (path, head) in checkpoint.files().items()})

    @classmethod
    def empty(cls, directory: Path, offer: Mapping[str, FileOffer]) -> Shelf:
        """A copy to be filled, of files as somebody offers them.

        Raises:
            ModelError: it names a file outside the directory.
            OSError: the files cannot be made.
        """
        shutil.rmtree(directory, ignore_errors=True)
        files = {}
        for name, one in offer.items():
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts:
                raise ModelError(f"a worker offers a file {name!r}, which is not of its own directory")
            path = directory / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, one.size)
            files[name] = _File(path, one.head, Ranges(), os.O_RDWR)
        return cls(files, directory)

    def offer(self) -> Offer:
        """What is here now; nothing any more where a file was written over since it was opened."""
        if not all(file.unchanged for file in self.files.values()):
            return {}
        with self._lock:
            return {
                name: FileOffer(file.size, file.head, None if file.have is None else file.have.all())
                for name, file in self.files.items()
            }

    def covers(self, name: str, start: int, stop: int) -> bool:
        """Whether these bytes of a file are here."""
        file = self.files.get(name)
        if file is None or not 0 <= start <= stop <= file.size:
            return False
        with self._lock:
            return file.have is None or file.have.covers(start, stop)

    def read(self, name: str, start: int, stop: int) -> bytes | None:
        """Bytes of a file; None where they are not all here, or the file was written over."""
        if not self.covers(name, start, stop):
            return None
        file = self.files[name]
        pieces = []
        while start < stop:
            pieces.append(os.pread(file.number, stop - start, start))
            if not pieces[-1]:
                return None
            start += len(pieces[-1])
        return b"".join(pieces) if file.unchanged else None

    def write(self, name: str, start: int, content: memoryview) -> None:
        """Put bytes into a copy.

        Raises:
            OSError: the disk is full, for instance; the bytes do not count as being there.
        """
        file = self.files[name]
        assert file.have is not None
        written = 0
        while written < len(content):
            written += os.pwrite(file.number, content[written:], start + written)
        with self._lock:
            file.have.add(start, start + len(content))

    def close(self) -> None:
        """Let a copy's directory go; what is mapped of it stays readable."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


def checksum(content: bytes | memoryview) -> int:
    """What is sent along with bytes and must come out of them where they arrive.

    It guards against a mixed-up or broken transfer, as TCP's own 16 bits do badly; CRC-32 does that at
    several GB/s and comes with Python. It is no defence against a worker that lies: it could do worse.

    >>> checksum(b"123456789") == 0xCBF43926
    True
    """
    return zlib.crc32(content)
