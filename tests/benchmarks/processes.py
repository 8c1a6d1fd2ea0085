"""A scheduler, workers and a client as processes of their own, started again by the same command at the end.

What keeps them up is this file, as systemd or Kubernetes would; what befalls them is a function that is
called several times a second. It knows no table: it starts commands, looks at their files, and keeps the
time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

HERE = Path(__file__).resolve().parent
LOOK_SECONDS = 0.1
REST_SECONDS = 0.5
"""Between an end and the next start, so that a command that cannot start does not take the machine."""


class Process:
    """A command that is started again whenever it has ended.

    Attributes:
        starts: how often it was started.
        codes: the exit statuses of those that ended.
    """

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]) -> None:
        self.command, self.log, self.env = list(command), log, env
        self.starts = 0
        self.codes: list[int] = []
        self.start()

    def start(self) -> None:
        """Start it; its output goes behind that of earlier ones."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,
            )
        self.starts += 1
        self._ended = 0.0

    @property
    def pid(self) -> int:
        """Of the one that runs, or ran last."""
        return self._process.pid

    def ended(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def tend(self) -> None:
        """Start it again where it has ended."""
        code = self._process.poll()
        if code is None:
            return
        if not self._ended:
            self._ended = time.monotonic()
            self.codes.append(code)
            self._clear()
        elif time.monotonic() - self._ended > REST_SECONDS:
            self.start()

    def kill(self) -> None:
        """SIGKILL for it alone; what it has started finds out by itself."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it and all that it has started."""
        self._clear()
        self._process.wait()

    def _clear(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


@dataclass
class Run:
    """A job under way.

    Attributes:
        place: a directory of its own: logs, and what the workers write down.
        output: the directory of its parts.
        scheduler, workers, client: the processes.
        begun: when the client was started first, by the monotonic clock.
        faults: (seconds since then, what was done) in order.
    """

    place: Path
    output: Path
    scheduler: Process
    workers: list[Process]
    client: Process
    begun: float
    faults: list[tuple[float, str]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Since the client was started first."""
        return time.monotonic() - self.begun

    def note(self, fault: str) -> None:
        """Write down that something was done to it."""
        self.faults.append((round(self.seconds, 1), fault))

    def parts(self) -> tuple[int, int]:
        """How many parts are there, and of how many; of 0 before the job says so."""
        there = len(list(self.output.glob("part.*")))
        with suppress(OSError, ValueError, LookupError):
            return there, int(json.loads((self.output / "_daskllm.json").read_text())["parts"])
        return there, 0

    def rows_made(self) -> int:
        """Rows that the workers' engines have finished so far."""
        return rows_made(self.place)[0]

    def worker_pids(self) -> list[int]:
        """The workers' own processes that are up, not those of their nannies."""
        return [int(path.name) for path in self.place.glob("pids/*") if _runs(int(path.name))]

    def working_pids(self) -> list[int]:
        """Those of them that have finished rows."""
        return [pid for pid in self.worker_pids() if (self.place / "rows" / str(pid)).exists()]


def _runs(pid: int) -> bool:
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def rows_made(place: Path) -> tuple[int, int]:
    """Rows that engines have finished, and their tokens, however many of the engines were killed since."""
    rows = tokens = 0
    for path in place.glob("rows/*"):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # the last line of one that was killed
                made, of = map(int, line.split())
                rows, tokens = rows + made, tokens + of
    return rows, tokens


@contextmanager
def running(
    place: Path,
    command: Sequence[str],
    output: Path,
    workers: int,
    env: dict[str, str],
    preload: Sequence[str],
) -> Iterator[Run]:
    """A scheduler and workers, and then a client that has ``{scheduler}`` in its command filled in.

    Args:
        preload: files that the workers' processes run first, such as ``count_rows.py``.
    """
    place.mkdir(parents=True)
    for name in ("pids", "rows"):
        (place / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DASKLLM_PLACE": str(place), **env}
    dask = [sys.executable, "-m", "dask"]
    started: list[Process] = []

    def start(name: str, command: Sequence[str]) -> Process:
        started.append(Process(command, place / f"{name}.log", known))
        return started[-1]

    try:
        scheduler = [*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
        heads = start("scheduler", scheduler)
        worker = [*dask, "worker", address, "--nanny", "--nthreads", "2", "--memory-limit", "0"]
        worker += ["--no-dashboard", "--local-directory", str(place / "scratch")]
        worker += [word for file in preload for word in ("--preload", str(HERE / file))]
        hands = [start(f"worker-{i}", worker) for i in range(workers)]
        until(lambda: len(list(place.glob("pids/*"))) >= workers, 60, "workers that start")
        client = start("client", [word.replace("{scheduler}", address) for word in command])
        yield Run(place, output, heads, hands, client, time.monotonic())
    finally:
        for one in reversed(started):
            one.stop()


def to_the_end(run: Run, disturb: Callable[[Run], None], limit: float) -> float:
    """Keep all processes up until the client has ended well; the seconds that it took.

    Raises:
        TimeoutError: it took longer than ``limit``; the message ends with what the client said last.
    """
    while run.client.ended() != 0:
        if run.seconds > limit:
            said = (run.place / "client.log").read_text(errors="replace")[-2000:]
            raise TimeoutError(f"the job has not ended after {limit:.0f} s; faults: {run.faults}; {said}")
        for one in (run.scheduler, *run.workers, run.client):
            one.tend()
        disturb(run)
        time.sleep(LOOK_SECONDS)
    return run.seconds


def until(what: Callable[[], bool], seconds: float, named: str) -> None:
    """Wait until ``what()`` holds.

    Raises:
        TimeoutError: it did not within so many seconds.
    """
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {named}")
        time.sleep(LOOK_SECONDS)


def differences(table: pd.DataFrame, expected: pd.DataFrame) -> dict[str, int]:
    """How a table differs from the one that it should be; both have the column ``id``.

    >>> one = pd.DataFrame({"id": [1, 2, 3], "text": list("abc")})
    >>> differences(pd.DataFrame({"id": [1, 1, 2], "text": list("aax")}), one)
    {'lost': 1, 'doubled': 1, 'changed': 1, 'out_of_place': 1}
    """
    ids = table["id"]
    first = table[~ids.duplicated()].set_index("id")
    due = expected.set_index("id")
    both = due.index.intersection(first.index)
    ours, theirs = first.loc[both, list(due.columns)], due.loc[both]
    same = (ours == theirs) | (ours.isna() & theirs.isna())
    return {
        "lost": len(due.index.difference(first.index)),
        "doubled": int(ids.duplicated().sum()),
        "changed": int((~same.all(axis=1)).sum()),
        "out_of_place": int(ids.tolist() != expected["id"].tolist()),
    }


def last_json(log: Path) -> dict[str, Any]:
    """The JSON of the last line of a log."""
    return dict(json.loads(log.read_text().strip().splitlines()[-1]))
