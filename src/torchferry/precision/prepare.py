"""A copy of a graph to solve scales on, or to quantise: functions inlined, a constant for every use, masks bounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from torchferry.core.errors import FormatError
from torchferry.precision.degrees import attribute, constant, is_float
from torchferry.precision.opened import inline_functions, open_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from torchferry.graph import Exported

MASK_FROM = -(2.0**15)
"""What lies at or below this in a constant that ends in a softmax is a mask."""
MASK_BECOMES = -(2.0**13)
"""What a mask becomes: exp of it is 0 beside any score that it does not outweigh, and it leaves room for the scores."""

GATES = frozenset(("Gelu", "HardSwish", "Swish", "Mish", "Softplus"))
"""Operators that are x times a gate, or nearly x far from zero."""

_DEFAULT_EPSILON = {
    "BatchNormalization": 1e-5,
    "GroupNormalization": 1e-5,
    "InstanceNormalization": 1e-5,
    "LayerNormalization": 1e-5,
    "RMSNormalization": 1e-5,
}
_DEFAULTS: dict[str, dict[str, float]] = {
    **{name: {"epsilon": value} for name, value in _DEFAULT_EPSILON.items()},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "ThresholdedRelu": {"alpha": 1.0},
    "Shrink": {"lambd": 0.5, "bias": 0.0},
}
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_SCALED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)  # before and after
# What a mask may pass on its way to a softmax.
_MASK_PATH = (
    *("Add", "Sub", "Where", "Mul", "Min", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Slice", "Tile"),
    *("Identity", "Concat", "Gather", "GatherND", "Trilu", "ScatterND", "ScatterElements", "Cast", "Pad", "Softmax"),
    *("CastLike", "ReduceMax"),  # softmax(x) = softmax(x - max(x))
)


@dataclass
class Prepared:
    """A graph ready to be solved.

    Attributes:
        model: FP32, without functions; every node has a name, every value a dtype.
        source: The constant of the user's graph that a constant was copied from.
        masks: Constants that were bounded, with what they held.
        opened: Nodes that were opened because their operand leaves FP16's range, with the operator.
        made: Constants that came with opening.
    """

    model: ir.Model
    source: dict[str, str] = field(default_factory=dict)
    masks: dict[str, float] = field(default_factory=dict)
    opened: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes of the main graph, in order."""
        return list(self.model.graph)


def prepare(
    exported: Exported, *, split: bool = True, tied: Collection[str] = (), bound_masks: bool = True
) -> Prepared:
    """Copy a graph into the form that scales are solved on.

    Args:
        exported: An FP32 graph; it is not changed, its weights are not copied.
        split: Let every use of a constant have a scale of its own.
        tied: Constants that keep one for all uses.
        bound_masks: Bound what hides scores from a softmax.

    Raises:
        FormatError: If the graph has FP16 tensors already, or values whose dtype cannot be told.
    """
    model = exported.model.clone()
    inline_functions(model)
    for step in (common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), common.NameFixPass()):
        step(model)
    if any(value.dtype is None for value in values(model.graph)):
        common.ShapeInferencePass()(model)
    _require_fp32(model)
    prepared = Prepared(model)
    for node in model.graph:
        for name, value in _DEFAULTS.get(node.op_type, {}).items():
            if name not in node.attributes:
                node.attributes[name] = ir.AttrFloat32(name, value)
    if split:
        _split_constants(prepared, tied)
    if bound_masks:
        prepared.masks.update(_bound_masks(model.graph))
    return prepared


def open_out_of_range(prepared: Prepared, leaves_range: Callable[[str], bool]) -> bool:
    """Open what needs its true operand where that leaves FP16's range, so that a clip can stand before the flat part.

    Gates become ``x * gate(x)``; a softmax becomes that of ``x - max(x)``, which is the same and never above 0.

    Args:
        prepared: Changed in place.
        leaves_range: Tells it of a tensor by name.

    Returns:
        Whether anything was opened.
    """
    graph = prepared.model.graph

    def is_concerned(node: ir.Node) -> bool:
        return any(is_float(v) and v is not None and leaves_range(v.name or "") for v in node.inputs[:1])

    gates = [node for node in graph if node.op_type in GATES and is_concerned(node)]
    softmaxes = [n for n in graph if n.op_type == "Softmax" and is_concerned(n) and n.name not in prepared.opened]
    before = set(graph.initializers)
    prepared.opened.update({node.name or "": node.op_type for node in [*gates, *softmaxes]})
    open_sums(prepared.model, only=set(gates).__contains__)
    for node in softmaxes:
        _subtract_maximum(graph, node)
    prepared.made.update(set(graph.initializers) - before)
    return bool(gates or softmaxes)


