"""What a worker has of models' files, for itself and for workers that cannot reach them.

It owns where a process's files come from: the directory, where that is the model which was loaded, else a
copy from other workers (`daskllm.runtime.peers`); and serving both to others. A file is kept open as long as
a model of it is, so that it can be served when its directory is gone. Disks are read in threads of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from distributed.core import Status
from distributed.protocol import to_serialize

from daskllm.checkpoint import Checkpoint, open_checkpoint
from daskllm.runtime import resident
from daskllm.runtime.peers import PulledCheckpoint, Puller
from daskllm.runtime.shelf import Offer, Shelf, checksum
from daskllm.types import ModelError

if TYPE_CHECKING:
    from distributed import Worker
    from distributed.comm import Comm

    from daskllm.types import ModelSpec

__all__ = ["BlockServer", "block_server_of", "block_traffic_on"]

NAME = "daskllm-blocks"
SERVED_AT_ONCE = 4
"""Ranges that are read and sent at a time; whoever comes beyond is told to ask another."""


class BlockServer:
    """The files of one worker; made on its event loop.

    Attributes:
        served: bytes given to others.
        pulled: worker -> bytes that came from it.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.served = 0
        self.pulled: Counter[str] = Counter()
        self.closed = False
        self._whole: dict[str, Shelf] = {}
        self._copies: dict[str, tuple[Shelf, Puller]] = {}
        self._opening: Counter[str] = Counter()
        self._strangers: set[tuple[str, str]] = set()
        self._sending = 0
        self._lock = threading.Lock()
        self._copying = threading.Lock()
        self._threads = ThreadPoolExecutor(2 * SERVED_AT_ONCE, thread_name_prefix="daskllm-blocks")
        worker.handlers["daskllm_offer"] = self.offer
        worker.handlers["daskllm_read"] = self.read
        resident.use_files(self)

    # --- for this process -----------------------------------------------------------------------------

    def open(self, spec: ModelSpec) -> Checkpoint:
        """The files of a model; waits, where they must come from others.

        Raises:
            ModelError: the directory is not there, broken or another model's, and no worker has the files.
        """
        copy = self._copies.get(spec.identity)
        if copy is None:
            with self._lock:
                self._opening[spec.identity] += 1
            try:
                return self._own(spec)
            except ModelError as error:
                if not spec.identity:
                    raise
                why = error
            finally:
                with self._lock:
                    self._opening -= Counter([spec.identity])
            copy = self._copy(spec, why)
        return PulledCheckpoint(*copy, spec, lambda: self.closed)

    def release(self, identity: str) -> None:
        """Let a model's files go; a copy's directory goes with them."""
        with self._lock:
            self._whole.pop(identity, None)
            copy = self._copies.pop(identity, None)
        if copy is not None:
            copy[0].close()

    def _own(self, spec: ModelSpec) -> Checkpoint:
        """The directory's files if they are the model that was loaded; others are served them from now on."""
        try:
            checkpoint = open_checkpoint(spec.path, spec.revision)
            try:
                self._check(spec, checkpoint)
                if spec.identity:
                    self._keep(spec.identity, checkpoint)
            except BaseException:
                checkpoint.close()
                raise
            return checkpoint
        except OSError as error:
            raise ModelError(f"{spec.path} cannot be read: {error}") from error

    def _check(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        """Refuse a directory that has the path of the one that was loaded, and another content.

        A copy has other times of change, and a Hub's snapshot another path on each machine; those are the
        same where the commit is, or else the content.
        """
        if not spec.identity or checkpoint.identity == spec.identity:
            return
        if spec.revision is not None and checkpoint.path.name == spec.revision:
            return
        stranger = (spec.identity, checkpoint.identity)
        if stranger in self._strangers or not spec.content or checkpoint.content() != spec.content:
            self._strangers.add(stranger)
            raise ModelError(
                f"{checkpoint.path} on worker {self.worker.address} is not the model that was loaded: its "
                "files differ from those that the client has, or had then"
            )

    def _keep(self, identity: str, checkpoint: Checkpoint) -> None:
        with self._lock:
            held = self._whole.get(identity)
            if held is None or not held.offer():
                self._whole[identity] = Shelf.of(checkpoint)

    def _copy(self, spec: ModelSpec, why: ModelError) -> tuple[Shelf, Puller]:
        with self._copying:  # or two models of the same files would fill one directory
            if (copy := self._copies.get(spec.identity)) is not None:
                return copy
            puller = Puller(self.worker, spec, str(why), self.pulled, self._threads)
            directory = Path(self.worker.local_directory) / NAME / spec.identity
            try:
                copy = puller.copy(directory, lambda: self.closed), puller
            except ModelError as error:
                raise error from why
            with self._lock:
                self._copies[spec.identity] = copy
            return copy

    # --- for others -----------------------------------------------------------------------------------

    async def offer(self, spec: ModelSpec) -> dict[str, Any]:
        """What is here of a model's files, its directory included where this worker can reach it.

        Returns:
            "files": file -> `FileOffer`; "opening": whether this worker is about to have them.
        """
        if self._opening[spec.identity]:
            return {"opening": True}
        return {"files": to_serialize(await self._in_thread(self._offered, spec))}

    def _offered(self, spec: ModelSpec) -> Offer:
        if not self._shelves(spec.identity) and Path(spec.path).is_dir():
            try:
                self._own(spec).close()
            except (ModelError, ValueError):  # it has not what is asked for
                return {}
        found: Offer = {}
        for shelf in reversed(self._shelves(spec.identity)):
            found |= shelf.offer()
        return found

    async def read(self, comm: Comm, identity: str, file: str, start: int, stop: int) -> Status:
        """Send a range of a file's bytes with their checksum; "busy" where too many are being sent.

        What is sent counts until it has left, or a slow network would fill the memory.
        """
        if self._sending >= SERVED_AT_ONCE:
            await comm.write({"busy": True})
            return Status.dont_reply
        self._sending += 1
        try:
            content, number = await self._in_thread(self._range, identity, file, start, stop)
            if content is None:
                await comm.write({})
            else:
                array = to_serialize(np.frombuffer(content, np.uint8))
                await comm.write({"content": array, "checksum": number})
                self.served += len(content)
        finally:
            self._sending -= 1
        return Status.dont_reply

    def _range(self, identity: str, file: str, start: int, stop: int) -> tuple[bytes | None, int]:
        for shelf in self._shelves(identity):
            content = shelf.read(file, start, stop)
            if content is not None:
                return content, checksum(content)
        return None, 0

    async def close(self) -> None:
        """Let everything go because the worker goes, which calls this."""
        self.closed = True
        resident.forget_files(self)
        for identity in [*self._whole, *self._copies]:
            self.release(identity)
        self._threads.shutdown(wait=False)

    def _shelves(self, identity: str) -> list[Shelf]:
        with self._lock:
            whole, copy = self._whole.get(identity), self._copies.get(identity)
        return [shelf for shelf in (whole, copy and copy[0]) if shelf is not None]

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def block_server_of(worker: Worker) -> BlockServer:
    """The worker's files; to be called on its event loop."""
    if NAME not in worker.extensions:
        worker.extensions[NAME] = BlockServer(worker)
    return cast("BlockServer", worker.extensions[NAME])


async def block_traffic_on(dask_worker: Worker) -> dict[str, Any]:
    """Bytes "served" by a worker, and "pulled" by it from each other, for `Client.run`."""
    server = block_server_of(dask_worker)
    return {"served": server.served, "pulled": dict(server.pulled)}
