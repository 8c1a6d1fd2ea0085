"""Starts the commands that the files under ``cluster/`` name, here and without what they are made for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent


@contextmanager
def running(command: Sequence[str], cwd: Path, **environ: str) -> Iterator[None]:
    """A command and whatever it starts, ended with the block; its messages are in ``cwd``, in ``log``."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    settings = {"PYTHONPATH": str(ROOT), "DASK_CONFIG": str(CLUSTER / "dask.yaml"), "PATH": path}
    with open(cwd / "log", "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **settings, **environ},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def here(words: Sequence[str], changes: Mapping[str, str]) -> list[str]:
    """A command with some of its parts changed, each of which it must have, run by this Python."""
    command = "\n".join(words)
    for theirs, ours in changes.items():
        assert theirs in command, f"{theirs!r} is not in {words}"
        command = command.replace(theirs, ours)
    program, *arguments = command.split("\n")
    return [str(BIN / program), *arguments]