def _subtract_maximum(graph: ir.Graph, node: ir.Node) -> None:
    x = node.inputs[0]
    assert x is not None  # a softmax has an operand
    name = node.outputs[0].name
    axes = ir.Tensor(np.array([attribute(node, "axis", -1)], np.int64), name=f"{name}/axes")
    value = ir.Value(name=axes.name, type=ir.TensorType(axes.dtype), shape=axes.shape, const_value=axes)
    graph.register_initializer(value)
    largest = ir.Value(name=f"{name}/max", type=x.type)
    shifted = ir.Value(name=f"{name}/shifted", type=x.type, shape=x.shape)
    new = [
        ir.node("ReduceMax", [x, value], {"keepdims": 1}, outputs=[largest], name=f"{name}/max"),
        ir.node("Sub", [x, largest], outputs=[shifted], name=f"{name}/shifted"),
    ]
    for each in new:
        each.metadata_props.update(node.metadata_props)
    graph.insert_before(node, new)
    node.replace_input_with(0, shifted)


def values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Give every value of a graph once: inputs, constants, outputs of nodes."""
    yield from graph.inputs
    yield from (v for v in graph.initializers.values() if not v.is_graph_input())
    for node in graph:
        yield from (v for v in node.outputs if v.name)


def has_body(node: ir.Node) -> bool:
    """Tell whether a node holds a graph of its own."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _require_fp32(model: ir.Model) -> None:
    for value in values(model.graph):
        if value.dtype in _HALF:
            raise FormatError(
                f"'{value.name}' is {value.dtype.name} already, where an FP32 graph is needed",
                hint="export the model in FP32",
            )
        if value.dtype is None and value.type is None and value.uses():
            raise FormatError(
                f"the dtype of '{value.name}' is not known", hint="run ONNX's shape inference on the graph first"
            )


def _split_constants(prepared: Prepared, tied: Collection[str]) -> None:
    graph = prepared.model.graph
    taken = set(graph.initializers) | {value.name for value in values(graph)}
    for name, value in list(graph.initializers.items()):
        if not is_float(value) or value.is_graph_output() or value.is_graph_input() or name in tied:
            continue
        for number, (node, index) in enumerate(list(value.uses())[1:], 1):
            if node.graph is not graph:
                continue  # inside a body
            copy_name = f"{name}.use{number}"
            while copy_name in taken:
                copy_name += "_"
            taken.add(copy_name)
            copy = ir.Value(name=copy_name, type=value.type, shape=value.shape, const_value=value.const_value)
            graph.register_initializer(copy)
            node.replace_input_with(index, copy)
            prepared.source[copy_name] = name


def _bound_masks(graph: ir.Graph) -> dict[str, float]:
    """Bound what hides scores from a softmax; only ``-inf``-like constants that go nowhere else."""
    bounded: dict[str, float] = {}
    for name, value in graph.initializers.items():
        array: Any = constant(value) if is_float(value) else None
        if array is None or not array.size or not (array <= MASK_FROM).any():
            continue
        if (array[array > MASK_FROM] > -MASK_FROM).any() or mask_path(value) is None:
            continue
        bounded[name] = float(array.min())
        value.const_value = ir.Tensor(bounded_mask(array), name=name)
    return bounded


def bounded_mask(array: Any) -> Any:
    """Return a mask with ``MASK_BECOMES`` wherever it hides something."""
    return np.where(array <= MASK_FROM, np.float32(MASK_BECOMES), array).astype(np.float32)


def mask_path(value: ir.Value) -> set[str] | None:
    """Return the tensors between a mask and the softmaxes that it ends in; None if it goes anywhere else."""
    pending, seen, found = [value], {value.name or ""}, False
    while pending:
        current = pending.pop()
        if current.is_graph_output():
            return None
        for node, _ in current.uses():
            if node.op_type not in _MASK_PATH:
                return None
            if node.op_type == "Softmax":
                found = True
                continue
            new = [o for o in node.outputs if o.dtype in _SCALED and o.name not in seen]
            seen.update(output.name or "" for output in new)
            pending += new
    return seen if found else None
