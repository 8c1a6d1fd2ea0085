"""What `daskllm.load` does around its model: arguments checked, a path for all, opening on workers.

It owns the messages for bad arguments. It refuses to know what an `LLM` is, and where layers go (`placing`).
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dask.utils import parse_bytes

from daskllm.checkpoint import Checkpoint
from daskllm.runtime.process import close_session_on, open_session_on, resident_bytes_on

if TYPE_CHECKING:
    from distributed import Client

    from daskllm.types import ModelSpec

__all__ = [
    "check_client",
    "check_options",
    "close_on",
    "kv_bytes",
    "open_on",
    "reachable",
    "residency_of",
    "specs_of",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_options(dtype: Any, device: Any, quantize: Any, replicas: Any) -> None:
    """Refuse values that are not among the known ones.

    Raises:
        ValueError: naming the argument and what is allowed.
    """
    for name, value, allowed in (
        ("dtype", dtype, DTYPES),
        ("device", device, DEVICES),
        ("quantize", quantize, (None,)),
        ("replicas", replicas, ("auto",)),
    ):
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            listed = " or ".join(repr(one) for one in allowed)
            raise ValueError(f"{name} must be {listed} in this version, not {value!r}")


def check_client(client: Any) -> None:
    """Refuse what is no synchronous client (TypeError, ValueError)."""
    if client is None:
        return
    from distributed import Client  # whoever has one has imported it already

    if not isinstance(client, Client):
        raise TypeError(f"client must be a distributed.Client or None, not {client!r:.80}")
    if client.asynchronous:
        raise ValueError("client must be synchronous: daskllm waits for its answers")


def kv_bytes(kv_memory: Any) -> int | None:
    """``kv_memory`` in bytes, None for "auto"; TypeError or ValueError says what is wrong with it.

    >>> kv_bytes("2 KiB")
    2048
    """
    if kv_memory == "auto":
        return None
    wanted = f'kv_memory must be "auto", bytes (at least 1) or text such as "2 GiB", not {kv_memory!r}'
    if isinstance(kv_memory, bool) or not isinstance(kv_memory, (str, Integral)):
        raise TypeError(wanted)
    try:
        size = parse_bytes(kv_memory) if isinstance(kv_memory, str) else int(kv_memory)
    except ValueError:
        raise ValueError(wanted) from None
    if size < 1:
        raise ValueError(wanted)
    return cast(int, size)


def reachable(model: str | os.PathLike[str], checkpoint: Checkpoint) -> tuple[str, str | None]:
    """Path and revision by which other processes find the same files: a Hub id keeps its present commit."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        return str(directory.resolve()), None
    commit = checkpoint.path.name
    return str(model), commit if _COMMIT.fullmatch(commit) else None


def version_here() -> str:
    """This process's version of the package, for `Client.run`."""
    # The package's root imports the rooms, so that no room may import it.
    version: str = sys.modules["daskllm"].__version__
    return version


def close_on(client: Client, spec: ModelSpec) -> None:
    """Let a model go on the client's workers, wherever its stages are by now."""
    for one in specs_of(client, spec):
        client.run(close_session_on, one)
    if spec.stages:
        from daskllm.runtime.heirs import forget

        forget(client, spec)


def specs_of(client: Client, spec: ModelSpec) -> list[ModelSpec]:
    """The specification, and those that took its place where stages were lost, the present one last."""
    if not spec.stages:
        return [spec]
    from daskllm.runtime.heirs import heirs_of

    return list(heirs_of(client, spec))


def residency_of(client: Client, spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Worker -> layer -> bytes of its weights that are held there."""
    held: dict[str, dict[str, int]] = client.run(resident_bytes_on, specs_of(client, spec)[-1])
    return held


def open_on(client: Client, spec: ModelSpec) -> None:
    """Open a model on the client's workers: on every one, or each stage on its own.

    Raises:
        RuntimeError: a worker has another version of daskllm; nothing was loaded.
        ModelError: it cannot be loaded; nothing stays on the workers where it could.
        StageLostError: a stage's worker is gone.
    """
    for worker, version in client.run(version_here).items():
        if version != version_here():
            raise RuntimeError(
                f"worker {worker} has daskllm {version}, this process {version_here()}: install one on both"
            )
    if not spec.stages:
        try:
            client.run(open_session_on, spec)
        except BaseException:
            with suppress(Exception):  # a worker that is gone holds nothing
                client.run(close_session_on, spec)
            raise
        return
    # Both need distributed, which whoever has a client has imported.
    from daskllm.runtime.remote import reach
    from daskllm.runtime.stages import StagePlugin

    reach(spec, client)
    client.register_plugin(StagePlugin())
    client.run(open_session_on, spec, workers=[spec.stages[-1].worker])
