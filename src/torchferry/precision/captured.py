"""What a node takes besides tensors that an engine holds in FP16: values from outside its subgraphs, and sizes."""

from __future__ import annotations

import onnx_ir as ir

# Inputs that no engine holds as a tensor in FP16: sizes, factors between sizes, thresholds.
PARAMETERS = frozenset(
    (operator, index)
    for operator, indices in {
        "ConstantOfShape": (0,),
        "Expand": (1,),
        "NonMaxSuppression": (2, 3, 4),
        "Pad": (1, 3),
        "Reshape": (1,),
        "Resize": (1, 2, 3),
        "Slice": (1, 2, 3, 4),
        "Split": (1,),
        "Squeeze": (1,),
        "Tile": (1,),
        "TopK": (1,),
        "Unsqueeze": (1,),
        "Upsample": (1,),
    }.items()
    for index in indices
)


def graphs_of(attribute: ir.Attr) -> list[ir.Graph]:
    """Return the subgraphs that an attribute holds."""
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return [*attribute.as_graphs()] if attribute.type == ir.AttributeType.GRAPHS else []


def taken(node: ir.Node) -> list[ir.Value]:
    """Return what a node takes, also from outside its subgraphs."""
    inner = [n for attribute in node.attributes.values() for graph in graphs_of(attribute) for n in graph.all_nodes()]
    return [value for each in (node, *inner) for value in each.inputs if value is not None]


def size_arithmetic(model: ir.Model) -> set[ir.Value]:
    """Return the values that only say sizes, factors between sizes or thresholds."""
    found: set[ir.Value] = set()

    def is_size(value: ir.Value) -> bool:
        uses = value.uses()
        return (
            bool(uses)
            and not value.is_graph_output()
            and all((user.op_type, i) in PARAMETERS or found.issuperset(user.outputs) for user, i in uses)
        )

    for graph in reversed([*model.graphs()]):
        for node in reversed([*graph]):
            found.update(output for output in node.outputs if is_size(output))
    for graph in model.graphs():
        found.update(value for value in (*graph.inputs, *graph.initializers.values()) if is_size(value))
    return found
