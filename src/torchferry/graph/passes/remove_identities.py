"""No nodes that do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_OF_MANY = ("Concat", "Max", "Mean", "Min", "Sum")


def apply(model: ir.Model) -> int:
    """Remove ``Identity`` and what comes to it: ``Dropout`` as at inference, and ``Max`` and its like of one input.

    ``b = Identity(a); y = Neg(b)`` → ``y = Neg(a)``. One that makes an output of the graph from one of its inputs, from
    a constant or from another output stays, since both names are needed.

    Returns:
        The number of nodes removed.
    """
    from onnx_ir.passes.common import IdentityEliminationPass

    before = sum(1 for graph in model.graphs() for _ in graph)
    for graph in model.graphs():
        for node in graph:
            if _is_idle_dropout(node) or _is_of_one(node):
                node.op_type = "Identity"
                node.attributes.clear()
                node.resize_inputs(1)
                node.resize_outputs(1)
    IdentityEliminationPass()(model)
    return before - sum(1 for graph in model.graphs() for _ in graph)


def _is_of_one(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in _OF_MANY and len(node.inputs) == 1


def _is_idle_dropout(node: ir.Node) -> bool:
    if (node.domain, node.op_type) != ("", "Dropout"):
        return False
    is_trained = len(node.inputs) > 2 and node.inputs[2] is not None
    has_mask = len(node.outputs) > 1 and (node.outputs[1].is_graph_output() or bool(node.outputs[1].uses()))
    return not is_trained and not has_mask
