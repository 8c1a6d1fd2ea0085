"""Answers by key, shared by all processes that open the same place.

Each flush writes one file, named by its time, size and digest; files are never changed, so that writers
cannot clash, and the name tells what is half written or broken. Many small files become one; the oldest go
when the place outgrows its limit. Nothing that goes wrong here is a row's error: what cannot be read was
never kept, and where nothing can be written the rows go on without.
"""

from __future__ import annotations

import array
import hashlib
import json
import logging
import re
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from daskllm.answers import segment
from daskllm.answers.index import Index
from daskllm.answers.place import UNFINISHED, Place
from daskllm.types import Completion

__all__ = ["FLUSH_SECONDS", "LIMIT", "Answers", "key_of", "space_of"]

logger = logging.getLogger(__name__)

LIMIT = 4 << 30
"""Bytes that a place may hold, of all models together."""
FLUSH_SECONDS = 1.0
"""How long rows wait to be written with others."""
FLUSH_ROWS = 1024
FLUSH_BYTES = 16 << 20
SMALL_BYTES = 1 << 20
"""A file below is put together with others."""
SMALL_FILES = 64
"""So many small ones become one: a place of 4 GiB has some 4,000 files."""
_OPEN_FILES = 16
_LOOKS = 4
_TICK = 50_000_000  # nanoseconds in which a directory may change twice and have the same time
_ABANDONED_SECONDS = 3600.0
_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]+)-([0-9a-f]{32})\.arrow")
_FORMAT = 1  # counts up when the same space and key would mean something else


def key_of(token_ids: Sequence[int], draw: Sequence[int] = ()) -> bytes:
    """A row's key within a space: 16 bytes.

    Args:
        token_ids: of the prompt, as the model sees it.
        draw: what its random numbers come from; none where nothing is drawn.

    >>> key_of([1, 2], [3]) == key_of([1, 2, 3])
    False
    """
    prompt = array.array("q", token_ids).tobytes()
    rest = struct.pack(f"<{len(draw) + 1}q", len(draw), *draw)
    return hashlib.blake2b(prompt + rest, digest_size=segment.KEY_BYTES).digest()


def space_of(facts: Mapping[str, Any]) -> str:
    """The name of the space of rows that these facts hold for: the model, and how tokens are chosen.

    >>> space_of({"model": "a", "n": 1}) == space_of({"n": 1, "model": "a"})
    True
    """
    text = json.dumps([_FORMAT, dict(facts)], sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, order=True)
