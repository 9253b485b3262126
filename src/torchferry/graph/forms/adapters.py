"""Changes of standard operators that ONNX's version converter lacks or gets wrong.

An adapter takes a node in the form before a change and returns nodes in the form after it. ``upgrades.py`` and
``downgrades.py`` hold them; this is what they are made with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from torchferry.graph.forms.schemas import NodeError, node_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchferry.graph.forms.scope import Scope

    Adapter = Callable[["Rewrite"], list[NodeProto]]
    # By operator and by the opset that brought the change.
    Adapters = dict[tuple[str, int], Adapter]

# Operators that mean something else from an opset on, in a form that is valid before and after.
MEANING_CHANGED = {
    ("DFT", 20),
    ("GroupNormalization", 21),
    ("Hardmax", 13),
    ("LogSoftmax", 13),
    ("Resize", 11),
    ("RoiAlign", 16),
    ("Softmax", 13),
}


class Rewrite:
    """One node on its way over one change.

    Args:
        node: The node in the form before the change.
        scope: What is known about its inputs.
        target: The opset that the whole conversion is for, on the other side of the change.
    """

    def __init__(self, node: NodeProto, scope: Scope, target: int) -> None:
        self.node = node
        self.scope = scope
        self.target = target
        self.inputs = list(node.input)
        self.given: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._nodes: list[NodeProto] = []

    def refusal(self, reason: str) -> NodeError:
        """Make the error that says why the change cannot be made."""
        message = f"'{self.node.op_type}' cannot be written for opset {self.target}: {reason}"
        return node_error(self.node, message)

    def input(self, index: int) -> str:
        """Return the name of an input; empty if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def settled(self, index: int, role: str) -> np.ndarray | None:
        """Return the value of an input that becomes an attribute; None if it is left out.

        Raises:
            NodeError: If it is computed by the graph.
        """
        name = self.input(index)
        if not name:
            return None
        value = self.scope.constant(name)
        if value is None:
            raise self.refusal(f"'{role}' has to be a constant there, '{name}' is computed")
        return value

    def rank(self) -> int:
        """Return the rank of the first input.

        Raises:
            NodeError: If it is not known.
        """
        shape = self.scope.shape(self.inputs[0])
        if shape is None:
            raise self.refusal(f"the rank of '{self.inputs[0]}' is not known")
        return len(shape)

    def constant(self, value: Any, dtype: Any, role: str) -> str:
        """Add a constant before the node; returns its name."""
        tensor = numpy_helper.from_array(np.asarray(value, dtype))
        return self.add("Constant", [], role, value=tensor)

    def add(self, operator: str, inputs: list[str], role: str, **attributes: Any) -> str:
        """Add a node with one output before the node; returns the output's name, which ends in its role."""
        name = self.scope.fresh(f"{next(filter(None, self.node.output))}_{role}")
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def scalar_like(self, value: float, tensor: str, role: str) -> str:
        """Add a number of the dtype that a tensor has, even if that shows only when the graph runs."""
        elem_type = self.scope.dtype(tensor)
        if elem_type:
            return self.constant(value, helper.tensor_dtype_to_np_dtype(elem_type), role)
        if self.target < 15:
            raise self.refusal(f"the dtype of '{tensor}' is not known")
        return self.add("CastLike", [self.constant(value, np.float32, role), tensor], role)

    def result(self, inputs: list[str], operator: str | None = None, **attributes: Any) -> list[NodeProto]:
        """Return what was added, and the node that gives the outputs, of the same operator unless another is named."""
        last = helper.make_node(operator or self.node.op_type, inputs, list(self.node.output), **attributes)
        return [*self._nodes, last]


def adapter(table: Adapters, opset: int, *operators: str) -> Callable[[Adapter], Adapter]:
    """Enter an adapter into a table, for a change that an opset brought to some operators."""

    def register(function: Adapter) -> Adapter:
        table.update({(operator, opset): function for operator in operators})
        return function

    return register
