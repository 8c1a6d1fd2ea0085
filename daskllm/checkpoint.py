"""A model directory or Hub id: its JSON files and its tensors, read lazily from mapped files.

This room knows the Hugging Face directory layout and the safetensors format
(https://huggingface.co/docs/safetensors/en/index#format). It refuses to know what any tensor means, and it
refuses files that run code when loaded (pickles) altogether.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from daskllm.types import ModelError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "open_checkpoint"]

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The root's own weights only: repositories also ship other formats and second copies of the same weights.
DOWNLOADED = ("*.json", "*.jinja", WEIGHTS, "model-*.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SMALL_SUFFIXES = (".json", ".jinja")
_IDENTITY_SUFFIXES = (*_SMALL_SUFFIXES, ".safetensors")
_TEMPLATES = "additional_chat_templates"
_SAMPLE = 4096
"""Bytes of a tensor that `Checkpoint.content` reads: a page, which any read would bring in."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
           "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


def open_checkpoint(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Open a model directory, or the local snapshot of a Hub repository (downloaded when needed).

    Args:
        model: a directory, or ``"org/name"`` where no such directory exists.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        ModelError: nothing is there, a file is missing, broken or cut short, or only pickles are there.
        ValueError: a revision is given for a directory.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} belongs to a Hub id, but {str(model)!r} is a directory")
        return Checkpoint(path)
    if path.exists():
        raise ModelError(f"{path} is a file; give the directory that holds {CONFIG} and {WEIGHTS}")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model):
        raise ModelError(f"there is no directory {str(model)!r}, nor is it a Hub id (org/name)")
    return Checkpoint(_snapshot(model, revision))


