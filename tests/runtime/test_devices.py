"""What is measured of live workers: kept once, the same for those that are alike, given to the planner."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import Client

from daskllm.graph import Link
from daskllm.runtime import devices
from daskllm.runtime.devices import Rate, Speeds, kind, measured_speeds, recorded_speeds, rounded
from daskllm.runtime.placing import cluster_of, live_cluster


def facts(host: str, nthreads: int = 1, **resources: float) -> dict[str, Any]:
    return {"host": host, "nthreads": nthreads, "resources": resources, "memory_limit": 10**9}


class Measured:
    """A client whose workers' measurements are foretold; it keeps the record and counts what was run."""

    def __init__(self, workers: dict[str, dict[str, Any]], rates: dict[str, Rate]) -> None:
        self.workers, self.rates = workers, rates
        self.record: Any = None
        self.turns: list[list[str]] = []
        self.links: list[tuple[str, str]] = []

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": self.workers}

    def register_plugin(self, plugin: Any) -> None:
        pass

    def get_metadata(self, keys: list[str], default: Any) -> Any:
        return self.record

    def set_metadata(self, keys: list[str], value: Any) -> None:
        self.record = value

    def run(self, function: Any, *arguments: Any, workers: list[str]) -> dict[str, Any]:
        if function is devices.time_device_on:
            self.turns.append(workers)
            return {worker: self.rates[worker] for worker in workers}
        assert function is devices.time_link_on
        (source,) = workers
        self.links.append((source, arguments[0]))
        near = self.workers[source]["host"] == self.workers[arguments[0]]["host"]
        return {source: Link(1.04e-4, 2.51e9) if near else Link(3e-3, 1e8)}


def test_workers_that_are_alike_count_as_equal_and_noise_is_rounded_away() -> None:
    workers = {f"w{i}": facts("h") for i in range(5)} | {"x": facts("h", 4), "y": facts("k"), "z": facts("k")}
    rates = dict.fromkeys(workers, Rate(1.04e11, 2.04e10))
    rates |= {"w0": Rate(1.01e11, 9.9e10), "w1": Rate(3.3e10, 1.96e10), "x": Rate(4e11, 5e10)}
    client: Any = Measured(workers, rates)
    speeds = measured_speeds(client, "float32")
    assert speeds.rate(workers["w4"]) == Rate(1.0e11, 2.0e10)  # the median of the first three
    assert speeds.rate(workers["w0"]) == speeds.rate(workers["w4"])
    assert speeds.rate(workers["x"]) == Rate(4e11, 5e10)
    # One worker at a time on a host, hosts beside each other, a few of a kind.
    assert client.turns == [["w0", "y"], ["w1", "z"], ["w2"], ["x"]]
    assert speeds.link(workers["w0"], workers["w4"]) == Link(1.0e-4, 2.5e9)
    assert speeds.link(workers["w0"], workers["z"]) == speeds.link(workers["z"], workers["w0"])
    assert len(client.links) == 3 + 1 + 2


def test_what_is_on_record_is_not_measured_again() -> None:
    workers = {"a": facts("h"), "b": facts("h")}
    client: Any = Measured(workers, dict.fromkeys("abcd", Rate(1e11, 2e10)))
    first = measured_speeds(client, "float32")
    del workers["a"]
    workers["c"] = facts("h")  # as a nanny starts another in the place of one
    client.turns, client.links = [], []
    assert measured_speeds(client, "float32") == first
    assert (client.turns, client.links) == ([], [])
    workers["d"] = facts("h", gpu=1)
    assert measured_speeds(client, "float32").rates.keys() > first.rates.keys()
    assert client.turns == [["d"]]


def test_only_some_pairs_of_many_workers_are_measured() -> None:
    workers = {f"w{i:02}": facts(f"h{i // 2:02}") for i in range(40)}
    client: Any = Measured(workers, dict.fromkeys(workers, Rate(1e11, 2e10)))
    speeds = measured_speeds(client, "float32")
    assert len(client.links) == len(set(client.links)) == devices._PAIRS
    # Those that were left out are like the others of their sort.
    assert speeds.link(workers["w38"], workers["w39"]) == Link(1.0e-4, 2.5e9)
    assert speeds.link(workers["w00"], workers["w39"]) == Link(3e-3, 1e8)
    client.links = []
    assert measured_speeds(client, "float32") == speeds
    assert client.links == []


def test_the_planner_sees_what_was_measured() -> None:
    workers = {"a": facts("h"), "b": facts("h"), "c": facts("k", 2)}
    near, far = Link(1e-4, 2e9), Link(3e-3, 1e8)
    gpu = Rate(1e14, 2e12, memory=80 * 10**9)
    speeds = Speeds({kind(facts("h")): gpu}, {"h h": near, "h k": far})
    cluster = cluster_of(workers, speeds=speeds)
    assert [(d.flops, d.memory) for d in cluster.devices[:2]] == [(1e14, 80 * 10**9)] * 2
    assert cluster.devices[2].flops == cluster_of(workers).devices[2].flops  # what nobody measured is usual
    assert cluster.between("a", "b") == near
    assert cluster.between("a", "c") == cluster.between("c", "b") == far
    assert cluster_of({"a": workers["a"]}, speeds=speeds).devices[0].bandwidth == 2e12


@pytest.mark.cluster
def test_live_workers_are_measured_once(two_processes: Client) -> None:
    cluster = live_cluster(two_processes, "float32", "cpu")
    first, second = cluster.devices
    assert (first.flops, first.bandwidth) == (second.flops, second.bandwidth)
    # No processor computes a thousand times less or more than this, nor does any loopback take a second.
    assert 1e8 < first.flops < 1e15
    assert 1e7 < first.bandwidth < 1e14
    link = cluster.between(first.name, second.name)
    assert 1e-6 < link.latency < 1
    assert link == cluster.between(second.name, first.name)
    assert rounded(first.flops) == first.flops
    kept = two_processes.sync(recorded_speeds, two_processes, "float32", "cpu")
    assert kept.links
    assert live_cluster(two_processes, "float32", "cpu") == cluster
