"""What work runs on and how much of it there is: devices, links, clusters, workloads.

Owns the plain numbers, measured on live workers or given by hand, and their checks. Refuses to know graphs
and to compute times of anything but one message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from daskllm.graph.nodes import Step, check_amount

__all__ = ["Cluster", "Device", "Link", "Workload"]


@dataclass(frozen=True, slots=True)
class Device:
    """Something that holds weights and computes.

    Attributes:
        memory: bytes for weights, KV and activations; ``math.inf`` where nothing limits it.
        flops: operations per second.
        bandwidth: bytes per second between its memory and its arithmetic.
        launch: seconds that every node costs besides.
        speed: divides the times of nodes that carry their own `seconds`.
        resources: labels that it offers, with amounts.
        load_bandwidth: bytes per second at which weights arrive in it; None leaves loading out.

    Raises:
        ValueError: a number out of its range; no memory reported.

    Example:
        >>> Device("gpu-0", memory=80e9, flops=9e14, bandwidth=3e12, resources={"GPU": 1}).offers({"GPU": 1})
        True
    """

    name: str
    memory: float
    flops: float = math.inf
    bandwidth: float = math.inf
    launch: float = 0.0
    speed: float = 1.0
    resources: Mapping[str, float] = field(default_factory=dict)
    load_bandwidth: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a device's name must be a non-empty string, not {self.name!r}")
        owner = f"device {self.name!r}"
        if self.memory is None or self.memory == 0:
            raise ValueError(f"{owner} reports no memory ({self.memory!r}): give its bytes as memory=")
        for name in ("memory", "flops", "bandwidth"):
            check_amount(owner, name, getattr(self, name), positive=True, finite=False)
        check_amount(owner, "launch", self.launch)
        check_amount(owner, "speed", self.speed, positive=True)
        if self.load_bandwidth is not None:
            check_amount(owner, "load_bandwidth", self.load_bandwidth, positive=True)

    def offers(self, wanted: Mapping[str, float]) -> bool:
        """Whether every label is there in the wanted amount."""
        return all(self.resources.get(label, 0) >= amount for label, amount in wanted.items())


@dataclass(frozen=True, slots=True)
class Link:
    """A way for bytes from one device to another: seconds per message, bytes per second.

    Example:
        >>> Link(latency=0.001, bandwidth=1e6).seconds(2000)
        0.003
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        check_amount("link", "latency", self.latency)
        check_amount("link", "bandwidth", self.bandwidth, positive=True, finite=False)

    def seconds(self, size: float) -> float:
        """Time of a message; none is sent for no bytes.

        >>> Link(latency=1.0, bandwidth=4.0).seconds(8)
        3.0
        """
        return self.latency + size / self.bandwidth if size else 0.0


@dataclass(frozen=True)
class Cluster:
    """Devices and the links between them.

    Args:
        link: between any two, or (``"host"``) between any one and host memory.
        links: (source, target) -> `Link` where it is another.

    Raises:
        ValueError: no device, two of one name, a link to an unknown one, an unknown way of transfer.

    Example:
        >>> machines = Cluster((Device("a", memory=8), Device("b", memory=16)), Link(latency=1.0))
        >>> machines.between("a", "b").latency, [d.name for d in machines.subset("b").devices]
        (1.0, ['b'])
    """

    devices: tuple[Device, ...]
    link: Link = field(default_factory=Link)
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    transfers: Literal["direct", "host"] = "direct"

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        names = [d.name for d in self.devices]
        if not names:
            raise ValueError("a cluster needs at least one device")
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"two devices are named {twice!r}; names must be unique")
        for end in (end for pair in self.links for end in pair):
            if end not in names:
                raise ValueError(f"a link names device {end!r}; the devices are {', '.join(names)}")
        if self.transfers not in ("direct", "host"):
            raise ValueError(f'transfers must be "direct" or "host", not {self.transfers!r}')

    @classmethod
    def of(
        cls, count: int, memory: float, *, link: Link | None = None, name: str = "device", **device: float
    ) -> Cluster:
        """``count`` like devices, named ``device-0`` and so on.

        >>> [d.name for d in Cluster.of(2, memory=1e9).devices]
        ['device-0', 'device-1']
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"the number of devices must be an integer of at least 1, not {count!r}")
        devices = tuple(Device(f"{name}-{i}", memory, **device) for i in range(count))  # type: ignore[arg-type]
        return cls(devices, link or Link())

    def between(self, source: str, target: str) -> Link:
        """The link from one device to another."""
        return self.links.get((source, target), self.link)

    def subset(self, names: Iterable[str]) -> Cluster:
        """The same cluster with some of its devices alone."""
        kept = set(names)
        links = {pair: link for pair, link in self.links.items() if kept.issuperset(pair)}
        return Cluster(tuple(d for d in self.devices if d.name in kept), self.link, links, self.transfers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of the cluster.

    Attributes:
        rows: sequences resident in one replica at once: their KV must fit.
        context: positions kept for each of them.
        tokens: new tokens of each row in a step (1: decoding).
        micro_batches: into how many groups the rows are cut that are in flight together; None is as many
            as there are stages.
        all_logits: every token's logits are wanted (scoring).
        return_bytes: per row, from the last stage back to the first (its token id).
        total_tokens: new tokens of the whole job, which loading is weighed against; None: no end.

    Example:
        >>> Workload(rows=64, context=512).step(2).rows
        32.0
    """

    rows: float = 1
    context: int = 1
    tokens: int = 1
    micro_batches: int | None = None
    all_logits: bool = False
    return_bytes: float = 4
    total_tokens: float | None = None

    def __post_init__(self) -> None:
        self.step(1)
        check_amount("workload", "return_bytes", self.return_bytes)
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ValueError(f"workload: micro_batches must be at least 1, not {self.micro_batches!r}")
        if self.total_tokens is not None:
            check_amount("workload", "total_tokens", self.total_tokens)

    def in_flight(self, stages: int) -> int:
        """Micro-batches in flight over that many stages."""
        return self.micro_batches or max(1, stages)

    def step(self, micro_batches: int) -> Step:
        """One micro-batch's pass when the rows are cut into that many."""
        return Step(
            rows=self.rows / micro_batches,
            tokens=self.tokens,
            context=self.context,
            all_logits=self.all_logits,
        )
