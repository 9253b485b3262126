"""What each node of a graph reads, and what follows from what. Marks are looked through: they are no nodes here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from torchferry.core.errors import FormatError
from torchferry.graph.marks import is_mark

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator


# Operators that give something else at each run: two parts that both computed one would not agree.
_RANDOM = frozenset(
    ("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)


class Flow:
    """The dataflow of a graph's top level; what a subgraph captures is read by the node that holds it.

    Args:
        model: The graph; it is not changed.

    Attributes:
        model: The same.
        nodes: All nodes but marks, in the graph's order; a mark that gives an output its name is one, an Identity.
        marks: All marks, in the graph's order.
        inputs: Inputs that are not weights.
        outputs: What the graph gives.
        reads: What each node needs, once each.
        maker: The node that computes a value.
        readers: The nodes that need a value.
        rootless: Values that depend on no input: weights, constants and what is computed from them alone.
        repeatable: Nodes that any number of parts may compute, for they depend on no input and on no chance.
        names: The name by which a part knows a value: that of the graph's output where it is one.

    Raises:
        FormatError: If a node stands before one that it needs.
    """

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        self.model = model
        self.marks = [node for node in graph if is_mark(node)]
        self.inputs = [value for value in graph.inputs if not value.is_initializer()]
        self._origin: dict[ir.Value, ir.Value] = {}
        self.names: dict[ir.Value, str] = {}
        kept = self._follow_marks()
        self.nodes = [node for node in graph if not is_mark(node) or node.outputs[0] in kept]
        self.outputs = list(dict.fromkeys(v if v in kept else self.origin(v) for v in graph.outputs))
        self.maker = {output: node for node in self.nodes for output in node.outputs}
        top = {*graph.inputs, *graph.initializers.values(), *self.maker, *self._origin}
        self.reads = {node: tuple(dict.fromkeys(map(self.origin, _reads(node, top)))) for node in self.nodes}
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node, values in self.reads.items():
            for value in values:
                self.readers.setdefault(value, []).append(node)
        self._find_rootless(_random_functions(model))

    def _follow_marks(self) -> set[ir.Value]:
        """Let a mark's input stand for its output; return outputs of the graph that need a node to have their name."""
        outputs = set(self.model.graph.outputs)
        kept: set[ir.Value] = set()
        for mark in self.marks:
            before, after = mark.inputs[0], mark.outputs[0]
            assert before is not None
            self._origin[after] = origin = self.origin(before)
            if after not in outputs:
                continue
            if origin.producer() is None or origin in outputs or origin in self.names:
                kept.add(after)  # the mark becomes an Identity
            else:
                self.names[origin] = after.name or ""
        return kept

    def _find_rootless(self, random_functions: Collection[ir.OperatorIdentifier]) -> None:
        self.rootless: set[ir.Value] = set(self.model.graph.initializers.values())
        self.repeatable: set[ir.Node] = set()
        repeated = set(self.rootless)
        seen: set[ir.Value] = {*self.model.graph.inputs, *self.rootless}
        for node in self.nodes:
            reads = self.reads[node]
            late = next((value for value in reads if value not in seen), None)
            if late is not None:
                raise FormatError(
                    f"node '{label(node)}' stands before the one that computes its input '{late.name}'",
                    hint="sort the graph with model.graph.sort()",
                )
            seen.update(node.outputs)
            if self.rootless.issuperset(reads):
                self.rootless.update(node.outputs)
                if repeated.issuperset(reads) and not _is_random(node, random_functions):
                    self.repeatable.add(node)
                    repeated.update(node.outputs)

    def origin(self, value: ir.Value) -> ir.Value:
        """Return the value itself, or the one that a mark passes on."""
        return self._origin.get(value, value)

    def name(self, value: ir.Value) -> str:
        """Return the name by which a part knows a value."""
        return self.names.get(value) or value.name or ""

    def upstream(self, values: Iterable[ir.Value], stop: Collection[ir.Value] = ()) -> set[ir.Node]:
        """Return the nodes that are needed for these values when those of ``stop`` are given."""
        found: set[ir.Node] = set()
        pending = [value for value in values if value not in stop]
        while pending:
            node = self.maker.get(pending.pop())
            if node is not None and node not in found:
                found.add(node)
                pending.extend(value for value in self.reads[node] if value not in stop)
        return found

    def downstream(self, values: Iterable[ir.Value], without: Collection[ir.Node] = ()) -> set[ir.Value]:
        """Return what is computed from these values by nodes that are not in ``without``."""
        known, found = set(values), set[ir.Value]()
        for node in self.nodes:
            if node not in without and not known.isdisjoint(self.reads[node]):
                known.update(node.outputs)
                found.update(node.outputs)
        return found

    def ordered(self, nodes: Collection[ir.Node]) -> list[ir.Node]:
        """Return these nodes in the graph's order."""
        return [node for node in self.nodes if node in nodes]

    def describe(self, value: ir.Value) -> str:
        """Name a value and what computes it, for a message."""
        node = self.maker.get(value)
        return f"'{self.name(value)}'" + (f" (of {node.op_type} '{label(node)}')" if node else "")


def label(node: ir.Node) -> str:
    """Return a node's name, or that of its first output if it has none."""
    return node.name or node.outputs[0].name or ""


def inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Give the subgraphs of a node, and theirs."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        graphs: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            yield graph
            yield from graph.subgraphs()


def _reads(node: ir.Node, top: Collection[ir.Value]) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for graph in inner_graphs(node):
        for inner in graph:
            yield from (value for value in inner.inputs if value in top)  # type: ignore[misc]  # None is not in it
        yield from (value for value in graph.outputs if value in top)


def _is_random(node: ir.Node, functions: Collection[ir.OperatorIdentifier]) -> bool:
    inner = (each for graph in inner_graphs(node) for each in graph)
    return any(each.op_type in _RANDOM or each.op_identifier() in functions for each in (node, *inner))


def _random_functions(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Return the functions that hold a random operator, themselves or through others."""
    found: set[ir.OperatorIdentifier] = set()
    size = -1
    while size != len(found):
        size = len(found)
        found |= {key for key, body in model.functions.items() if any(_is_random(node, found) for node in body)}
    return found