class _File:
    """A file by its name; the order is by age."""

    time: int
    size: int
    name: str

    @classmethod
    def of(cls, name: str) -> _File | None:
        """None where it is no file of ours."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(int(match[1], 16), int(match[2], 16), name)

    @classmethod
    def holding(cls, data: pa.Buffer, time: int) -> _File:
        return cls(time, data.size, f"{time:016x}-{data.size:x}-{_digest(data)}.arrow")

    def holds(self, data: pa.Buffer) -> bool:
        return data.size == self.size and _digest(data) == self.name[-38:-6]


class Answers:
    """The answers of one space: a model, its version, and parameters of sampling.

    Args:
        place: a directory or an fsspec URL.
        space: from `space_of`.
        limit: bytes that all spaces of the place may take; the oldest files go first.

    Threads may share it.

    Example:
        >>> import tempfile
        >>> from daskllm.types import Completion
        >>> with tempfile.TemporaryDirectory() as path:
        ...     kept = Answers(path, "a model's space")
        ...     kept.put({key_of([1, 2]): [Completion("yes", (7,), "stop", 2, 1)]})
        ...     kept.get([key_of([1, 2])])[key_of([1, 2])][0].text
        'yes'
    """

    def __init__(self, place: str, space: str, limit: int = LIMIT) -> None:
        self._place, self._space, self._limit = Place(place), space, limit
        self._where = place
        self._lock = threading.RLock()
        self._index = Index()
        self._age: int | None = None
        self._files: list[_File] = []  # by number; one that is gone stays, so that numbers do
        self._numbers: dict[str, int] = {}  # of those that are there
        self._open: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._buffer: dict[bytes, list[Completion]] = {}
        self._weight, self._since = 0, 0.0
        self._unchecked = limit  # bytes written since the place was measured: measure it first
        self._warned: set[str] = set()
        self._writable = True

    # --- reading ------------------------------------------------------------------------------------

    def get(self, keys: Sequence[bytes]) -> dict[bytes, list[Completion]]:
        """What is known under these keys."""
        with self._lock:
            found = {key: self._buffer[key] for key in keys if key in self._buffer}
            try:
                # Twice, as a file may be put together with others after it was found.
                if self._look(keys, found):
                    self._look(keys, found)
            except Exception as error:  # of whatever file system lies below
                self._warn("read", error)
            return found

    def _look(self, keys: Sequence[bytes], found: dict[bytes, list[Completion]]) -> bool:
        """Fill ``found``; whether a file was lost on the way."""
        self._refresh()
        left = [key for key in keys if key not in found]
        if not left or not len(self._index):
            return False
        files, rows = self._index.find(np.frombuffer(b"".join(left), np.uint64).reshape(-1, 2))
        hits = np.flatnonzero(files >= 0)
        lost = False
        for number in np.unique(files[hits]).tolist():
            here = hits[files[hits] == number]
            batch = self._batch(number)
            if batch is None:
                lost = True
                continue
            answers = segment.decode(batch, rows[here].tolist())
            found.update(zip((left[i] for i in here.tolist()), answers, strict=True))
        return lost

    def _batch(self, number: int) -> pa.RecordBatch | None:
        """A file's rows, or None where it is gone or broken, and then forgotten."""
        batch = self._open.pop(number, None)
        try:
            batch = self._checked(self._files[number]) if batch is None else batch
        except FileNotFoundError:
            self._forget([number])
            return None
        if batch is None:
            self._index.drop([number])  # its name stays, so that it is not read again
            return None
        self._open[number] = batch
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return batch

    def _checked(self, file: _File) -> pa.RecordBatch | None:
        """A file's rows, or None where they are not what was written.

        Raises:
            FileNotFoundError: it is gone.
        """
        try:
            data = self._place.read(self._space, file.name)
            if file.holds(data):
                return segment.read(data)
            logger.warning("the answers in %s are not what was written; they are left out", file.name)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            logger.warning("the answers in %s cannot be read and are left out: %s", file.name, error)
        return None

    def _refresh(self) -> None:
        """Take in the files that came since the last look, and forget those that are gone."""
        # A list made while files are put together may lack the old ones and the new one.
        for _ in range(_LOOKS):
            age = self._place.age(self._space)
            if age is not None and age == self._age:
                return
            names = self._place.files(self._space)
            there = set(names)
            self._forget([number for name, number in self._numbers.items() if name not in there])
            new = [file for name in names if name not in self._numbers and (file := _File.of(name))]
            lost = sum(not self._take_in(file) for file in new)
            if not lost and self._place.age(self._space) == age:
                self._age = age if _is_settled(age) else None
                return

    def _take_in(self, file: _File) -> bool:
        """Add a file's keys; whether it was still there."""
        keys = np.empty((0, 2), np.uint64)
        try:
            with closing(self._place.open(self._space, file.name)) as opened:
                keys = segment.keys_in(opened)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            logger.warning("the answers in %s cannot be read and are left out: %s", file.name, error)
        self._add(file, keys)  # without keys too, so that it is not read again
        return True

    def _add(self, file: _File, keys: segment.Keys) -> None:
        self._numbers[file.name] = len(self._files)
        self._index.add(keys, len(self._files))
        self._files.append(file)

    def _forget(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        self._age = None  # what was in them may be elsewhere
        self._index.drop(numbers)
        for number in numbers:
            self._numbers.pop(self._files[number].name, None)
            self._open.pop(number, None)

    # --- writing ------------------------------------------------------------------------------------

    def put(self, entries: Mapping[bytes, Iterable[Completion]]) -> None:
        """Keep rows that finished; written when they are many or a second has passed, the rest by `flush`."""
        with self._lock:
            if not self._writable:
                return
            if not self._buffer:
                self._weight, self._since = 0, time.monotonic()
            for key, samples in entries.items():
                kept = self._buffer[key] = list(samples)
                self._weight += segment.weight(kept)
            if len(self._buffer) >= FLUSH_ROWS or self._weight >= FLUSH_BYTES:
                self.flush()
            self.flush(FLUSH_SECONDS)

    def flush(self, waiting: float = 0.0) -> None:
        """Write what was put; other processes see it when this returns.

        Args:
            waiting: only if something has waited for so many seconds.
        """
        with self._lock:
            if time.monotonic() - self._since < waiting:
                return
            entries, self._buffer = self._buffer, {}
            if not entries:
                return
            try:
                self._write(segment.encode(entries), time.time_ns())
            except Exception as error:  # a full disk, one that is not ours, whatever lies below: rows go on
                self._warn("written", error)
                self._writable = False
                return
            try:
                self._tend()
            except Exception as error:  # another's files may not be ours to remove
                self._warn("tidied", error)

    def _write(self, data: pa.Buffer, time: int) -> None:
        file = _File.holding(data, time)
        self._place.write(self._space, file.name, data)
        self._unchecked += file.size
        if file.name not in self._numbers:
            self._add(file, segment.keys_in(pa.BufferReader(data)))

    def _tend(self) -> None:
        small = sorted(f for f in map(self._files.__getitem__, self._numbers.values()) if _is_small(f))
        if len(small) >= SMALL_FILES:
            self._put_together(small[:SMALL_FILES])
        # Seldom: it looks at every space.
        if self._unchecked >= self._limit // 64:
            self._unchecked = 0
            self._shrink()

    def _put_together(self, files: Sequence[_File]) -> None:
        """Make one file of several, which may be any writer's.

        Two writers that do it at once make the same file; the rows of one that both hold are there twice
        until the next time.
        """
        try:
            batches = [batch for file in files if (batch := self._checked(file)) is not None]
        except FileNotFoundError:  # another writer is doing it
            self._refresh()
            return
        if batches:
            self._write(segment.merge(batches), max(file.time for file in files))
        self._forget([number for file in files if (number := self._numbers.get(file.name)) is not None])
        for file in files:
            self._place.remove(self._space, file.name)

    def _shrink(self) -> None:
        """Remove the oldest files of any space until the rest is within the limit."""
        files: list[tuple[_File, str]] = []
        for space in self._place.spaces():
            for name in self._place.files(space):
                file = _File.of(name)
                if file is not None:
                    files.append((file, space))
                elif name.endswith(UNFINISHED) and _is_abandoned(name):
                    self._place.remove(space, name)
        size = sum(file.size for file, _ in files)
        for file, space in sorted(files):
            if size <= self._limit:
                return
            self._place.remove(space, file.name)
            size -= file.size

    def _warn(self, done: str, error: Exception) -> None:
        if done not in self._warned:
            self._warned.add(done)
            logger.warning("answers cannot be %s at %s, going on without: %s", done, self._where, error)


def _digest(data: pa.Buffer) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _is_settled(age: int | None) -> bool:
    return age is not None and time.time_ns() - age > _TICK


def _is_small(file: _File) -> bool:
    return file.size < SMALL_BYTES


def _is_abandoned(name: str) -> bool:
    file = _File.of(name.partition(UNFINISHED)[0].rpartition(".")[0])
    return file is not None and time.time_ns() - file.time > _ABANDONED_SECONDS * 1e9
