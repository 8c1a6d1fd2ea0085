"""Machine code of the kernels, compiled once on a machine and kept between processes.

`code` is written for Numba. What is kept of it is plain machine code, which is put back into memory by
llvmlite alone: importing Numba and having it find a function in its own cache takes a third of a second, more
than copying a small model's weights, and a tenth of a gigabyte.

A directory holds the code of one version of these sources for one kind of CPU, a file each kernel's: the
SHA-256 of what follows, then an object file. A file that is not whole is written again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from daskllm.engine.sizes import BLOCK_SIZE, SCALE_BYTES, TILE

__all__ = ["Kernel", "Loaded", "kept"]

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_OUTSIDE = frozenset({"memcpy", "memmove", "memset", "sqrtf"} | {f"memset_pattern{n}" for n in (4, 8, 16)})
"""What compiled code may call, of the C library; the last are macOS's."""
_NOT_CODE = ("NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS")
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A kernel in memory.

    Attributes:
        address: of the function.
        call: runs it on this thread, with what lies at an address.
    """

    address: int
    call: Callable[[int], None]
    _engine: Any  # owns the memory


class Kernel:
    """A C function of one pointer, to its int64 arguments.

    It is taken from where it is kept, or compiled, when it is first asked for: a model runs a few of all.

    Attributes:
        module: of `code`, where it is written.
        name: of the function there.
        was_compiled: by this process, which found none that was kept.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name, self.was_compiled = module, name, False
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None

    def __repr__(self) -> str:
        return f"Kernel({self.module!r}, {self.name!r})"

    def load(self) -> Loaded:
        """Have it in memory."""
        if self._loaded is None:
            with self._lock:
                if self._loaded is None:
                    self._loaded = self._linked()
        return self._loaded

    def find(self) -> Loaded | None:
        """As `load`, where it has been compiled before; else None."""
        path = self._path()
        if self._loaded is None and (path is None or _read(path) is None):
            return None
        return self.load()

    def _path(self) -> Path | None:
        directory = kept()
        return None if directory is None else directory / f"{self.module}.{self.name}"

    def _linked(self) -> Loaded:
        symbol = f"daskllm_{self.module}_{self.name}"
        path = self._path()
        found = None if path is None else _read(path)
        self.was_compiled = found is None
        if found is None:
            function = getattr(importlib.import_module(f"{__package__}.code.{self.module}"), self.name)
            found = _compile(function, symbol)
            if path is not None:
                _write(path, found)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
        engine.add_object_file(llvm.ObjectFileRef.from_data(found))
        engine.finalize_object()
        address = engine.get_function_address(symbol)
        return Loaded(address, _FUNCTION(address), engine)


@functools.cache
def kept() -> Path | None:
    """The directory for this version of the kernels on this kind of CPU; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        return None
    sources = sorted([_HERE / "fields.py", _HERE / "registers.py", *(_HERE / "code").glob("*.py")])
    about = (
        *sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("NUMBA_") and k not in _NOT_CODE),
        *(version(name) for name in ("numba", "llvmlite")),
        *(llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()),
        *(BLOCK_SIZE, TILE, SCALE_BYTES),
    )
    digest = hashlib.sha256(repr(about).encode())
    for source in (Path(__file__), *sources):
        digest.update(source.name.encode() + source.read_bytes())
    return Path(cache, "daskllm", "kernels", digest.hexdigest()[:20])


def _read(path: Path) -> bytes | None:
    """What was kept, None where there is nothing, not all of it, or another user's: it will be run."""
    try:
        with path.open("rb") as file:
            if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid not in (os.getuid(), 0):
                return None
            whole = file.read()
    except OSError:
        return None
    return whole[32:] if hashlib.sha256(whole[32:]).digest() == whole[:32] else None


def _write(path: Path, code: bytes) -> None:
    """Keep it, all or nothing: other processes read and write here too."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as apart:
            whole = Path(apart, path.name)
            whole.write_bytes(hashlib.sha256(code).digest() + code)
            whole.replace(path)
    except OSError as error:
        logger.warning("kernels are compiled in each process, since %s cannot be written: %s", path, error)


def _target() -> Any:
    """This machine, for one use: what takes it owns it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        jit=True,
    )


def _compile(function: Callable[[Any], None], symbol: str) -> bytes:
    """An object file of a kernel that needs nothing but the C library.

    Numba leaves a way out for errors at each call. Where all functions are local, LLVM sees that none is ever
    taken, and what they would need of Python goes.
    """
    import numba  # only here and in `code`

    signature = numba.void(numba.types.CPointer(numba.int64))
    made = numba.cfunc(signature, error_model="numpy", boundscheck=False)(function)
    module = llvm.parse_assembly(made.inspect_llvm())
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != made.native_name:
            value.linkage = llvm.Linkage.internal
    module.get_function(made.native_name).name = symbol
    passes = llvm.create_new_module_pass_manager()
    for _ in range(2):
        passes.add_ipsccp_pass()
        passes.add_simplify_cfg_pass()
        passes.add_instruction_combine_pass()
        passes.add_dead_arg_elimination_pass()
        passes.add_global_opt_pass()
        passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    target = _target()
    passes.run(module, llvm.create_pass_builder(target, llvm.PipelineTuningOptions(speed_level=3)))
    called = {each.name for each in module.functions if each.is_declaration}
    foreign = sorted(name for name in called - _OUTSIDE if not name.startswith("llvm."))
    if foreign:
        raise RuntimeError(f"the kernel {function.__name__} may raise or allocate: it calls {foreign}")
    return bytes(target.emit_object(module))
