"""Layout of the drawings."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from random import Random

from daskllm.graph import LayerGraph
from daskllm.graph.draw import Picture, count, size, svg
from tests.graph.instances import decoder, random_graph

SVG = "{http://www.w3.org/2000/svg}"


def boxes(text: str, radius: str) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of the rectangles with that corner radius."""
    found = []
    for rect in ET.fromstring(text).iter(f"{SVG}rect"):
        if rect.get("rx") == radius:
            x, y, w, h = (float(rect.get(k, "")) for k in ("x", "y", "width", "height"))
            found.append((x, y, x + w, y + h))
    return found


def apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_no_two_boxes_or_frames_overlap_and_all_are_inside() -> None:
    graphs = [random_graph(Random(s), 10) for s in range(10)]
    graphs.append(LayerGraph.of(decoder(num_layers=3)).open("layers.1").open("layers.1.mlp"))
    for graph in graphs:
        groups = {n.name: f"stage {i * 3 // len(graph.nodes)}" for i, n in enumerate(graph.order)}
        text = svg(graph.picture(groups))
        drawn, frames = boxes(text, "6"), boxes(text, "8")
        assert len(drawn) == len(graph.nodes)
        assert len(frames) == 3
        assert all(apart(a, b) for a, b in itertools.combinations(drawn, 2))
        assert all(apart(a, b) for a, b in itertools.combinations(frames, 2))
        width, height = map(float, ET.fromstring(text).get("viewBox", "").split()[2:])
        assert all(a >= 0 and b >= 0 and c <= width and d <= height for a, b, c, d in drawn)


def test_an_empty_picture_is_a_picture() -> None:
    assert svg(Picture("nothing", (), ())).endswith("</svg>")


def test_numbers_for_people() -> None:
    assert [size(x) for x in (1023, 1024, 5 * 1024**4)] == ["1023 B", "1 KiB", "5 TiB"]
    assert size(float("inf")) == "unlimited"
    assert [count(x) for x in (0, 999, 7.09e6)] == ["0", "999", "7.09 M"]
