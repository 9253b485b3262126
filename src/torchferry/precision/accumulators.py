"""How large an accumulator can become, in whatever order an engine adds: the same operator on magnitudes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from torchferry.precision.nodes import new_node

_ACCUMULATING = frozenset(("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "ReduceSum"))


def accumulator_bound(node: ir.Node) -> tuple[list[ir.Node], ir.Value | None]:
    """Return nodes for the largest ``|W|·|x| + |b|`` of a node, and its value; nothing if the node adds nothing up.

    No partial sum of the node's products exceeds it. A sum of numbers that have one sign is its own bound, and is left
    out.

    Args:
        node: Of a graph in which its inputs are known; not changed.
    """
    if node.op_type not in _ACCUMULATING or node.domain not in ("", "ai.onnx") or _is_positive_sum(node):
        return [], None
    nodes: list[ir.Node] = []

    def op(
        op_type: str, inputs: list[ir.Value | None], attributes: dict[str, Any], dtype: ir.DataType | None
    ) -> ir.Value:
        name = f"{node.outputs[0].name}/bound_{len(nodes)}"
        nodes.append(new_node(op_type, inputs, name, dtype or ir.DataType.FLOAT, attributes))
        return nodes[-1].outputs[0]

    magnitudes = [
        op("Abs", [value], {}, value.dtype) if value is not None and _is_summed(node, index) else value
        for index, value in enumerate(node.inputs)
    ]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {name: abs(attributes[name]) for name in ("alpha", "beta") if name in attributes}
    dtype = node.outputs[0].dtype
    bound = op(node.op_type, magnitudes, attributes, dtype)
    return nodes, op("ReduceMax", [bound], {"keepdims": 0}, dtype)


def _is_summed(node: ir.Node, index: int) -> bool:
    return node.op_type != "ReduceSum" or index == 0  # the other input of a ReduceSum is its axes


def _is_positive_sum(node: ir.Node) -> bool:
    if node.op_type != "ReduceSum" or node.inputs[0] is None:
        return False
    maker = node.inputs[0].producer()
    while maker is not None and maker.op_type == "Cast" and maker.inputs[0] is not None:  # the rounding between them
        maker = maker.inputs[0].producer()
    if maker is None:
        return False
    is_square = maker.op_type == "Mul" and maker.inputs[0] is maker.inputs[1]
    return is_square or maker.op_type in ("Abs", "Exp", "Relu", "Sigmoid", "Softmax", "Sqrt")
