"""Structure: order, cycles, opening, and the ways out (table, JSON, Mermaid, SVG)."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from random import Random

import pytest

from daskllm.graph import Edge, LayerGraph, Node, elementwise, linear
from tests.graph.instances import decoder, random_graph


def three_layer_mlp() -> LayerGraph:
    nodes = [
        linear("layer1", 4, 8),
        elementwise("act1", "relu", 8),
        linear("layer2", 8, 8),
        elementwise("act2", "tanh", 8),
        linear("layer3", 8, 2),
        elementwise("act3", "sigmoid", 2),
    ]
    return LayerGraph.chain(nodes, "mlp")


def test_a_model_by_hand_in_a_few_lines() -> None:
    graph = three_layer_mlp()
    assert [n.kind for n in graph.order] == ["linear", "relu", "linear", "tanh", "linear", "sigmoid"]
    assert graph.total("weight_bytes") == 4 * (4 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2)
    assert "layer3" in graph.table()


def test_order_puts_every_node_after_its_inputs() -> None:
    for seed in range(30):
        graph = random_graph(Random(seed), 9)
        place = {n.name: i for i, n in enumerate(graph.order)}
        assert len(place) == 9
        assert all(place[e.source] < place[e.target] for e in graph.edges)


def test_bad_graphs_are_named() -> None:
    a, b, c = Node("a"), Node("b"), Node("c")
    with pytest.raises(ValueError, match=r"cycle: .*->.*"):
        LayerGraph([a, b, c], [("a", "b"), ("b", "c"), ("c", "b")])
    with pytest.raises(ValueError, match="two nodes are named 'a'"):
        LayerGraph([a, Node("a")])
    with pytest.raises(ValueError, match="no node 'x'"):
        LayerGraph([a], [("a", "x")])
    with pytest.raises(ValueError, match="given twice"):
        LayerGraph([a, b], [("a", "b"), ("a", "b")])
    with pytest.raises(ValueError, match="at least one node"):
        LayerGraph([])
    with pytest.raises(KeyError, match="no node 'z'"):
        LayerGraph([a]).node("z")


def test_a_cycle_is_walked_along_its_edges() -> None:
    edges = [("s", "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "t")]
    with pytest.raises(ValueError, match="cycle") as caught:
        LayerGraph([Node(n) for n in "sabct"], edges)
    walked = str(caught.value).split(": ")[1].split(" -> ")
    assert walked[0] == walked[-1]
    assert all(pair in edges for pair in itertools.pairwise(walked))


def test_opening_keeps_what_flows() -> None:
    graph = LayerGraph.of(decoder(num_layers=2), shards=2)
    opened = graph.open("layers.1")
    assert opened.predecessors("layers.1.attention") == ("layers.0",)
    assert opened.predecessors("layers.1.attention_residual") == ("layers.1.attention", "layers.0")
    assert opened.predecessors("head") == ("layers.1.mlp_residual",)
    deeper = opened.open("layers.1.attention")
    assert set(deeper.predecessors("layers.1.attention.sum")) == {
        "layers.1.attention.heads.0",
        "layers.1.attention.heads.1",
    }
    with pytest.raises(ValueError, match="leaf"):
        deeper.open("layers.1.attention.sum")


def test_reach_opens_no_more_than_it_must() -> None:
    graph = LayerGraph.of(decoder(num_layers=3))
    names = {n.name for n in graph.reach(["layers.1.mlp.columns.2", "embed"]).nodes}
    assert "layers.1.mlp.columns.2" in names
    assert "layers.1.attention" in names
    assert {"embed", "layers.0", "layers.2", "head"} < names
    assert graph.reach(["nowhere"]) is graph


def test_edges_carry_their_own_bytes_through_an_opening() -> None:
    config = decoder(num_layers=1)
    whole = LayerGraph.of(config)
    graph = LayerGraph(whole.nodes, [Edge("embed", "layers.0", 5), Edge("layers.0", "head", 6)])
    opened = graph.open("layers.0")
    found = {(e.source, e.target): e.bytes for e in opened.edges}
    assert found["embed", "layers.0.attention"] == 5
    assert found["layers.0.mlp_residual", "head"] == 6


def test_json_round_trip() -> None:
    whole = LayerGraph.of(decoder(tied=True, qk_norm=True, windows=(4, None, 4, None)))
    for graph in (whole, whole.open(), three_layer_mlp(), *(random_graph(Random(s), 6) for s in range(20))):
        assert LayerGraph.from_json(graph.to_json()) == graph
    for text in ("[]", "{", '{"format": "daskllm.graph/1"}', '{"format": "other"}'):
        with pytest.raises(ValueError, match=r"JSON|format"):
            LayerGraph.from_json(text)


def test_mermaid_says_the_same_graph() -> None:
    graph = LayerGraph.of(decoder(num_layers=2)).open("layers.0")
    text = graph.mermaid()
    names = dict(re.findall(r'^\s*(n\d+)\["([^<"]+)', text, re.MULTILINE))
    arrows = re.findall(r"^\s*(n\d+) -->(?:\|[^|]*\|)? (n\d+)$", text, re.MULTILINE)
    assert text.startswith("flowchart TD\n")
    assert set(names.values()) == {n.name for n in graph.nodes}
    assert sorted((names[a], names[b]) for a, b in arrows) == sorted(
        (e.source, e.target) for e in graph.edges
    )


def test_drawings(tmp_path: Path) -> None:
    graph = LayerGraph([Node("a<b", '"k"'), Node("b & c", weight_bytes=3)], [("a<b", "b & c")])
    for ending in (".svg", ".mmd", ".txt", ".json"):
        drawing = graph.visualize(tmp_path / f"graph{ending}")
    root = ET.parse(tmp_path / "graph.svg").getroot()
    assert {t.text for t in root.iter("{http://www.w3.org/2000/svg}text")} >= {"a<b", "b & c"}
    assert LayerGraph.from_json((tmp_path / "graph.json").read_text()) == graph
    assert "a&lt;b" in (tmp_path / "graph.mmd").read_text()
    assert drawing._repr_svg_().startswith("<svg")
    with pytest.raises(ValueError, match="must end in"):
        graph.visualize(tmp_path / "graph.pdf")
