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

from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.models import DecoderConfig, describe, sources
from daskllm.runtime.process import close_idle_on, close_session_on, open_session_on, resident_bytes_on
from daskllm.runtime.resident import open_files
from daskllm.types import ModelError, ModelSpec

if TYPE_CHECKING:
    from distributed import Client, Scheduler

__all__ = [
    "check_client",
    "check_cluster",
    "check_options",
    "close_on",
    "expect_losses",
    "files_of",
    "keep_on",
    "kv_bytes",
    "leave_on",
    "let_go_on",
    "open_on",
    "reachable",
    "residency_of",
    "specify",
    "specs_of",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZE = (None, "int8")
KV_DTYPES = ("auto", "int8")
ALLOWED_FAILURES = 20
"""How many workers may die while a task is theirs before Dask calls it the cause (``KilledWorker``).

Dask's own 3 is for tasks of seconds. Ours last for minutes and a worker holds several: where one of three
workers dies every few seconds, every task that lasts is on a third of those that die. In a minute's job that
often passes 3 and never 20. A row that does kill its worker each time still ends its job, after 21 restarts.
"""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_options(dtype: Any, device: Any, quantize: Any, kv_dtype: Any = "auto") -> None:
    """Refuse values that are not among the known ones.

    Raises:
        ValueError: naming the argument and what is allowed.
    """
    for name, value, allowed in (
        ("dtype", dtype, DTYPES),
        ("device", device, DEVICES),
        ("quantize", quantize, QUANTIZE),
        ("kv_dtype", kv_dtype, KV_DTYPES),
    ):
        if not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
            listed = " or ".join(repr(one) for one in allowed)
            raise ValueError(f"{name} must be {listed} in this version, not {value!r}")
    for name, value in (("quantize", quantize), ("kv_dtype", kv_dtype)):
        if device == "cuda" and value == "int8":
            raise ValueError(f'{name}="{value}" is for CPUs in this version: device="cuda" cannot have it')


def check_client(client: Any) -> None:
    """Refuse what is no synchronous client (TypeError, ValueError)."""
    if client is None:
        return
    from distributed import Client  # whoever has one has imported it already

    if not isinstance(client, Client):
        raise TypeError(f"client must be a distributed.Client or None, not {client!r:.80}")
    if client.asynchronous:
        raise ValueError(
            "client must be synchronous; with an asynchronous one, await daskllm.load_async(...)"
        )


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


def specify(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    kv_dtype: str = "auto",
    revision: str | None = None,
    kv_memory: int | str = "auto",
    with_content: bool = True,
) -> tuple[ModelSpec, DecoderConfig]:
    """A model's specification and description, from its small files and its weight files' headers.

    Args:
        with_content: read what tells its files from others under the same path, too.

    Others, raises: as `daskllm.load`.
    """
    check_options(dtype, device, quantize, kv_dtype)
    memory = kv_bytes(kv_memory)
    checkpoint = open_checkpoint(model, revision)
    try:
        config = describe(checkpoint.config)
        sources(config, checkpoint.names)
        path, commit = reachable(model, checkpoint)
        spec = ModelSpec(
            path=path,
            revision=commit,
            dtype=dtype,
            device=device,
            quantize=quantize,
            kv_dtype=kv_dtype,
            kv_memory=memory,
            identity=checkpoint.identity,
            content=checkpoint.content() if with_content else "",
        )
    finally:
        checkpoint.close()
    return spec, config


def files_of(spec: ModelSpec) -> Checkpoint:
    """A model's files in this process; in a client's that cannot reach them, those that its workers have.

    Raises:
        ModelError: they are not here, and there is no client or none of its workers has them.
    """
    try:
        return open_files(spec)
    except ModelError as error:
        if not spec.identity or "distributed" not in sys.modules:
            raise
        why = error
    from daskllm.runtime.peers import borrowed
    from daskllm.runtime.remote import node_for

    try:
        node = node_for(spec)
    except ValueError:
        raise why from None
    return borrowed(node, spec, str(why))


def check_cluster(client: Client) -> None:
    """Refuse a cluster that has another daskllm than this process; see `install.check_versions`."""
    from daskllm.runtime.install import check_versions  # distributed, which whoever has a client has imported

    check_versions(client)


def keep_on(client: Client, spec: ModelSpec) -> None:
    """Hold a lease on a model for as long as the client is there; see `leases`."""
    from daskllm.runtime.leases import keep

    keep(client, spec)


def leave_on(client: Client, spec: ModelSpec) -> bool:
    """Give the client's lease back; whether nobody else has one."""
    from daskllm.runtime.leases import leave

    return leave(client, spec)


def let_go_on(client: Client, spec: ModelSpec) -> None:
    """Close a model on the client's workers that have no rows of it; others are told by its lease, later."""
    for one in specs_of(client, spec):
        client.run(close_idle_on, one, 0.0)
    _forget_heirs(client, spec)


def close_on(client: Client, spec: ModelSpec) -> None:
    """Let a model go on the client's workers, wherever its stages are by now."""
    for one in specs_of(client, spec):
        client.run(close_session_on, one)
    _forget_heirs(client, spec)


def _forget_heirs(client: Client, spec: ModelSpec) -> None:
    if spec.chains:
        from daskllm.runtime.heirs import forget

        forget(client, spec)


def specs_of(client: Client, spec: ModelSpec) -> list[ModelSpec]:
    """The specification, and those that took its place where stages were lost, the present one last."""
    if not spec.chains:
        return [spec]
    from daskllm.runtime.heirs import heirs_of

    return list(heirs_of(client, spec))


def residency_of(client: Client, spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Worker -> layer -> bytes of its weights that are held there."""
    held: dict[str, dict[str, int]] = client.run(resident_bytes_on, specs_of(client, spec)[-1])
    return held


def expect_losses(dask_scheduler: Scheduler) -> None:
    """Let a scheduler blame a task after `ALLOWED_FAILURES` losses; a higher setting stays. For `Client`."""
    dask_scheduler.allowed_failures = max(dask_scheduler.allowed_failures, ALLOWED_FAILURES)


def open_on(client: Client, spec: ModelSpec) -> None:
    """Open a model on the client's workers: on every one, or each stage of each chain on its own.

    From then on the scheduler bears more losses of workers; see `ALLOWED_FAILURES`.

    Raises:
        ModelError: it cannot be loaded; nothing stays on the workers where it could.
        StageLostError: a stage's worker is gone.
    """
    # All need distributed, which whoever has a client has imported.
    from daskllm.runtime.durations import learn_durations
    from daskllm.runtime.remote import reach
    from daskllm.runtime.stages import StagePlugin

    if spec.chains:
        reach(spec, client)
    client.run_on_scheduler(expect_losses)
    client.run_on_scheduler(learn_durations)
    client.register_plugin(StagePlugin())
    engines = [chain.stages[-1].worker for chain in spec.chains]
    try:
        client.run(open_session_on, spec, workers=engines or None)
    except BaseException:
        with suppress(Exception):  # a worker that is gone holds nothing
            client.run(close_session_on, spec)
        raise
