"""How fast the live workers and the links between them are, measured once and kept with the scheduler.

It owns the measurements and their record, from which everyone plans: two who plan at once must start from
the same numbers. It refuses to plan.

Measurements on a machine that is at work are noisy, and an exact planner would make much of noise: it would
cut a model unevenly over workers that are alike. So rates are rounded to two significant digits, and workers
of one host with the same number of threads and the same resources are taken for equal: the median of a few
of them stands for all, and for those that take their place later.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from daskllm.graph import Link
from daskllm.runtime import worker

if TYPE_CHECKING:
    from distributed import Client, Worker

    from daskllm.runtime.wire import Node

__all__ = ["Rate", "Speeds", "kind", "measured_speeds", "quickest", "recorded_speeds", "rounded"]

SECONDS = 0.02
"""Of one worker's arithmetic; with the memory beside it, some 60 ms of each worker that is measured."""
_SAMPLES = 3
"""Workers of a kind, and pairs of two hosts, that are measured; their median counts."""
_PAIRS = 24
"""Pairs of workers measured at most; links that were left out count as the median of the others."""
_SIZES = {"cpu": (128, 512, 64 << 20), "cuda": (1024, 4096, 1 << 30)}
"""Rows and width of a product, long enough to hide its start, and bytes to read, more than caches hold."""
_SMALL, _LARGE = 4 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Rate:
    """What one kind of worker does: operations and bytes per second; ``memory`` is a GPU's, 0 for none."""

    flops: float
    bandwidth: float
    memory: int = 0


