"""What an engine cannot take: every such operator with module and line, and where to cut the graph around them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from torchferry.core.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import onnx_ir as ir

_REWRITE = "rewrite it in other operators"
_MOST = 5  # operators named, lines shown
_MOST_TENSORS = 3  # at a cut; a command with more is not what anybody would type


def operator_name(node: ir.Node) -> str:
    """Return ``domain::Name``, or the name alone for an operator of ONNX."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def unknown_nodes(model: ir.Model, known: Collection[tuple[str, str]]) -> list[ir.Node]:
    """Return the nodes that an engine cannot know.

    Args:
        model: The graph.
        known: Domain and name of every operator that the engine has; functions of the graph and kernels of this process
            are known besides.
    """
    from torchferry.core.kernels import kernels

    known = {*known, *((function.domain, function.name) for function in model.functions.values())}
    own = {kernel.name for kernel in kernels()}
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    nodes = [node for graph in graphs for node in graph if operator_name(node) not in own]
    return [node for node in nodes if (node.domain, node.op_type) not in known]


def kernel_or_symbolic(nodes: Sequence[ir.Node]) -> str:
    """Propose the nearest way out where an engine takes kernels in Python."""
    own = next((operator_name(node) for node in nodes if node.domain), None)
    if own is None:
        return _REWRITE
    return f"import the module that gives '{own}' a kernel, write its symbolic in operators of ONNX"


def refusal(
    said: str,
    nodes: Sequence[ir.Node],
    model: ir.Model,
    whole: ir.Model,
    *,
    reason: str = "",
    first_way: str = "",
) -> UnsupportedError:
    """Word that an engine refuses nodes, all at once.

    Args:
        said: How the sentence begins, such as "ncnn has no operator".
        nodes: In order; one at least.
        model: The graph that the engine was given, whose they are.
        whole: The user's graph, in which a cut must have its names.
        reason: What the engine says of the first; what a pass noted on it comes first.
        first_way: What is proposed before cutting, if not to rewrite it.
    """
    from torchferry.graph.passes.declined import declined
    from torchferry.graph.provenance import provenance

    kinds: dict[str, list[ir.Node]] = {}
    for node in nodes:
        kinds.setdefault(operator_name(node), []).append(node)
    named = [f"{name}{_label(each)}" for name, each in kinds.items()]
    more = f" and {len(named) - _MOST} more" if len(named) > _MOST else ""
    reason = declined(nodes[0]) or reason
    lines = list(dict.fromkeys(filter(None, (provenance(node).source for node in nodes))))
    return UnsupportedError(
        f"{said} {', '.join(named[:_MOST])}{more}" + (f": {reason}" if reason else ""),
        where="; ".join(lines[:_MOST]) or None,
        hint=f"{first_way or _REWRITE}, {_cut(nodes, model, whole)}, or use another backend",
    )


def _label(nodes: Sequence[ir.Node]) -> str:
    """Return the name and module of the first of some nodes, and how many there are."""
    from torchferry.graph.provenance import provenance

    name, module = nodes[0].name, provenance(nodes[0]).module
    inside = f"in module '{module}'" if module else ""
    known = " ".join(filter(None, (f"'{name}'" if name else "", inside)))
    count = f"x{len(nodes)}" if len(nodes) > 1 else ""
    text = ", first ".join(filter(None, (count, known)))
    return f" ({text})" if text else ""


def _cut(nodes: Sequence[ir.Node], model: ir.Model, whole: ir.Model) -> str:
    """Propose where to partition the user's graph so that these nodes are in neither part."""
    before, after = _boundaries(set(nodes), model.graph)
    known = {value.name for value in (*whole.graph.inputs, *(v for node in whole.graph for v in node.outputs))}
    parts = []
    for flag, names, what in (("--end", before, "before it"), ("--start", after, "after it")):
        if names and len(names) <= _MOST_TENSORS and known.issuperset(names):
            options = " ".join(f"{flag} {shlex.quote(name)}" for name in names)
            parts.append(f"`torchferry partition MODEL.onnx {options}` for what comes {what}")
    return f"take {' and '.join(parts)}" if parts else "leave it out with `torchferry partition`"


def _boundaries(refused: set[ir.Node], graph: ir.Graph) -> tuple[list[str], list[str]]:
    """Return where all ends that needs none of some nodes, and what that needs which follows them, by the user's names.

    A node that needs one of them and is needed by another is in neither. There are none where one is inside a function.
    """
    from torchferry.graph.passes.name_tensors import given_name

    reads = {node: list(_reads(node)) for node in graph}
    if not refused <= {inner for node in graph for inner in _with_inner(node)}:
        return [], []
    barred = {node for node in graph if not refused.isdisjoint(_with_inner(node))}
    rooted = {value for value in graph.inputs if not value.is_initializer()}
    follows: set[ir.Node] = set()
    needed: set[ir.Node] = set()
    for node in graph:
        if not rooted.isdisjoint(reads[node]):
            rooted.update(node.outputs)
        if node in barred or any(value.producer() in follows for value in reads[node]):
            follows.add(node)
    for node in reversed(graph):
        if node in barred or node in needed:
            needed.add(node)
            needed.update(maker for value in reads[node] if (maker := value.producer()) is not None)
    after = follows - needed
    crossing = {value for node in follows for value in reads[node]} | set(graph.outputs)
    ends = [v for node in graph if node not in follows for v in node.outputs if v in crossing and v in rooted]
    starts = dict.fromkeys(v for node in graph if node in after for v in reads[node] if v.producer() not in after)
    return [given_name(value) for value in ends], [given_name(value) for value in starts if value in rooted]


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node needs, its subgraphs included, of which some values are their own."""
    for each in _with_inner(node):
        yield from (value for value in each.inputs if value is not None)


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    import onnx_ir as ir

    yield node
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) and not attribute.is_ref():
            graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
            for graph in graphs:
                yield from ir.traversal.RecursiveGraphIterator(graph)
