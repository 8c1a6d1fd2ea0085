"""The layer-graph file format: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from daskllm.graph import LayerGraph, read_graph
from tests.graph.instances import SHARED, decoder

PLAIN: dict[str, Any] = {
    "maxSizePerFPGA": 100.0,
    "maxFPGAs": 2,
    "maxCPUs": 1,
    "nodes": [
        {"name": "one", "id": 1, "supportedOnFpga": 1, "fpgaLatency": 2.0, "size": 30.0, "colorClass": 1},
        {"name": "two", "id": 2, "supportedOnFpga": 1, "fpgaLatency": 3.0, "size": 40.0, "colorClass": 2},
    ],
    "edges": [{"sourceId": 1, "destId": 2, "cost": 0.5, "size": 8.0}],
}


def write(path: Path, plain: Any) -> Path:
    path.write_text(json.dumps(plain))
    return path


def test_reads_the_published_format(tmp_path: Path) -> None:
    file = read_graph(write(tmp_path / "toy.json", PLAIN))
    assert (file.graph.name, file.devices, file.memory) == ("toy", 2, 100.0)
    one = file.graph.node("one")
    assert (one.seconds, one.weight_bytes, one.send_seconds, one.output_bytes) == (2.0, 30.0, 0.5, 8.0)
    cluster = file.cluster()
    assert (len(cluster.devices), cluster.transfers) == (2, "host")
    assert len(file.cluster(5, memory=7.0).devices) == 5
    assert file.cluster(5, memory=7.0).devices[0].memory == 7.0


def test_reads_its_own_format(tmp_path: Path) -> None:
    graph = LayerGraph.of(decoder())
    (tmp_path / "graph.json").write_text(graph.to_json())
    file = read_graph(tmp_path / "graph.json")
    assert file.graph == graph
    assert math.isinf(file.memory)
    with pytest.raises(ValueError, match="number of devices"):
        file.cluster()


def test_reads_the_published_instance() -> None:
    path = SHARED / "data" / "planning" / "bert24_inference.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    file = read_graph(path)
    assert (len(file.graph.nodes), len(file.graph.edges), file.devices) == (32, 55, 6)


def broken(where: tuple[Any, ...], value: Any) -> Any:
    """The good file with one thing changed, or taken away when the value is ``...``."""
    plain = copy.deepcopy(PLAIN)
    at: Any = plain
    for key in where[:-1]:
        at = at[key]
    if value is ...:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    return plain


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("nodes",), ..., 'lists "nodes" and "edges"'),
        (("edges",), ..., '"edges" is missing'),
        (("nodes", 0, "fpgaLatency"), ..., "node 'one' has no \"fpgaLatency\""),
        (("nodes", 0, "fpgaLatency"), -1, "node 'one': fpgaLatency must be a number of at least 0, not -1"),
        (("nodes", 1, "size"), ..., "node 'two' has no \"size\""),
        (("nodes", 1, "size"), "big", "node 'two': size must be"),
        (("nodes", 0, "id"), ..., 'has no "id"'),
        (("nodes", 0, "id"), 2, "two nodes have the id 2"),
        (("nodes", 0, "supportedOnFpga"), 0, "'one' runs on no accelerator"),
        (("nodes", 1, "colorClass"), 1, "colorClass 1 is on several nodes"),
        (("edges", 0, "cost"), ..., 'edge 1 -> 2 has no "cost"'),
        (("edges", 0, "cost"), -0.5, "edge 1 -> 2: cost must be"),
        (("edges", 0, "destId"), 9, "no node with id 9"),
        (("edges", 0, "destId"), 1, "cycle: one -> one"),
        (("maxSizePerFPGA",), 0, "maxSizePerFPGA must be"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(
    tmp_path: Path, where: tuple[Any, ...], value: Any, reason: str
) -> None:
    path = write(tmp_path / "wrong.json", broken(where, value))
    with pytest.raises(ValueError, match=rf"wrong\.json: .*{reason}"):
        read_graph(path)


def test_edges_of_one_source_must_agree(tmp_path: Path) -> None:
    plain = copy.deepcopy(PLAIN)
    plain["nodes"].append({"name": "three", "id": 3, "fpgaLatency": 1.0, "size": 1.0})
    plain["edges"].append({"sourceId": 1, "destId": 3, "cost": 0.75})
    with pytest.raises(ValueError, match=r"cost 0.75 differs from 0.5"):
        read_graph(write(tmp_path / "g.json", plain))


def test_what_is_no_file_of_the_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a layer graph"):
        read_graph(write(tmp_path / "list.json", [1, 2]))
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.json"):
        read_graph(tmp_path / "text.json")
    with pytest.raises(FileNotFoundError):
        read_graph(tmp_path / "absent.json")