@dataclass(frozen=True)
class Speeds:
    """What was measured: `Rate` by the kind of worker, `Link` by the pair of hosts.

    Example:
        >>> facts = {"host": "h", "nthreads": 2, "resources": {}}
        >>> Speeds({kind(facts): Rate(1e11, 2e10)}).rate(facts)
        Rate(flops=100000000000.0, bandwidth=20000000000.0, memory=0)
    """

    rates: Mapping[str, Rate] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)

    def rate(self, facts: Mapping[str, Any]) -> Rate | None:
        """That of a worker of which the scheduler knows these facts; None where none of its kind was seen."""
        return self.rates.get(kind(facts))

    def link(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> Link | None:
        """Between two workers; None where nothing like it was measured."""
        name = _pair(one, other)
        if name in self.links or not self.links:
            return self.links.get(name)
        near = [link for pair, link in self.links.items() if len(set(pair.split())) == 1]
        far = [link for pair, link in self.links.items() if len(set(pair.split())) == 2]
        return _middle((near if one["host"] == other["host"] else far) or [*near, *far])


def kind(facts: Mapping[str, Any]) -> str:
    """What workers have in common that are taken for equal."""
    labels = " ".join(f"{label}={amount:g}" for label, amount in sorted(facts["resources"].items()))
    return f"{facts['host']} {facts['nthreads']} threads {labels}".rstrip()


def rounded(value: float) -> float:
    """Two significant digits.

    >>> rounded(123456.0), rounded(0.000987)
    (120000.0, 0.00099)
    """
    return float(f"{value:.1e}")


def measured_speeds(client: Client, dtype: str, device: str = "auto") -> Speeds:
    """What the workers' record says, with what it lacks measured now.

    On each host one worker at a time; hosts are measured beside each other.

    Args:
        dtype, device: of the model, as `daskllm.types.ModelSpec` has them.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"]
    record = client.get_metadata(_keys(dtype, device), None)
    speeds = _read(record)
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for address, facts in sorted(workers.items()):
        kinds[kind(facts)].append(address)
    missing = {name: found[:_SAMPLES] for name, found in kinds.items() if name not in speeds.rates}
    pairs = [pair for pair in _sampled(workers) if _pair(*(workers[w] for w in pair)) not in speeds.links]
    if not missing and not pairs:
        return speeds
    from daskllm.runtime.stages import StagePlugin  # distributed, which whoever has a client has imported

    client.register_plugin(StagePlugin())  # its handlers answer for the links
    found = Speeds(
        {**speeds.rates, **_rates(client, missing, workers, dtype, device)},
        {**speeds.links, **_links(client, pairs, workers)},
    )
    client.set_metadata(_keys(dtype, device), _written(found))
    return found


async def recorded_speeds(node: Node, dtype: str, device: str = "auto") -> Speeds:
    """What the workers' record says, for whoever plans on an event loop; nothing is measured."""
    return _read(await node.scheduler.get_metadata(keys=_keys(dtype, device), default=None))


def _rates(
    client: Client, wanted: Mapping[str, Sequence[str]], workers: Mapping[str, Any], dtype: str, device: str
) -> dict[str, Rate]:
    seen: dict[str, Rate] = {}
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for address in itertools.chain.from_iterable(wanted.values()):
        hosts[workers[address]["host"]].append(address)
    for turn in itertools.zip_longest(*hosts.values()):
        now = [address for address in turn if address is not None]
        seen.update(client.run(time_device_on, dtype, device, workers=now))
    return {
        name: Rate(
            rounded(median(seen[a].flops for a in found)),
            rounded(median(seen[a].bandwidth for a in found)),
            min(seen[a].memory for a in found),
        )
        for name, found in wanted.items()
    }


def _links(client: Client, pairs: Sequence[tuple[str, str]], workers: Mapping[str, Any]) -> dict[str, Link]:
    seen: defaultdict[str, list[Link]] = defaultdict(list)
    for one, other in pairs:  # one after the other: they would share what they measure
        ((link),) = client.run(time_link_on, other, workers=[one]).values()
        seen[_pair(workers[one], workers[other])].append(link)
    return {name: _middle(found) for name, found in seen.items()}


def _middle(links: Sequence[Link]) -> Link:
    return Link(
        rounded(median(link.latency for link in links)), rounded(median(link.bandwidth for link in links))
    )


def _sampled(workers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of workers: a few of every two hosts, the same ones whoever asks."""
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for address, facts in sorted(workers.items()):
        hosts[facts["host"]].append(address)
    ways = itertools.combinations_with_replacement(sorted(hosts), 2)
    by_way = [
        itertools.islice(
            itertools.combinations(hosts[a], 2) if a == b else zip(hosts[a], hosts[b], strict=False), _SAMPLES
        )
        for a, b in ways
    ]
    # Every two hosts once before any two a second time.
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_way))
    return itertools.islice((pair for pair in turns if pair is not None), _PAIRS)


def _pair(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return " ".join(sorted((one["host"], other["host"])))


# --- on a worker ----------------------------------------------------------------------------------------


async def time_device_on(dtype: str, device: str, dask_worker: Worker) -> Rate:
    """Measure a worker, for `Client.run`; its event loop stays free meanwhile."""
    worker.set_share(dask_worker, await dask_worker.scheduler.identity())
    return await asyncio.to_thread(_in_a_thread_of_its_own, dtype, device)


def _in_a_thread_of_its_own(dtype: str, device: str) -> Rate:
    # Its OpenMP threads end with it; ones that stayed would slow the engine's.
    with ThreadPoolExecutor(1, thread_name_prefix="daskllm-measure") as thread:
        return thread.submit(_time_device, dtype, device).result()


def _time_device(dtype: str, device: str) -> Rate:
    import torch  # the client that asks needs none

    from daskllm import machine
    from daskllm.blocks import array
    from daskllm.engine import kernels
    from daskllm.engine.layers import compute_dtype, pick_device

    place = pick_device(device)
    kept = array.DTYPES[compute_dtype(dtype, place)]
    torch.set_num_threads(machine.cores())
    rows, width, size = _SIZES[place]
    given, weight = (torch.ones(n, width, dtype=kept, device=place) for n in (rows, width))
    # As the engine does it: there are CPUs on which torch takes ten times as long for bfloat16.
    operations = kernels.select(place, kept)
    packed = operations.pack([weight], None)
    product = quickest(lambda: operations.linear(given, packed), place, SECONDS)
    large = torch.ones(size // 4, dtype=torch.float32, device=place)
    read = quickest(large.sum, place, SECONDS / 2)
    memory = torch.cuda.get_device_properties(0).total_memory if place == "cuda" else 0
    return Rate(2 * rows * width * width / product, size / read, memory)


def quickest(work: Callable[[], Any], place: str, seconds: float) -> float:
    """Seconds of the quickest of as many runs as there is time for; whatever else is at work only adds.

    Args:
        place: "cpu", or "cuda", whose runs are waited for.
    """
    import torch

    def once() -> float:
        began = time.perf_counter()
        work()
        if place == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    end = time.perf_counter() + seconds
    best = once()
    while time.perf_counter() < end:
        best = min(best, once())
    return best


async def time_link_on(address: str, dask_worker: Worker) -> Link:
    """Measure the way from a worker to another, for `Client.run`: the fastest of a few messages of a size."""
    from distributed.protocol import to_serialize

    from daskllm.runtime.wire import ask

    async def trip(size: int) -> float:
        payload = to_serialize(bytes(size))
        times = []
        for _ in range(4):
            began = time.perf_counter()
            await ask(dask_worker, address, "echo", payload=payload)
            times.append(time.perf_counter() - began)
        return min(times)

    small, large = await trip(_SMALL), await trip(_LARGE)
    # The answer is empty: it takes the latency again and no more.
    return Link(small / 2, (_LARGE - _SMALL) / max(large - small, 1e-9))


# --- the record -----------------------------------------------------------------------------------------


def _keys(dtype: str, device: str) -> list[str]:
    return ["daskllm-speeds", f"{dtype} {device}"]


def _written(speeds: Speeds) -> dict[str, dict[str, list[float]]]:
    return {
        "rates": {name: [r.flops, r.bandwidth, r.memory] for name, r in speeds.rates.items()},
        "links": {name: [link.latency, link.bandwidth] for name, link in speeds.links.items()},
    }


def _read(record: Mapping[str, Mapping[str, Sequence[Any]]] | None) -> Speeds:
    if record is None:
        return Speeds()
    return Speeds(
        {name: Rate(*rate) for name, rate in record["rates"].items()},
        {name: Link(*link) for name, link in record["links"].items()},
    )
