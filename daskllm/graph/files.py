"""The layer-graph files of published placement problems.

Owns the reading of the JSON format of "Efficient Algorithms for Device Placement of DNN Graph Operators"
(Tarnawski et al., NeurIPS 2020, https://github.com/msr-fiddle/dnn-partitioning): nodes with a time
(``fpgaLatency``) and a size on an accelerator, edges with the time to move the source's output between an
accelerator and host memory. Times are whatever unit the file is in. Refuses to plan.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from daskllm.graph.cluster import Cluster
from daskllm.graph.layers import LayerGraph
from daskllm.graph.nodes import Edge, Node, check_amount

__all__ = ["GraphFile", "read_graph"]


@dataclass(frozen=True, slots=True)
class GraphFile:
    """What a file says.

    Attributes:
        devices: the most accelerators that it allows, None where it does not say.
        memory: bytes of each accelerator, ``math.inf`` where it does not say.

    Example:
        >>> from daskllm.graph import Node
        >>> found = GraphFile(LayerGraph([Node("a")]), devices=2, memory=1024.0)
        >>> [device.memory for device in found.cluster().devices], len(found.cluster(3).devices)
        ([1024.0, 1024.0], 3)
    """

    graph: LayerGraph
    devices: int | None
    memory: float

    def cluster(self, devices: int | None = None, memory: float | None = None) -> Cluster:
        """That many accelerators around one host memory; the file's own number and memory by default."""
        count = self.devices if devices is None else devices
        if count is None:
            raise ValueError("the file names no number of accelerators: give the number of devices")
        like = Cluster.of(count, self.memory if memory is None else memory)
        return replace(like, transfers="host")


def read_graph(path: str | PathLike[str]) -> GraphFile:
    """Read a layer-graph file: the published format, or what `LayerGraph.to_json` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, a time or size is missing or negative, an edge leads nowhere,
            the graph has a cycle, or a node cannot run on an accelerator; the message names the file.

    Example:
        >>> import tempfile
        >>> from daskllm.graph import Node
        >>> graph = LayerGraph.chain([Node("a"), Node("b")])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "graph.json").write_text(graph.to_json())
        ...     read_graph(f"{folder}/graph.json").graph == graph
        True
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        plain = json.loads(text)
        if isinstance(plain, dict) and "format" in plain:
            return GraphFile(LayerGraph.from_json(text), None, math.inf)
        return _published(plain, Path(path).stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _published(plain: Any, name: str) -> GraphFile:
    if not isinstance(plain, dict) or not isinstance(plain.get("nodes"), list):
        raise ValueError('not a layer graph: expected an object with lists "nodes" and "edges"')
    edges = plain.get("edges")
    if not isinstance(edges, list):
        raise ValueError('the list "edges" is missing')
    names: dict[Any, str] = {}
    for node in plain["nodes"]:
        key = _get(node, "id", "a node")
        if key in names:
            raise ValueError(f"two nodes have the id {key!r}")
        names[key] = str(node.get("name", key))
    _refuse_colours(plain["nodes"])
    sends = _send_seconds(edges, names)
    nodes = [_node(node, names[node["id"]], sends.get(node["id"], (0.0, 0.0))) for node in plain["nodes"]]
    graph = LayerGraph(nodes, [Edge(names[e["sourceId"]], names[e["destId"]]) for e in edges], name)
    memory = plain.get("maxSizePerFPGA", math.inf)
    check_amount("the file", "maxSizePerFPGA", memory, positive=True, finite=False)
    return GraphFile(graph, plain.get("maxFPGAs"), memory)


def _get(item: Any, field: str, owner: str) -> Any:
    if not isinstance(item, Mapping) or field not in item:
        raise ValueError(f'{owner} has no "{field}": {item!r}')
    return item[field]


def _refuse_colours(nodes: list[dict[str, Any]]) -> None:
    """Nodes of one colour have to share a device (training graphs have them), which is not planned here."""
    colours = Counter(n["colorClass"] for n in nodes if n.get("colorClass") is not None)
    shared = [c for c, count in colours.items() if count > 1]
    if shared:
        raise ValueError(
            f"colorClass {shared[0]!r} is on several nodes; nodes bound to one device cannot be planned"
        )


def _send_seconds(edges: list[Any], names: Mapping[Any, str]) -> dict[Any, tuple[float, float]]:
    """For each source, the time and the bytes of its output, which all its edges must agree on."""
    found: dict[Any, tuple[float, float]] = {}
    for edge in edges:
        source, target = _get(edge, "sourceId", "an edge"), _get(edge, "destId", "an edge")
        owner = f"edge {source!r} -> {target!r}"
        for end in (source, target):
            if end not in names:
                raise ValueError(f"{owner}: there is no node with id {end!r}")
        cost, size = _get(edge, "cost", owner), edge.get("size", 0.0)
        check_amount(owner, "cost", cost)
        check_amount(owner, "size", size)
        if found.setdefault(source, (cost, size))[0] != cost:
            raise ValueError(
                f"{owner}: cost {cost} differs from {found[source][0]} on another edge of that source"
            )
    return found


def _node(plain: Mapping[str, Any], name: str, sends: tuple[float, float]) -> Node:
    owner = f"node {name!r}"
    seconds, size = _get(plain, "fpgaLatency", owner), _get(plain, "size", owner)
    check_amount(owner, "fpgaLatency", seconds)
    check_amount(owner, "size", size)
    if not plain.get("supportedOnFpga", 1):
        raise ValueError(f"{owner} runs on no accelerator (supportedOnFpga is 0)")
    return Node(name, weight_bytes=size, seconds=seconds, send_seconds=sends[0], output_bytes=sends[1])