class Checkpoint:
    """One model's files. Opening checks that every weight file is whole; tensors are read on demand.

    Attributes:
        path: the directory.
        config: ``config.json``.
        generation_config: ``generation_config.json``, or empty.
        identity: changes when the directory or a file's name, size or time of change does; no file is read
            for it.
        names: the tensors that the files hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).is_file():
            raise ModelError(f"{path} has no {CONFIG}")
        self.config = _read_json(path / CONFIG)
        has_generation = (path / GENERATION_CONFIG).is_file()
        self.generation_config = _read_json(path / GENERATION_CONFIG) if has_generation else {}
        self._files: dict[Path, Any] = {}
        self._views: dict[Path, Any] = {}
        self._opened: dict[Path, tuple[int, int, int]] = {}
        self._file_of: dict[str, Path] = {}
        self._spans: dict[Path, dict[str, tuple[int, int]]] = {}
        for file, expected in _weight_files(path):
            held = self._open(file)
            for name in sorted(held if expected is None else expected):
                if name not in held:
                    raise ModelError(f"{path / INDEX} places tensor {name!r} in {file.name}, which lacks it")
                self._file_of[name] = file
        self.names = frozenset(self._file_of)
        self.identity = _identity(path)

    def _open(self, file: Path) -> frozenset[str]:
        try:
            self._opened[file] = _inode(file)
            # Names, types and shapes need no torch, which whoever only asks workers does not import.
            self._files[file] = safe_open(str(file), framework="np")
            if "torch" in sys.modules:
                self._views[file] = safe_open(str(file), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {_what_is_cut(file) or error}") from error
        return frozenset(self._files[file].keys())

    def file(self, name: str) -> Path:
        """The file that holds a tensor, for messages."""
        if name not in self._file_of:
            raise ModelError(f"{self.path} has no tensor {name!r}")
        return self._file_of[name]

    def _handle(self, name: str) -> Any:
        file = self.file(name)
        if file not in self._files:
            raise ValueError(f"{self.path} has been closed; open it again to read {name!r}")
        return self._files[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type, "float32", "bfloat16", "float16", or another's name, from the file's header."""
        stored: str = self._handle(name).get_slice(name).get_dtype()
        return _DTYPES.get(stored, stored)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU that views the mapped file: nothing is copied, pages load when touched.

        It stays valid after `close`; it must not be written to.

        Raises:
            ModelError: no tensor was read yet, and the file is gone or another one by now.
        """
        self._handle(name)
        file = self.file(name)
        if file not in self._views:
            self._views[file] = self._view(file)
        tensor: torch.Tensor = self._views[file].get_tensor(name)
        return tensor

    def _view(self, file: Path) -> Any:
        try:
            view = safe_open(str(file), framework="pt", device="cpu")
            same = _inode(file) == self._opened[file]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read any more: {error}") from error
        if not same:
            raise ModelError(f"{file} is not what it was when the model was opened: load it again")
        return view

    def fetch(self, names: Collection[str]) -> None:
        """Have these tensors' bytes here before they are read; a directory has them all."""

    def span(self, name: str) -> tuple[Path, int, int]:
        """Where a tensor's bytes are: its file, its first byte, and the byte after its last."""
        file = self.file(name)
        return (file, *self._spans_in(file)[name])

    def descriptor(self, name: str) -> int | None:
        """A file descriptor of its own to read a tensor's bytes by, for whoever closes it.

        None where the bytes may not all be here, or the file is gone or another one by now.
        """
        file = self.file(name)
        try:
            self._spans_in(file)  # before it is compared: `span` tells of the same file
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return None
        if _inode_of(os.fstat(descriptor)) == self._opened[file]:
            return descriptor
        os.close(descriptor)
        return None

    def _spans_in(self, file: Path) -> dict[str, tuple[int, int]]:
        if file not in self._spans:
            data, header = _header(file)
            offsets = {n: entry["data_offsets"] for n, entry in header.items() if n != "__metadata__"}
            self._spans[file] = {n: (data + start, data + stop) for n, (start, stop) in offsets.items()}
        return self._spans[file]

    def files(self) -> dict[str, tuple[Path, int]]:
        """All that a copy of the model is made of, by name within the directory: JSON, templates, weights.

        With each the bytes at its start without which nothing can be read: a weight file's header, the whole
        of any other.
        """
        small = [f for f in self.path.iterdir() if f.suffix in _SMALL_SUFFIXES and f.is_file()]
        small += (self.path / _TEMPLATES).glob("*.jinja")
        heads = {file: file.stat().st_size for file in small}
        heads |= {file: _header_size(file) for file in self._file_of.values()}
        return {f.relative_to(self.path).as_posix(): (f, heads[f]) for f in sorted(heads)}

    def content(self) -> str:
        """As `identity`, but read from the files, and so the same for a copy elsewhere or of another time.

        It is made of the small files, the headers of the weight files and a page from the middle of every
        tensor: training changes a tensor all over, so that other weights do not pass for these, and a model
        of any size is read in moments.
        """
        seen, weights = sha256(), set(self._file_of.values())
        for name, (file, head) in self.files().items():
            seen.update(f"\0{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                seen.update(stream.read(head))
                for start, stop in sorted(self._spans_in(file).values()) if file in weights else ():
                    stream.seek(max(start, (start + stop - _SAMPLE) // 2))
                    seen.update(stream.read(min(_SAMPLE, stop - start)))
        return seen.hexdigest()[:32]

    def close(self) -> None:
        """Let go of the files. Tensors that were handed out keep their own mapping."""
        self._files.clear()
        self._views.clear()


def _inode(file: Path) -> tuple[int, int, int]:
    """Which file it is, whatever is written to it."""
    return _inode_of(file.stat())


def _inode_of(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size


def _weight_files(path: Path) -> Iterator[tuple[Path, frozenset[str] | None]]:
    """Each weight file with the tensors that the index places there (None: there is no index)."""
    if (path / WEIGHTS).exists():
        yield path / WEIGHTS, None
        return
    if not (path / INDEX).is_file():
        raise ModelError(_why_no_weights(path))
    placed = _read_json(path / INDEX).get("weight_map")
    if not isinstance(placed, Mapping) or not placed or not all(isinstance(f, str) for f in placed.values()):
        raise ModelError(f"{path / INDEX} has no weight_map of tensor names to file names")
    for shard in sorted(set(placed.values())):
        if Path(shard).name != shard:
            raise ModelError(f"{path / INDEX} names {shard!r}, which is not a file of its own directory")
        names = frozenset(name for name, file in placed.items() if file == shard)
        if Path(shard).suffix != ".safetensors":
            raise ModelError(f"{path / INDEX} names {shard!r}; only .safetensors files are read")
        if not (path / shard).is_file():
            raise ModelError(
                f"shard {path / shard} is missing; it holds {min(names)!r} and {len(names)} in all"
            )
        yield path / shard, names


def _why_no_weights(path: Path) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        return (
            f"{path / pickles[0]} is a pickle, which can run any code when it is loaded; daskllm reads "
            f"safetensors only: save the model again as {WEIGHTS}"
        )
    return f"{path} has neither {WEIGHTS} nor {INDEX}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def _header_size(file: Path) -> int:
    """Where the data of a safetensors file begin: a length (8 bytes, little-endian), a JSON header, the data.

    Raises:
        ModelError: the file is cut short before that.
    """
    size = file.stat().st_size
    if size < 8:
        raise ModelError(f"it is cut short ({size} bytes)")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
    if 8 + length > size:
        raise ModelError(f"it is cut short: its header alone takes {8 + length} bytes, the file has {size}")
    return 8 + int(length)


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data begin, and its header, whose ``data_offsets`` count from there."""
    data = _header_size(file)
    with file.open("rb") as stream:
        stream.seek(8)
        header = json.loads(stream.read(data - 8))
    return data, header


def _what_is_cut(file: Path) -> str | None:
    """Which tensor a file is too short for, if that is what is wrong with it."""
    try:
        data, header = _header(file)
        ends = {n: entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"}
    except ModelError as error:
        return str(error)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    size = file.stat().st_size
    cut = sorted((end, name) for name, end in ends.items() if data + end > size)
    if not cut:
        return None
    return f"it is cut short: tensor {cut[0][1]!r} ends at byte {data + cut[0][0]}, the file has {size}"


def _identity(path: Path) -> str:
    seen = sha256(str(path.resolve()).encode())
    for file in sorted(path.iterdir()):
        if file.suffix in _IDENTITY_SUFFIXES and file.is_file():
            stat = file.stat()
            seen.update(f"\0{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return seen.hexdigest()[:32]


def _snapshot(repo: str, revision: str | None) -> Path:
    # Imported here because it brings a network stack that a local directory never needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(DOWNLOADED)))
    except (OSError, HFValidationError) as error:  # the Hub's other errors and a cache miss are OSErrors
        raise ModelError(
            f"{repo!r} is not a directory here, and as a Hub id{at} it cannot be had: {error}"
        ) from error
