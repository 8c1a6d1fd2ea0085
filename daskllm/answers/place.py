"""Where answers lie: a directory, or whatever fsspec reaches. It knows files and bytes."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

__all__ = ["UNFINISHED", "Place"]

UNFINISHED = ".tmp"
"""How the name of a file ends that is being written, or was when its writer was lost."""


class Place:
    """A directory of directories of files that are written whole or not at all.

    Args:
        where: a path (``~`` is the home of whoever opens it) or an fsspec URL such as ``s3://bucket/answers``.

    Raises:
        ValueError: fsspec does not know the URL's protocol, or lacks a package for it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     Place(path).spaces()
        []
    """

    def __init__(self, where: str) -> None:
        try:
            # Somebody else's new files must show, so no listing is cached.
            self._fs, path = fsspec.core.url_to_fs(os.path.expanduser(where), use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ValueError(f"answers cannot be kept at {where!r}: {error}") from error
        self._path: str = str(path).rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def age(self, space: str) -> int | None:
        """When files last came or went, in nanoseconds; None where that cannot be told."""
        if not self._local:
            return None
        try:
            return os.stat(self._at(space)).st_mtime_ns
        except FileNotFoundError:
            return 0

    def spaces(self) -> list[str]:
        """The directories."""
        return self._names(self._path)

    def files(self, space: str) -> list[str]:
        """The files of one directory, none where it is not there."""
        return self._names(self._at(space))

    def open(self, space: str, name: str) -> Any:
        """A file to read here and there; the caller closes it."""
        path = self._at(space, name)
        return pa.memory_map(path) if self._local else self._fs.open(path, "rb")

    def read(self, space: str, name: str) -> pa.Buffer:
        """A file's bytes: mapped where it is on a disk, and then readable after it was removed too."""
        path = self._at(space, name)
        if not self._local:
            return pa.py_buffer(self._fs.cat_file(path))
        with pa.memory_map(path) as file:
            return file.read_buffer()

    def write(self, space: str, name: str, data: pa.Buffer) -> None:
        """Write a file; nobody sees it before it is whole."""
        self._fs.makedirs(self._at(space), exist_ok=True)
        path = self._at(space, name)
        if not self._local:
            self._fs.pipe_file(path, data.to_pybytes())
            return
        unfinished = f"{path}.{uuid.uuid4().hex[:12]}{UNFINISHED}"
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
            os.replace(unfinished, path)
        except BaseException:
            self._remove(unfinished)
            raise

    def remove(self, space: str, name: str) -> None:
        """Remove a file, if it is there."""
        self._remove(self._at(space, name))

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _at(self, *names: str) -> str:
        return "/".join((self._path, *names))

    def _names(self, path: str) -> list[str]:
        try:
            paths = self._fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return [str(one).rstrip("/").rpartition("/")[2] for one in paths]
