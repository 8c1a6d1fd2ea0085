"""Where packed weights lie: side by side, aligned, and gone with the last of them."""

from __future__ import annotations

import gc
import os
import signal
import threading
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
    monkeypatch.setattr(regions, "_prepared", None)
    monkeypatch.setattr(regions, "_empty", False)


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


def test_what_was_prepared_is_filled_next_and_never_written_over() -> None:
    nbytes = 64 << 20
    regions.prepare(nbytes)
    held = [regions.room((1 << 20,), torch.uint8).fill_(7) for _ in range(64)]  # while it may be touched
    for thread in threading.enumerate():
        if thread.name == "daskllm-memory":
            thread.join(60)
            assert not thread.is_alive()
    assert held[-1].data_ptr() - held[0].data_ptr() == 63 << 20
    assert all((one == 7).all() for one in held)
    region = regions._region
    assert region is not None
    del held
    gc.collect()
    assert region() is not None
    regions.release()
    assert region() is None


def test_other_models_do_not_lie_in_what_was_prepared_for_one() -> None:
    regions.prepare(8 << 20)
    first = regions.room((64,), torch.float32)
    prepared = regions._region
    regions.release()
    other = regions.room((64,), torch.float32)
    assert prepared is not None
    assert prepared() is not None
    assert abs(other.data_ptr() - first.data_ptr()) != 256
    del first
    gc.collect()
    assert prepared() is None


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


def test_what_was_prepared_in_vain_goes() -> None:
    regions.prepare(8 << 20)
    region = regions._region
    assert region is not None
    regions.release()
    for thread in threading.enumerate():
        if thread.name == "daskllm-memory":
            thread.join(60)
    assert region() is None


def test_nothing_needs_no_room() -> None:
    assert regions.room((0, 4), torch.bfloat16).shape == (0, 4)
