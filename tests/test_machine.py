from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from daskllm import machine

GIB = 1 << 30


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    before = machine._share
    machine.set_share(1)
    yield
    machine._share = before


def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    for name, text in files.items():
        (tmp_path / name.replace("_", ".", 1)).write_text(text + "\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)


def test_cores_are_divided_and_never_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cgroup(tmp_path, monkeypatch)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert machine.cores() == 8
    machine.set_share(3)
    assert machine.cores() == 2
    machine.set_share(100)
    assert machine.cores() == 1
    with pytest.raises(ValueError, match="processes"):
        machine.set_share(0)


@pytest.mark.parametrize(("cpu_max", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_control_group_may_grant_fewer_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu_max: str, cores: int
) -> None:
    cgroup(tmp_path, monkeypatch, cpu_max=cpu_max)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert machine.cores() == cores


def test_memory_is_the_least_of_what_allows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Machine:
        total, available = 64 * GIB, 60 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Machine)
    cgroup(tmp_path, monkeypatch, memory_max="max", memory_current="0")
    assert machine.total_memory() == 64 * GIB
    assert machine.available_memory() == 60 * GIB
    cgroup(
        tmp_path,
        monkeypatch,
        memory_max=str(8 * GIB),
        memory_current=str(6 * GIB),
        memory_stat=f"anon 1\ninactive_file {2 * GIB}",
    )
    assert machine.total_memory() == 8 * GIB
    assert machine.available_memory() == 4 * GIB
    machine.set_share(2, memory_limit=10 * GIB)
    assert machine.available_memory() == 2 * GIB
    machine.set_share(2, memory_limit=1)
    assert machine.total_memory() == 1
    assert machine.available_memory() == 0


def test_the_collector_is_as_it_was_when_the_last_block_has_ended() -> None:
    assert gc.isenabled()
    with machine.uncollected():
        with pytest.raises(ValueError, match="broken"), machine.uncollected():
            raise ValueError("broken")
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with machine.uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_made_in_the_block_can_still_be_collected() -> None:
    class Ring:
        def __init__(self) -> None:
            self.me = self

    with machine.uncollected():
        kept = weakref.ref(Ring())
        assert kept() is not None
    gc.collect()
    assert kept() is None


def test_what_somebody_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        with machine.uncollected():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_child_that_is_forked_in_the_block_collects() -> None:
    script = """
import gc, os
from daskllm import machine
with machine.uncollected():
    child = os.fork()
    if not child:
        os._exit(not gc.isenabled())
    _, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
