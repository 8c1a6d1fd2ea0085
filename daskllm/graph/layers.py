"""The compute graph: layers, what flows between them, and how each opens into smaller ones.

Owns structure: names, order, edges, opening, and the tables and drawings of it. Refuses to know devices,
times and how a node is run. Any directed acyclic graph will do; a decoder's comes from its description.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from daskllm.graph import draw, show
from daskllm.graph.decoder import decoder_opening
from daskllm.graph.nodes import Edge, Node, Opening

if TYPE_CHECKING:
    from daskllm.models.description import DecoderConfig

__all__ = ["LayerGraph"]


@dataclass(frozen=True)
class LayerGraph:
    """A directed acyclic graph of nodes.

    Args:
        nodes: in any order; `order` is a topological one that keeps the given order where it may.
        edges: pairs of names are taken as `Edge`. The order of the edges into a node is the order of its
            arguments.
        name: of the whole.

    Raises:
        ValueError: two nodes of one name, an edge to a node that is not there or that is given twice, or a
            cycle; the message names them.

    Example:
        >>> graph = LayerGraph([Node("a"), Node("b"), Node("c")], [("a", "b"), ("a", "c")])
        >>> graph.successors("a")
        ('b', 'c')
        >>> LayerGraph([Node("a"), Node("b")], [("a", "b"), ("b", "a")])
        Traceback (most recent call last):
        ...
        ValueError: the graph has a cycle: a -> b -> a

    The other ways to look at one:
        >>> graph.node("b").weight_bytes, graph.predecessors("b"), [n.name for n in graph.order]
        (0, ('a',), ['a', 'b', 'c'])
        >>> graph.total("weight_bytes"), [graph.edge_bytes(edge) for edge in graph.edges]
        (0.0, [0, 0])
        >>> print(graph.mermaid())
        flowchart TD
            n0["a<br/>op"]
            n1["b<br/>op"]
            n2["c<br/>op"]
            n0 --> n1
            n0 --> n2
        >>> len(graph.picture().boxes), LayerGraph.from_json(graph.to_json()) == graph.open_all() == graph
        (3, True)
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    name: str

    def __init__(
        self, nodes: Iterable[Node], edges: Iterable[Edge | tuple[str, str]] = (), name: str = "model"
    ) -> None:
        set_ = object.__setattr__
        set_(self, "nodes", tuple(nodes))
        set_(self, "edges", tuple(e if isinstance(e, Edge) else Edge(*e) for e in edges))
        set_(self, "name", name)
        self._check()

    def _check(self) -> None:
        if not self.nodes:
            raise ValueError("a graph needs at least one node")
        twice = [n for n, count in Counter(n.name for n in self.nodes).items() if count > 1]
        if twice:
            raise ValueError(f"two nodes are named {twice[0]!r}; names must be unique")
        known = {n.name for n in self.nodes}
        seen: set[tuple[str, str]] = set()
        for edge in self.edges:
            for end in (edge.source, edge.target):
                if end not in known:
                    raise ValueError(f"edge {edge.source!r} -> {edge.target!r}: there is no node {end!r}")
            if (edge.source, edge.target) in seen:
                raise ValueError(f"edge {edge.source!r} -> {edge.target!r} is given twice")
            seen.add((edge.source, edge.target))
        if len(self.order) < len(self.nodes):
            raise ValueError(f"the graph has a cycle: {' -> '.join(self._cycle())}")

    def _cycle(self) -> list[str]:
        """The names along one cycle, its first node repeated at the end."""
        left = {n.name for n in self.nodes} - {n.name for n in self.order}
        path = [min(left)]
        while True:
            # What Kahn's algorithm leaves over always has a predecessor that is left over too.
            before = next(p for p in self.predecessors(path[-1]) if p in left)
            if before in path:
                return [before, *path[path.index(before) :][::-1]]
            path.append(before)

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        dtype: str | None = None,
        *,
        shards: int | None = None,
        quantize: str | None = None,
        kv_dtype: str = "auto",
    ) -> LayerGraph:
        """The graph of a decoder from its description alone: ``embed``, ``layers.0`` …, ``head``.

        Args:
            dtype: of weights, activations and KV; the checkpoint's own by default.
            shards: into how many head groups, MLP columns and vocabulary shards a block opens; by default
                one per KV head.
            quantize: "int8" for matrices in eight bits, as `daskllm.load` has it.
            kv_dtype: "int8" for KV in eight bits, likewise.

        Raises:
            ValueError: unknown dtype or quantisation, or ``shards`` below 1.

        Example:
            >>> from daskllm import demo
            >>> from daskllm.checkpoint import open_checkpoint
            >>> from daskllm.models import describe
            >>> graph = LayerGraph.of(describe(open_checkpoint(demo.model_path()).config), dtype="bfloat16")
            >>> len(graph.nodes), len(graph.open_all().nodes)
            (6, 47)
        """
        inside = decoder_opening(
            config,
            dtype or config.dtype,
            config.num_kv_heads if shards is None else shards,
            quantize,
            kv_dtype,
        )
        return cls(inside.nodes, inside.edges, config.family)

    @classmethod
    def chain(cls, nodes: Sequence[Node], name: str = "model") -> LayerGraph:
        """A graph in which each node feeds the next.

        >>> LayerGraph.chain([Node("a"), Node("b")]).edges
        (Edge(source='a', target='b', bytes=None),)
        """
        return cls(nodes, [Edge(a.name, b.name) for a, b in itertools.pairwise(nodes)], name)

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {n.name: n for n in self.nodes}

    @cached_property
    def _ends(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        before: dict[str, list[str]] = {n.name: [] for n in self.nodes}
        after: dict[str, list[str]] = {n.name: [] for n in self.nodes}
        for edge in self.edges:
            before[edge.target].append(edge.source)
            after[edge.source].append(edge.target)
        return {k: tuple(v) for k, v in before.items()}, {k: tuple(v) for k, v in after.items()}

    @cached_property
    def order(self) -> tuple[Node, ...]:
        """All nodes, each after those that it needs."""
        place = {n.name: i for i, n in enumerate(self.nodes)}
        missing = {n.name: len(self.predecessors(n.name)) for n in self.nodes}
        ready = sorted((n for n, count in missing.items() if not count), key=place.__getitem__)
        order: list[Node] = []
        while ready:
            name = ready.pop(0)
            order.append(self._by_name[name])
            for after in self.successors(name):
                missing[after] -= 1
                if not missing[after]:
                    ready.append(after)
            ready.sort(key=place.__getitem__)
        return tuple(order)

    def node(self, name: str) -> Node:
        """The node of that name; KeyError names it and the graph."""
        if name not in self._by_name:
            raise KeyError(f"graph {self.name!r} has no node {name!r}")
        return self._by_name[name]

    def predecessors(self, name: str) -> tuple[str, ...]:
        """Names of the nodes whose results go into a node, in the order of its arguments."""
        return self._ends[0][name]

    def successors(self, name: str) -> tuple[str, ...]:
        """Names of the nodes that a node's result goes into."""
        return self._ends[1][name]

    def open(self, *names: str) -> LayerGraph:
        """The graph with these nodes replaced by what is inside them; without names, every node that opens.

        Raises:
            KeyError: no such node.
            ValueError: a named node is a leaf.

        Example:
            >>> inside = Opening((Node("a.1"), Node("a.2")), (Edge("a.1", "a.2"),), ("a.1",), ("a.2",))
            >>> graph = LayerGraph.chain([Node("x"), Node("a", inside=inside), Node("y")])
            >>> [n.name for n in graph.open("a").order]
            ['x', 'a.1', 'a.2', 'y']
        """
        insides: dict[str, Opening] = {}
        for node in map(self.node, names) if names else self.nodes:
            if node.inside is not None:
                insides[node.name] = node.inside
            elif names:
                raise ValueError(f"node {node.name!r} is a leaf: there is nothing inside to open")
        nodes = [m for n in self.nodes for m in (insides[n.name].nodes if n.name in insides else (n,))]
        edges = [edge for inside in insides.values() for edge in inside.edges]
        for edge in self.edges:
            source, target = insides.get(edge.source), insides.get(edge.target)
            for a in source.exits if source else (edge.source,):
                edges += [Edge(a, b, edge.bytes) for b in (target.entries if target else (edge.target,))]
        return LayerGraph(nodes, edges, self.name)

    def reach(self, names: Iterable[str]) -> LayerGraph:
        """The graph opened as far as it has to be to have nodes of these names; as it is where it has them.

        Names that are nowhere are left to the caller.

        Example:
            >>> inside = Opening((Node("a.1"), Node("a.2")), (Edge("a.1", "a.2"),), ("a.1",), ("a.2",))
            >>> [n.name for n in LayerGraph([Node("a", inside=inside)]).reach(["a.2"]).nodes]
            ['a.1', 'a.2']
        """
        graph, wanted = self, set(names)
        while True:
            missing = wanted - {n.name for n in graph.nodes}
            opens = [n.name for n in graph.nodes if n.inside is not None and missing & _inner_names(n.inside)]
            if not opens:
                return graph
            graph = graph.open(*opens)

    def open_all(self) -> LayerGraph:
        """The graph of leaves alone."""
        graph = self
        while any(n.inside is not None for n in graph.nodes):
            graph = graph.open()
        return graph

    def total(self, quantity: str) -> float:
        """The sum of a quantity such as ``"weight_bytes"`` over all nodes."""
        return float(sum(getattr(n, quantity) for n in self.nodes))

    def edge_bytes(self, edge: Edge) -> float:
        """Bytes per token that an edge carries."""
        return self._by_name[edge.source].output_bytes if edge.bytes is None else edge.bytes

    def table(self) -> str:
        """The nodes as a text table, in topological order.

        Example:
            >>> print(LayerGraph.chain([Node("a", weight_bytes=2048), Node("b", "relu")]).table())
            layer  kind  weights  FLOPs/token  KV/token  out/token  from
            -----  ----  -------  -----------  --------  ---------  ----
            a      op      2 KiB            0       0 B        0 B
            b      relu      0 B            0       0 B        0 B  a
        """
        head = ("layer", "kind", "weights", "FLOPs/token", "KV/token", "out/token", "from")
        rows = [
            (
                n.name,
                n.kind,
                draw.size(n.weight_bytes),
                draw.count(n.flops_per_token),
                draw.size(n.kv_bytes),
                draw.size(n.output_bytes),
                ", ".join(self.predecessors(n.name)),
            )
            for n in self.order
        ]
        return draw.table(head, rows)

    def __repr__(self) -> str:
        weights = draw.size(show.weight_bytes(self))
        return f"<LayerGraph {self.name}: {len(self.nodes)} nodes, {weights} of weights>"

    def _repr_html_(self) -> str:
        return show.graph_html(self)

    def to_json(self) -> str:
        """The graph as JSON that `from_json` reads back to an equal graph."""
        plain = {
            "format": "daskllm.graph/1",
            "name": self.name,
            "nodes": [_plain(n) for n in self.nodes],
            "edges": [_plain(e) for e in self.edges],
        }
        return json.dumps(plain, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> LayerGraph:
        """The graph that `to_json` wrote; ValueError says what is wrong with the text."""
        try:
            plain = json.loads(text)
            if not isinstance(plain, dict) or plain.get("format") != "daskllm.graph/1":
                raise ValueError('"format" must be "daskllm.graph/1"')
            nodes = [_node(n) for n in plain["nodes"]]
            return cls(nodes, [Edge(**e) for e in plain["edges"]], plain["name"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a layer graph in JSON: {error}") from error

    def picture(self, groups: Mapping[str, str] | None = None) -> draw.Picture:
        """What the drawings show.

        Args:
            groups: node name -> label of the frame (a stage, say) that it is drawn in.
        """
        boxes = [
            draw.Box(
                n.name,
                (n.name, f"{n.kind} {draw.size(n.weight_bytes)}" if n.weight_bytes else n.kind),
                n.kind,
                (groups or {}).get(n.name),
            )
            for n in self.order
        ]
        arrows = [draw.Arrow(e.source, e.target, _flow(self.edge_bytes(e))) for e in self.edges]
        return draw.Picture(self.name, tuple(boxes), tuple(arrows))

    def mermaid(self) -> str:
        """The graph in Mermaid's flowchart language."""
        return draw.mermaid(self.picture())

    def visualize(self, path: str | PathLike[str] | None = None) -> draw.Drawing:
        """The graph drawn: shown by a notebook, written to ``path`` when given (.svg, .mmd, .txt or .json).

        Raises:
            ValueError: another ending; the message lists those that work.

        Example:
            >>> print(LayerGraph([Node("a")]).visualize())
            layer  kind  weights  FLOPs/token  KV/token  out/token  from
            -----  ----  -------  -----------  --------  ---------  ----
            a      op        0 B            0       0 B        0 B
        """
        drawing = draw.Drawing(self.picture(), self.table(), self.to_json())
        if path is not None:
            drawing.save(path)
        return drawing


def _inner_names(inside: Opening) -> set[str]:
    """All names inside, at any depth."""
    names = {n.name for n in inside.nodes}
    return names.union(*(_inner_names(n.inside) for n in inside.nodes if n.inside is not None))


def _flow(amount: float) -> str:
    return draw.size(amount) if amount else ""


def _plain(item: Node | Edge | Opening) -> dict[str, Any]:
    """The fields that differ from their defaults, so that the JSON of a large graph stays readable."""
    plain: dict[str, Any] = {}
    for f in fields(item):
        value = getattr(item, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if default is not MISSING and value == default:
            continue
        if isinstance(value, Opening):
            value = _plain(value)
        elif f.name in ("nodes", "edges"):
            value = [_plain(v) for v in value]
        plain[f.name] = dict(value) if isinstance(value, Mapping) else value
    return plain


def _node(plain: Mapping[str, Any]) -> Node:
    fields = dict(plain)
    if fields.get("tied") is not None:
        name, amount = fields["tied"]
        fields["tied"] = (name, amount)
    if fields.get("inside") is not None:
        inside = fields["inside"]
        fields["inside"] = Opening(
            tuple(_node(n) for n in inside["nodes"]),
            tuple(Edge(**e) for e in inside["edges"]),
            tuple(inside["entries"]),
            tuple(inside["exits"]),
        )
    return Node(**fields)
