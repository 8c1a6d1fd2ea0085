"""What notebooks show of graphs and plans."""

from __future__ import annotations

from dataclasses import replace

from daskllm.graph import Cluster, Device, LayerGraph, Measured, Node, Plan, make_plan
from daskllm.graph.draw import size
from daskllm.graph.show import weight_bytes
from tests.graph.instances import decoder
from tests.test_markup import words


def two() -> Cluster:
    return Cluster(tuple(Device(f"cpu-{i}", memory=2**30, flops=1e11, bandwidth=2e10) for i in range(2)))


def test_a_graph_shows_like_layers_in_one_line() -> None:
    graph = LayerGraph.of(decoder(num_layers=6))
    html = graph._repr_html_()
    assert html.count("<tr>") == 4  # the head, embed, layers.0-5, head
    assert "layers.0-5" in words(html)
    assert f"{size(weight_bytes(graph))} of weights" in words(html)
    assert "<details open" in html
    assert "<details>" in LayerGraph.of(decoder(num_layers=40))._repr_html_()


def test_shared_weights_count_once() -> None:
    nodes = [Node("a", weight_bytes=10), Node("b", weight_bytes=12, tied=("a", 10))]
    assert weight_bytes(LayerGraph.chain(nodes)) == 12
    assert weight_bytes(LayerGraph([nodes[1]])) == 12


def test_a_graph_without_weights_and_with_strange_names() -> None:
    html = LayerGraph([Node("<a>", "<kind>")])._repr_html_()
    assert "<a>" not in html
    assert "<a>" in words(html)


def test_a_plan_shows_each_stage_with_what_was_predicted_and_measured() -> None:
    plan = make_plan(LayerGraph.of(decoder(num_layers=4)), two(), stages=2)
    head = "stage device layers memory predicted"
    stages = plan.replicas[0].stages
    shown = words(plan._repr_html_())
    assert all(stage.device in shown and f"{1000 * stage.seconds:.3g} ms" in shown for stage in stages)
    assert head.replace(" ", "") in shown.replace(" ", "")
    assert "measured" not in shown
    ran = plan.with_measured([Measured(0, 0, busy=0.5, waiting=0.1, passes=100)])
    shown = words(ran._repr_html_())
    assert "5 ms" in shown
    assert "100" in shown
    assert "imbalance" in shown
    assert "replica stage" not in shown
    both = make_plan(LayerGraph.of(decoder(num_layers=4)), two(), replicas=2)
    assert both._repr_html_().count("<th") == len(["replica", *head.split()]) + 1  # and "planned by"


def test_a_plan_of_which_no_time_is_known() -> None:
    graph = LayerGraph.chain([Node("a", weight_bytes=4)])
    plan = Plan.of([[("here", ["a"])]], graph, Cluster((Device("here", memory=8),)))
    shown = words(replace(plan, notes=("<b>mind this",))._repr_html_())
    assert "unknown" in shown
    assert "a micro-batch" not in shown
    assert "<b>mind this" in shown
