"""Waiting for what other threads and processes bring about, in all tests the same way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["eventually"]

SECONDS = 120.0
"""Far more than anything takes: what never comes is to fail, and a slow machine is not."""


def eventually(true: Callable[[], Any]) -> Any:
    """What ``true()`` gives, once that is true; fails when it never is.

    Example:
        >>> eventually(lambda: "there")
        'there'
    """
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return found
