"""Equal rows of calls that run at the same time: one call generates them, the others wait for it.

It owns, for each session, which rows are being generated now. It refuses to know what makes two rows equal,
and it remembers nothing: what is finished is the business of `daskllm.answers`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daskllm.session import Session
    from daskllm.types import Completion

__all__ = ["Claim", "UnderWay", "under_way"]

_POLL_SECONDS = 0.25


@dataclass(eq=False, slots=True)
class Claim:
    """A row that somebody generates."""

    key: Hashable
    priority: int
    samples: Future[list[Completion] | None] = field(default_factory=Future)

    def wait(self, cancelled: Callable[[], bool]) -> list[Completion] | None:
        """Its samples once they are there; None where its owner gave it up.

        Raises:
            InterruptedError: ``cancelled`` came true meanwhile.
        """
        while True:
            try:
                return self.samples.result(_POLL_SECONDS)
            except NotYetError:
                if cancelled():
                    raise InterruptedError("the rows were cancelled") from None


class UnderWay:
    """The rows that the calls on one session generate now.

    Example:
        >>> rows = UnderWay()
        >>> mine, claim = rows.claim("row", 0)
        >>> theirs, same = rows.claim("row", 0)
        >>> mine, theirs, same is claim
        (True, False, True)
        >>> rows.settle(claim, []); same.wait(lambda: False)
        []
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: dict[Hashable, Claim] = {}

    def claim(self, key: Hashable, priority: int) -> tuple[bool, Claim]:
        """Whether the row is the caller's to generate and `settle`, or to wait for, and the claim on it.

        Nobody waits for a row that waits itself behind rows of a lower priority.
        """
        with self._lock:
            there = self._claims.get(key)
            if there is not None and there.priority >= priority:
                return False, there
            mine = self._claims[key] = Claim(key, priority)
            return True, mine

    def settle(self, claim: Claim, samples: list[Completion] | None) -> None:
        """Hand a row to all who wait for it, once; None: whoever needs it generates it."""
        with self._lock:
            if claim.samples.done():
                return
            if self._claims.get(claim.key) is claim:
                del self._claims[claim.key]
            claim.samples.set_result(samples)


_lock = threading.Lock()
_of: weakref.WeakKeyDictionary[Session, UnderWay] = weakref.WeakKeyDictionary()


def under_way(session: Session) -> UnderWay:
    """The rows of this session, and so of one version of one model."""
    with _lock:
        return _of.setdefault(session, UnderWay())
