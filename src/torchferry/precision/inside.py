"""The inside of an operator, written out as nodes of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from torchferry.precision.nodes import new_node

if TYPE_CHECKING:
    from collections.abc import Sequence

# Notes on an opened node: what the emulator must know of its output.
ROLE_KEY = "torchferry.fp16.role"
EXACT = "exact"  # no tensor that an engine would hold in FP16, such as a count
SATURATES = "saturates"  # an infinity here is what the next operator takes as its limit: exp(-inf), tanh(inf)

_AXES_INPUT = {"ReduceSum": 13}  # the opset since which axes are an input; 18 for all others


class Inside:
    """The inside of one node, while it is written out.

    Attributes:
        node: The node that is opened.
        x: Its first input.
        opset: Of the default domain.
    """

    def __init__(self, node: ir.Node, root: ir.Graph, opset: int) -> None:
        assert node.inputs[0] is not None  # every operator of the table has a first input
        self.node = node
        self.x: ir.Value = node.inputs[0]
        self.opset = opset
        self.dtype = self.x.dtype or ir.DataType.FLOAT
        self._root = root
        self._nodes: list[ir.Node] = []
        self._constants: list[ir.Value] = []

    def attribute(self, name: str, default: Any) -> Any:
        """Return one of the node's attributes."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def input(self, index: int) -> ir.Value | None:
        """Return one of the node's inputs; None if it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    @property
    def rank(self) -> int | None:
        """Number of axes of the first input; None if unknown."""
        return None if self.x.shape is None else len(self.x.shape)

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        role: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output of the node's own dtype, or of another."""
        name = f"{self.node.outputs[0].name}/{len(self._nodes)}_{op_type}"
        node = new_node(op_type, inputs, name, dtype or self.dtype, attributes)
        node.metadata_props.update(self.node.metadata_props)
        if role:
            node.metadata_props[ROLE_KEY] = role
        self._nodes.append(node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        """Add a constant of the node's dtype."""
        return self._constant(np.array(value, self.dtype.numpy()))

    def integers(self, values: Sequence[int]) -> ir.Value:
        """Add a constant that lists integers."""
        return self._constant(np.array(values, np.int64))

    def _constant(self, array: Any) -> ir.Value:
        name = f"{self.node.outputs[0].name}/constant_{len(self._constants)}"
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._root.register_initializer(value)
        self._constants.append(value)
        return value

    def reduce(
        self, op_type: str, x: ir.Value, axes: Sequence[int] | ir.Value | None, keepdims: int = 1, **attributes: Any
    ) -> ir.Value:
        """Add a reduction, with its axes where this opset has them."""
        attributes["keepdims"] = keepdims
        if axes is None:
            return self.op(op_type, x, **attributes)
        if self.opset >= _AXES_INPUT.get(op_type, 18):
            return self.op(op_type, x, axes if isinstance(axes, ir.Value) else self.integers(axes), **attributes)
        assert not isinstance(axes, ir.Value)  # where axes are no input, the node has them as an attribute
        return self.op(op_type, x, axes=list(axes), **attributes)

    def own_axes(self) -> Sequence[int] | ir.Value | None:
        """Return what the node itself reduces over."""
        return self.input(1) if self.input(1) is not None else self.attribute("axes", None)

    def mean(self, x: ir.Value, axes: Sequence[int] | ir.Value | None, keepdims: int = 1) -> ir.Value:
        """Add a mean, by its sum."""
        total = self.reduce("ReduceSum", x, axes, keepdims)
        return self.op("Mul", total, self._one_over_count(x, axes))

    def _one_over_count(self, x: ir.Value, axes: Sequence[int] | ir.Value | None) -> ir.Value:
        sizes = None if x.shape is None else [size if isinstance(size, int) else None for size in x.shape]
        if isinstance(axes, ir.Value):
            known = None if axes.const_value is None else axes.const_value.numpy().tolist()
        else:
            known = axes if axes is not None or sizes is None else range(len(sizes))
        if sizes is not None and known is not None and all(sizes[axis] for axis in known):
            return self.number(1 / math.prod(sizes[axis] or 1 for axis in known))
        integer = ir.DataType.INT64
        if axes is None:
            count = self.op("Size", x, dtype=integer)
        else:
            chosen = axes if isinstance(axes, ir.Value) else self.integers(axes)
            counts = self.op("Gather", self.op("Shape", x, dtype=integer), chosen, dtype=integer)
            count = self.op("ReduceProd", counts, dtype=integer, keepdims=0)
        exact = self.op("Cast", count, to=self.dtype, role=EXACT)
        return self.op("Reciprocal", exact)

    def normalised(
        self, x: ir.Value, axes: Sequence[int], eps: float, centred: bool = True
    ) -> tuple[ir.Value, ir.Value | None, ir.Value]:
        """Return ``(x - mean) / std``, the mean if there is one, and ``std``."""
        mean = self.mean(x, axes) if centred else None
        d = x if mean is None else self.op("Sub", x, mean)
        d.shape = d.shape or x.shape
        variance = self.mean(self.square(d), axes)
        std = self.op("Sqrt", self.op("Add", variance, self.number(eps)))
        return self.op("Div", d, std), mean, std

    def square(self, x: ir.Value) -> ir.Value:
        """Add a square."""
        square = self.op("Mul", x, x)
        square.shape = x.shape
        return square

    def scaled(self, x: ir.Value, scale: ir.Value | None, bias: ir.Value | None) -> ir.Value:
        """Add a scale and a bias, each if there is one."""
        x = x if scale is None else self.op("Mul", x, scale)
        return x if bias is None else self.op("Add", x, bias)

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Add a reshape to known sizes."""
        return self.op("Reshape", x, self.integers(shape), dtype=x.dtype)

    def reshape_like(self, x: ir.Value, other: ir.Value) -> ir.Value:
        """Add a reshape to another tensor's sizes."""
        return self.op("Reshape", x, self.op("Shape", other, dtype=ir.DataType.INT64))

    def discard(self) -> None:
        """Take back everything that was added."""
        for node in reversed(self._nodes):
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        for constant in self._constants:
            assert constant.name is not None  # named above
            del self._root.initializers[constant.name]

    def replace(self, outputs: Sequence[ir.Value]) -> None:
        """Put the new nodes in the place of the old one."""
        graph = self.node.graph
        assert graph is not None  # it was found in one
        ir.convenience.replace_nodes_and_values(
            graph, self.node, [self.node], self._nodes, self.node.outputs[: len(outputs)], outputs
        )
