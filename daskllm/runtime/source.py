"""This process's daskllm as files: what tells it from another, and a copy that can be sent.

It refuses to know to whom (`install`).
"""

from __future__ import annotations

import functools
import hashlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["digest", "version", "zipped"]

PACKAGE = Path(__file__).parents[1]


def version() -> str:
    """The package's version."""
    # The package's root imports the rooms, so that no room may import it.
    found: str = sys.modules[PACKAGE.name].__version__
    return found


@functools.cache
def digest() -> str:
    """Eight digits that two copies share where all their code is the same, be their version so or not.

    >>> len(digest())
    8
    """
    code = hashlib.sha256()
    for name, path in _files():
        if path.suffix == ".py":
            code.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return code.hexdigest()[:8]


def zipped() -> bytes:
    """The package as a zip archive, its templates and bundled model included."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for name, path in _files():
            files.write(path, f"{PACKAGE.name}/{name}")
    return archive.getvalue()


def _files() -> Iterator[tuple[str, Path]]:
    """Name within the package and path of each file, in order; what is compiled from them is left out."""
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(PACKAGE).as_posix(), path
