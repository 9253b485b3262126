"""Sizes behind a mark taken from the marked tensors, so that a part that starts there can stand alone.

torch.export computes every size from those of the inputs, though a feature map's height can be read from the map::

    before: Shape(image) -> (h - 1) // 4 + 1 -> Resize       after: Shape(marked map) -> Resize
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from torchferry.graph.marks import is_mark

if TYPE_CHECKING:
    Expression = Any  # sympy's, which has no types
    Read = tuple[ir.Value, int]  # a tensor and its axis
    Computed = tuple[ir.Value, tuple[ir.Value, ...]]  # a value and what it is computed from instead

# What torch.onnx computes sizes with, besides Shape.
_ARITHMETIC = frozenset(
    ("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Floor", "Cast", "Max", "Min", "Squeeze", "Reshape", "Concat")
)


def take_sizes_from_marks(model: ir.Model, program: torch.export.ExportedProgram) -> None:
    """Let what stands behind a mark read its sizes from the marked tensors, where they have these sizes.

    Args:
        model: torch.onnx's translation, not optimised; changed in place.
        program: What it was translated from; knows each size as an expression of the inputs' sizes.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    sizes: dict[ir.Value, Expression] = {}
    marked: dict[ir.Value, list[Expression]] = {}
    for fx_node in program.graph.nodes:
        value = values.get(fx_node.name)
        meaning: Any = fx_node.meta.get("val")
        if value is None:
            continue
        producer = value.producer()
        if isinstance(meaning, torch.SymInt):
            sizes[value] = _expression(meaning)
        elif isinstance(meaning, torch.Tensor) and producer is not None and is_mark(producer):
            marked[value] = [_expression(size) for size in meaning.shape]
    if marked and sizes:
        _Taking(graph, sizes, marked).run()


def _expression(size: Any) -> Expression:
    """Return what a size is in terms of the inputs' sizes; None for a number."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


class _Taking:
    def __init__(
        self, graph: ir.Graph, sizes: dict[ir.Value, Expression], marked: dict[ir.Value, list[Expression]]
    ) -> None:
        self.graph, self.sizes = graph, sizes
        nodes = list(graph)
        self.place = {node: number for number, node in enumerate(nodes)}
        self.ancestors = _ancestors(nodes, set(marked))
        # For a size, the tensors that have it, in the graph's order, each with the axis.
        self.holders: dict[Expression, list[Read]] = {}
        for value, shape in marked.items():
            for axis, expr in enumerate(shape):
                if expr is not None:
                    self.holders.setdefault(expr, []).append((value, axis))
        self.made: dict[Read | Computed, ir.Value] = {}

    def run(self) -> None:
        for size in list(self.sizes):
            for user, index in list(size.uses()):
                # What only computes other sizes is done again where those are used.
                if user.graph is not self.graph or user not in self.place or self._is_size(user):
                    continue
                taken = self._taken(size, user)
                if taken is not None:
                    user.replace_input_with(index, taken)

    def _is_size(self, node: ir.Node) -> bool:
        return any(output in self.sizes for output in node.outputs)

    def _taken(self, value: ir.Value, user: ir.Node) -> ir.Value | None:
        """Return a value equal to this one that comes from marked tensors before the user; None if there is none."""
        held = [h for h in self.holders.get(self.sizes.get(value), ()) if self.place[_maker(h[0])] < self.place[user]]
        if held:
            own = self.ancestors[user]
            return self._read(*next((h for h in reversed(held) if h[0] in own), held[-1]))
        node = value.producer()
        if node is None:
            return value if value.is_initializer() else None
        if node.op_type == "Constant":
            return value
        if node.op_type not in _ARITHMETIC or node.domain or len(node.outputs) != 1:
            return None
        inputs = [None if each is None else self._taken(each, user) for each in node.inputs]
        if any(new is None and old is not None for new, old in zip(inputs, node.inputs, strict=True)):
            return None
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            return value
        return self._again(node, [each for each in inputs if each is not None])

    def _read(self, tensor: ir.Value, axis: int) -> ir.Value:
        """Return the size of an axis of a marked tensor, as a scalar."""
        if (tensor, axis) not in self.made:
            shape = ir.node("Shape", [tensor], attributes={"start": axis, "end": axis + 1})
            scalar = ir.node("Squeeze", [shape.outputs[0]])
            for node, dims in ((shape, [1]), (scalar, [])):
                node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.INT64, ir.Shape(dims)
                node.metadata_props.update(_maker(tensor).metadata_props)
            self.graph.insert_after(_maker(tensor), [shape, scalar])
            self.made[tensor, axis] = scalar.outputs[0]
        return self.made[tensor, axis]

    def _again(self, node: ir.Node, inputs: list[ir.Value]) -> ir.Value:
        """Compute what a node computes from other inputs, right behind the last of them."""
        key = (node.outputs[0], tuple(inputs))
        if key not in self.made:
            copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=1)
            copy.outputs[0].type, copy.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            copy.metadata_props.update(node.metadata_props)
            makers = {maker for value in inputs if (maker := value.producer()) is not None}
            last = next(each for each in reversed(self.graph) if each in makers)
            self.graph.insert_after(last, copy)
            self.made[key] = copy.outputs[0]
        return self.made[key]


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _ancestors(nodes: list[ir.Node], wanted: set[ir.Value]) -> dict[ir.Node, frozenset[ir.Value]]:
    """Return, for each node, those of the wanted values that it follows from."""
    found: dict[ir.Node, frozenset[ir.Value]] = {}
    for node in nodes:
        before: set[ir.Value] = set()
        for value in node.inputs:
            if value is not None and (maker := value.producer()) in found:
                assert maker is not None
                before |= found[maker]
                if value in wanted:
                    before.add(value)
        found[node] = frozenset(before)
    return found
