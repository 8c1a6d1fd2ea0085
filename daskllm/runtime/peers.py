"""A model's files from the workers that have them, for a process that cannot reach its directory.

What is brought is a copy of the directory in a local place, in which only those tensors have bytes whose
layers are held here; the rest of the house maps and reads it as any other directory. Each range of bytes
comes straight from one of the workers that have it, the less busy ones first, and those that are being filled
themselves are among them: many that join together do not all pull from one. It owns whom to ask, and what is
done when somebody does not answer or answers wrongly. The other end is `daskllm.runtime.blockserver`.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from distributed.protocol import to_serialize

from daskllm.checkpoint import Checkpoint
from daskllm.runtime.shelf import FileOffer, Shelf, checksum
from daskllm.runtime.wire import Node, ask
from daskllm.types import ModelError, ModelSpec, StageLostError

__all__ = ["PulledCheckpoint", "Puller", "borrowed"]

RANGE_BYTES = 8 << 20
"""The most that is asked for at once: long beside a round trip, short beside a layer."""
PULLS_AT_ONCE = 4
"""Ranges that one process asks for at a time."""
OFFER_SECONDS = 5.0
"""How long a worker may take to say what it has."""
READ_SECONDS = 60.0
"""How long a range may take; what is silent for so long is gone."""
FRESH_SECONDS = 1.0
"""How long what workers said that they have is good for; those being filled have more each second."""
_TRIES = 2
"""How often a range is asked of a worker that failed to give it."""
_LOOK_SECONDS = 0.25
"""How often a thread that waits for bytes looks whether they are still wanted."""

T = TypeVar("T")


@dataclass(eq=False)
class _Want:
    """A range that is to come, and what happened so far.

    Attributes:
        what: it is a part of, for messages.
        failed: worker -> how often it did not give it.
        looked: whether everybody was asked again since nobody had it.
    """

    what: str
    file: str
    start: int
    stop: int
    failed: Counter[str] = field(default_factory=Counter)
    looked: bool = False


class Puller:
    """Brings one model's bytes into this process; its methods wait, and are not for the event loop.

    Args:
        node: a worker or client, by whose connections the bytes come.
        why: what is wrong with the directory here, for messages.
        pulled: worker -> bytes that came from it; counted up.
        threads: for writing to disk; None takes the event loop's own.
    """

    def __init__(
        self, node: Node, spec: ModelSpec, why: str, pulled: Counter[str], threads: Executor | None = None
    ) -> None:
        self._node, self._spec, self._why = node, spec, why
        self._pulled, self._threads = pulled, threads
        self._offers: dict[str, Mapping[str, FileOffer]] = {}
        self._asked: dict[str, str] = {}
        self._asked_at = float("-inf")
        self._expected = False
        self._asking = asyncio.Lock()
        self._under_way: Counter[str] = Counter()
        self._random = random.Random()  # joiners must differ, whatever the user seeds
        self._one = threading.Lock()

    def copy(self, directory: Path, unwanted: Callable[[], bool]) -> Shelf:
        """A copy of the files in ``directory``, of which only the small ones and the headers are there.

        Args:
            unwanted: asked a few times a second; True gives up, with a ModelError.

        Raises:
            ModelError: no worker has them.
        """
        found = self._wait(self._listed(), unwanted)
        try:
            shelf = Shelf.empty(directory, found)
        except OSError as error:
            raise ModelError(f"{directory} cannot be filled with {self._spec.path}: {error}") from error
        try:
            heads = [(name, name, 0, one.head) for name, one in found.items()]
            self.fill(shelf, heads, unwanted)
        except BaseException:
            shelf.close()
            raise
        return shelf

    def fill(
        self, shelf: Shelf, spans: Sequence[tuple[str, str, int, int]], unwanted: Callable[[], bool]
    ) -> None:
        """Bring what is not there yet of some spans.

        Args:
            spans: what it is, for messages; file, first byte, end.
            unwanted: see `copy`.

        Raises:
            ModelError: no worker has some bytes, or the disk cannot take them.
        """
        with self._one:  # two models on the same files would bring the same bytes twice
            wants = [
                _Want(what, file, low, min(low + RANGE_BYTES, stop))
                for what, file, start, stop in spans
                for low in range(start, stop, RANGE_BYTES)
            ]
            wants = [want for want in wants if not shelf.covers(want.file, want.start, want.stop)]
            if wants:
                self._random.shuffle(wants)
                self._wait(self._fill(shelf, wants), unwanted)

    def _wait(self, coroutine: Coroutine[Any, Any, T], unwanted: Callable[[], bool]) -> T:
        """The result of what runs on the event loop, for a thread that may be told to give up."""
        loop = self._node.loop.asyncio_loop
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            while True:
                if wait([future], _LOOK_SECONDS).done:
                    return future.result()
                if unwanted() or loop.is_closed():
                    raise ModelError(f"{self._spec.path} was closed while its files were being copied")
        finally:
            future.cancel()

    # --- on the event loop ----------------------------------------------------------------------------

    async def _listed(self) -> dict[str, FileOffer]:
        """The files of the model as anybody has them."""
        await self._ask_all(anew=True)
        while self._expected and not self._offers:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._ask_all(anew=True)
        if not self._offers:
            raise self._nobody(f"{self._spec.path} cannot be copied")
        listed: dict[str, FileOffer] = {}
        for offer in self._offers.values():
            listed = {**offer, **listed}
        return listed

    async def _fill(self, shelf: Shelf, wants: list[_Want]) -> None:
        takers = [asyncio.ensure_future(self._take(shelf, wants)) for _ in range(PULLS_AT_ONCE)]
        try:
            await asyncio.gather(*takers)
        finally:
            for taker in takers:
                taker.cancel()

    async def _take(self, shelf: Shelf, wants: list[_Want]) -> None:
        while wants:
            want = wants.pop()
            while (content := await self._bring(want)) is None:
                pass
            try:
                await self._in_thread(shelf.write, want.file, want.start, content)
            except OSError as error:
                raise ModelError(f"{shelf.directory}: {want.what} cannot be written: {error}") from error

    async def _bring(self, want: _Want) -> memoryview | None:
        """A range from the least busy worker that has it; None where it is to be tried again."""
        if asyncio.get_running_loop().time() > self._asked_at + FRESH_SECONDS:
            await self._ask_all()
        busy: set[str] = set()
        while holders := [a for a in self._offers if self._gives(a, want) and a not in busy]:
            address = min(
                holders, key=lambda a: (self._under_way[a], self._whole(a, want), self._random.random())
            )
            self._under_way[address] += 1
            try:
                reply = await self._read(address, want)
            finally:
                self._under_way[address] -= 1
            if isinstance(reply, memoryview):
                self._pulled[address] += len(reply)
                return reply
            if reply is None:
                busy.add(address)
                continue
            want.failed[address] += 1
            self._offers.pop(address, None)
            self._asked[address] = reply
        if busy:
            await asyncio.sleep(self._random.uniform(0.005, 0.05))
        elif want.looked:
            raise self._nobody(f"{want.what} (bytes {want.start} to {want.stop} of {want.file}) is missing")
        else:
            await self._ask_all(anew=True)
            want.looked = not self._expected
            if self._expected:
                await asyncio.sleep(_LOOK_SECONDS)
        return None

    def _gives(self, address: str, want: _Want) -> bool:
        offer = self._offers[address].get(want.file)
        return offer is not None and want.failed[address] < _TRIES and offer.covers(want.start, want.stop)

    def _whole(self, address: str, want: _Want) -> bool:
        """Whether a worker has all of a file; one that is being filled goes first, to spare those."""
        return self._offers[address][want.file].have is None

    async def _read(self, address: str, want: _Want) -> memoryview | str | None:
        """A range from a worker; None where it is busy, else what went wrong."""
        request = {"identity": self._spec.identity, "file": want.file, "start": want.start, "stop": want.stop}
        try:
            reply = await asyncio.wait_for(ask(self._node, address, "read", **request), READ_SECONDS)
            if reply.get("busy"):
                return None
            if "content" not in reply:
                return "has it no more"
            content = memoryview(reply["content"]).cast("B")
            whole = len(content) == want.stop - want.start
            if whole and await self._in_thread(checksum, content) == reply["checksum"]:
                return content
            return "sent other bytes than it meant to"
        except (StageLostError, TimeoutError):
            return "is gone"
        except Exception as error:  # whatever a worker answers, another may answer better
            return f"answered with {error!r:.200}"

    async def _ask_all(self, anew: bool = False) -> None:
        """Ask all workers what they have, and whether they are about to have more."""
        loop = asyncio.get_running_loop()
        called = loop.time()
        async with self._asking:
            if self._asked_at > called or (not anew and loop.time() < self._asked_at + FRESH_SECONDS):
                return  # another asked meanwhile
            workers = list((await self._node.scheduler.identity())["workers"])
            replies = await asyncio.gather(*map(self._offer, workers))
            given = dict(zip(workers, replies, strict=True))
            self._offers = {a: reply["files"] for a, reply in given.items() if reply.get("files")}
            self._asked = {
                a: self._asked[a] if a in self._asked and a not in self._offers else "has it not"
                for a in (*self._asked, *workers)
            }
            self._asked_at = loop.time()
            self._expected = any(reply.get("opening") for reply in replies)

    async def _offer(self, address: str) -> Mapping[str, Any]:
        try:
            asked = ask(self._node, address, "offer", spec=to_serialize(self._spec))
            reply: Mapping[str, Any] | None = await asyncio.wait_for(asked, OFFER_SECONDS)
        except Exception:  # it is gone, or does not serve: it has nothing to give
            reply = None
        return reply or {}

    def _nobody(self, what: str) -> ModelError:
        asked = "; ".join(f"{address} {said}" for address, said in sorted(self._asked.items()))
        return ModelError(f"{self._why}; and from other workers {what}: {asked or 'there is none'}")

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


class PulledCheckpoint(Checkpoint):
    """A copy whose tensors come from other workers when they are first asked for.

    Args:
        shelf: the copy, with its headers.
        spec: of the model; the copy has the identity of the directory that it is of.
        unwanted: True when nothing more is to be brought.
    """

    def __init__(
        self, shelf: Shelf, puller: Puller, spec: ModelSpec, unwanted: Callable[[], bool] = lambda: False
    ) -> None:
        assert shelf.directory is not None
        self._shelf, self._puller, self._unwanted = shelf, puller, unwanted
        self._closed = False
        super().__init__(shelf.directory)
        self.identity = spec.identity

    def fetch(self, names: Collection[str]) -> None:
        """Bring the bytes of these tensors that are not here yet.

        Raises:
            ModelError: no worker has them; the message says which tensor, and who was asked.
        """
        spans = [(name, *self.span(name)) for name in names]
        wanted = [(f"tensor {name!r}", file.name, start, stop) for name, file, start, stop in spans]
        self._puller.fill(self._shelf, wanted, lambda: self._closed or self._unwanted())

    def descriptor(self, name: str) -> None:
        """See `Checkpoint.descriptor`. What was never brought would read as zeros."""

    def tensor(self, name: str) -> Any:
        """See `Checkpoint.tensor`. What was never brought would read as zeros, so it is brought now."""
        self.fetch([name])
        # A page that nobody has written to through the mapping is the file's own, as it is by now.
        return super().tensor(name)

    def close(self) -> None:
        """See `Checkpoint.close`; who waits for bytes is told that they are not wanted any more."""
        self._closed = True
        super().close()


def borrowed(node: Node, spec: ModelSpec, why: str) -> PulledCheckpoint:
    """A model's files in a temporary directory, for as long as somebody has what is returned.

    Args:
        why: what is wrong with the directory here, for messages.

    Raises:
        ModelError: no worker has them.
    """
    directory = Path(tempfile.mkdtemp(prefix="daskllm-"))
    puller = Puller(node, spec, why, Counter())
    try:
        copy = PulledCheckpoint(puller.copy(directory, lambda: False), puller, spec)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(copy, shutil.rmtree, directory, ignore_errors=True)
    return copy
