"""Where packed weights lie: side by side, aligned, and gone with the last of them."""

from __future__ import annotations

import gc
import os
import signal
import time
import weakref

import pytest
import torch

from daskllm.blocks import regions


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    # All of them, or what is laid after these tests would begin where models of the tests before lie.
    monkeypatch.setattr(regions, "_region", None)
    monkeypatch.setattr(regions, "_filled", 0)


def test_weights_lie_side_by_side_and_do_not_overlap() -> None:
    shapes = [(3, 5), (1,), (7, 16, 2), (64,)]
    laid = [regions.room(shape, torch.bfloat16) for shape in shapes]
    for i, one in enumerate(laid):
        assert one.shape == shapes[i]
        assert one.data_ptr() % 64 == 0
        assert not one.any()
        one.fill_(i + 1)
    for i, one in enumerate(laid):
        assert (one == i + 1).all()
    assert laid[-1].data_ptr() - laid[0].data_ptr() == 64 + 64 + 448


def test_what_does_not_fit_begins_a_region_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_REGION", 4096)
    small, large = regions.room((1024,), torch.uint8), regions.room((3 << 20,), torch.uint8)
    large.fill_(1)
    assert not small.any()
    assert large.data_ptr() % 64 == 0


def test_a_region_goes_with_the_last_that_lies_in_it() -> None:
    first, second = regions.room((8,), torch.float32), regions.room((8,), torch.float32)
    assert regions._region is not None
    region: weakref.ref[object] = regions._region
    del first
    gc.collect()
    assert region() is not None
    view = second[2:]
    del second
    gc.collect()
    assert region() is not None
    del view
    gc.collect()
    assert region() is None
    assert regions.room((8,), torch.float32).numel() == 8


def test_a_model_of_its_own_lies_beside_no_other_and_goes_with_its_last_view() -> None:
    before = regions.room((64,), torch.float32)
    memory = regions.own((4 << 20) + 100)
    assert memory.nbytes == (4 << 20) + 100
    assert not any(memory[:: 1 << 16])
    region = weakref.ref(memory.obj)
    one = torch.frombuffer(memory[4096:8192], dtype=torch.float32)
    assert one.data_ptr() % 64 == 0
    after = regions.room((64,), torch.float32)
    assert after.data_ptr() - before.data_ptr() == 256  # the region that is being filled is the same
    del memory
    gc.collect()
    assert region() is not None
    one.fill_(7)
    del one
    gc.collect()
    assert region() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_fork_has_room_though_its_parent_held_the_lock() -> None:
    with regions._lock:
        child = os.fork()
        if not child:
            regions.room((64,), torch.float32)
            os._exit(0)
    deadline = time.monotonic() + 20
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert found == (child, 0)


def test_nothing_needs_no_room() -> None:
    assert regions.room((0, 4), torch.bfloat16).shape == (0, 4)
