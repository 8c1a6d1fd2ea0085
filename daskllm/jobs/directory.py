"""Where a job's parts lie: a directory, or whatever fsspec reaches.

It owns that a file is there whole or not at all, and stays there when the machine loses power. It knows names
and bytes, and refuses to know what is in them.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

__all__ = ["Directory", "Entry", "stamp_of"]

UNFINISHED = ".tmp"
"""How the name of a file ends that is being written; it begins with a dot, so that readers pass over it."""
_ABANDONED_NS = 3600 * 10**9
# Of these a file that is being written does not show, and a move is a copy.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"})
# By the names that the file systems of fsspec give it.
_STAMPS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file: its bytes, and a text that changes when it is written again."""

    size: int
    stamp: str


def stamp_of(info: dict[str, Any]) -> str:
    """A text that changes when a file does, from what fsspec says of it; "" where it says nothing."""
    return next((str(info[name]) for name in _STAMPS if info.get(name) is not None), "")


class Directory:
    """A directory of files that are written whole or not at all.

    Args:
        where: a path (``~`` is this user's home) or an fsspec URL such as ``s3://bucket/answers``.

    Raises:
        TypeError: neither of these.
        ValueError: fsspec does not know the URL's protocol, or lacks a package for it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     place = Directory(path)
        ...     place.entries()
        {}
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
            raise TypeError(f"path must be a directory or a URL, not {where!r}")
        place = os.path.expanduser(os.fspath(where))
        try:
            # Somebody else's new files must show, so no listing is cached.
            self._fs, path = fsspec.core.url_to_fs(place, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"nothing can be written to {place!r}: {error}") from error
        self._local = isinstance(self._fs, LocalFileSystem)
        self._path = str(path).rstrip("/")
        self.where = self._path if self._local else place
        """As other processes may open it, whatever their own directory is."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Directory, (self.where,)

    def make(self) -> None:
        """Make it where it is missing.

        Raises:
            OSError: that cannot be done, or nothing can be written there.
        """
        try:
            self._fs.makedirs(self._path, exist_ok=True)
        except OSError as error:
            raise type(error)(
                error.errno, f"{self.where} cannot be made: {error.strerror or error}"
            ) from None
        if self._local and not os.access(self._path, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.where} cannot be written to")

    def entries(self) -> dict[str, Entry]:
        """The files and directories in it by name; none where it is not there."""
        if self._local:
            try:
                with os.scandir(self._path) as found:
                    return {one.name: _entry(one.stat()) for one in found}
            except FileNotFoundError:
                return {}
        try:
            infos = self._fs.ls(self._path, detail=True)
        except FileNotFoundError:
            return {}
        names = (str(info["name"]).rstrip("/").rpartition("/")[2] for info in infos)
        return {
            name: Entry(int(info.get("size") or 0), stamp_of(info))
            for name, info in zip(names, infos, strict=True)
            if name
        }

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: it is not there.
        """
        data: bytes = self._fs.cat_file(self._at(name))
        return data

    def write(self, name: str, data: Any, *, same: bool = False) -> Entry:
        """Write a file over what is there by that name; nobody sees it before it is whole.

        Args:
            data: bytes, or whatever offers them as a buffer.
            same: whoever else writes a file of that name is to write the same. An object store is then asked
                to put it only where there is none (S3's ``If-None-Match``), and what is there is left alone
                if it is the same: of two who deliver one part, the later changes nothing.

        Raises:
            OSError: it cannot be written; what was there by that name stays.
        """
        path = self._at(name)
        if self._local:
            return self._write_here(path, data)
        if self._is_object_store():
            if not same or not self._put_first(path, bytes(data)):
                self._fs.pipe_file(path, bytes(data))
        else:
            unfinished = self._unfinished(name)
            self._fs.pipe_file(unfinished, bytes(data))
            self._fs.mv(unfinished, path)
        return Entry(len(memoryview(data)), stamp_of(self._fs.info(path)))

    def _put_first(self, path: str, data: bytes) -> bool:
        """Put an object where there is none; whether it is there now, by whomever."""
        try:
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return bool(self._fs.cat_file(path) == data)
        except (NotImplementedError, TypeError, ValueError):  # a store, or its client, that has no such thing
            return False
        return True

    def _write_here(self, path: str, data: Any) -> Entry:
        unfinished = self._unfinished(os.path.basename(path))
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                entry = _entry(os.fstat(file.fileno()))
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise
        _sync(self._path)
        return entry

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def tidy(self) -> None:
        """Remove what writers that were lost had not finished; one may be at work that seems to be lost."""
        times = {name: int(entry.stamp) for name, entry in self.entries().items()} if self._local else {}
        now = max(times.values(), default=0)  # by the disk's clock, which may be another machine's
        for name, changed in times.items():
            if self.is_unfinished(name) and now - changed > _ABANDONED_NS:
                with suppress(OSError):
                    os.unlink(self._at(name))

    @staticmethod
    def is_unfinished(name: str) -> bool:
        """Whether a file is one that is being written."""
        return name.startswith(".") and name.endswith(UNFINISHED)

    def _unfinished(self, name: str) -> str:
        return self._at(f".{name}.{uuid.uuid4().hex[:12]}{UNFINISHED}")

    def _is_object_store(self) -> bool:
        protocol = self._fs.protocol
        return bool(_OBJECT_STORES & {protocol, *(() if isinstance(protocol, str) else protocol)})

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


def _entry(stat: os.stat_result) -> Entry:
    return Entry(stat.st_size, str(stat.st_mtime_ns))


def _sync(directory: str) -> None:
    """Have a rename reach the disk, where the system lets one do that."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
