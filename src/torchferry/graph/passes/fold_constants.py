"""Numbers in place of what is computed from numbers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_BYTES = 1 << 16  # of a result; sizes and the like are small, and weights had better be left alone
_BY_CHANCE = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def apply(model: ir.Model) -> int:
    """Compute what depends on no input, and the shapes of tensors of fixed sizes.

    ``y = Reshape(x, Cast(Shape(x)))`` → ``y = Reshape(x, [2, 3])``, where ``x`` is of 2 by 3. Large results and the
    insides of branches and loops are left alone.

    Returns:
        The number of nodes computed.
    """
    if any(output.shape is None for node in model.graph for output in node.outputs):
        ShapeInferencePass()(model)
    opset = model.opset_imports.get("", 1)
    known: dict[ir.Value, np.ndarray[Any, Any]] = {}
    folded = 0
    for node in list(model.graph):
        results = _computed(node, known, opset)
        if results is None or any(array.nbytes > _MOST_BYTES for array in results):
            continue
        known.update(zip(node.outputs, results, strict=True))
        if node.op_type != "Constant":
            known.update(zip(_replace(model.graph, node, results), results, strict=True))
            folded += 1
    if folded:
        RemoveUnusedNodesPass()(model)
    return folded


def _computed(
    node: ir.Node, known: dict[ir.Value, np.ndarray[Any, Any]], opset: int
) -> list[np.ndarray[Any, Any]] | None:
    """Return what a node gives; None if that depends on an input, or onnx's evaluator does not know it."""
    if node.domain or node.op_type in _BY_CHANCE or _has_graph(node):
        return None
    if node.op_type == "Shape":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        start, end = (node.attributes[name].value if name in node.attributes else None for name in ("start", "end"))
        sizes = list(shape)[start:end] if shape is not None else [None]
        return [np.array(sizes, np.int64)] if all(isinstance(size, int) for size in sizes) else None
    given = [None if value is None else _constant(value, known) for value in node.inputs]
    if any(value is not None and array is None for value, array in zip(node.inputs, given, strict=True)):
        return None
    return _evaluated(node, given, opset)


def _constant(value: ir.Value, known: dict[ir.Value, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any] | None:
    if value in known:
        return known[value]
    tensor = value.const_value
    if tensor is None or not value.is_initializer() or tensor.nbytes > _MOST_BYTES:
        return None
    known[value] = tensor.numpy()
    return known[value]


def _evaluated(
    node: ir.Node, given: Sequence[np.ndarray[Any, Any] | None], opset: int
) -> list[np.ndarray[Any, Any]] | None:
    names = [f"i{place}" if array is not None else "" for place, array in enumerate(given)]
    proto = ir.to_proto(node)
    del proto.input[:]
    proto.input.extend(names)
    feeds = {name: array for name, array in zip(names, given, strict=True) if array is not None}
    try:
        with np.errstate(all="ignore"):
            results = _evaluator(proto, opset).run(None, feeds)
    except Exception:  # noqa: BLE001 - whatever onnx's evaluator cannot compute stays in the graph
        return None
    arrays = [np.asarray(array) for array in results]
    return arrays if len(arrays) == len(node.outputs) else None


def _evaluator(proto: Any, opset: int) -> ReferenceEvaluator:
    inputs = [onnx.ValueInfoProto(name=name) for name in proto.input if name]
    graph = helper.make_graph([proto], "g", inputs, [onnx.ValueInfoProto(name=name) for name in proto.output])
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]))


def _has_graph(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _replace(graph: ir.Graph, node: ir.Node, results: Sequence[np.ndarray[Any, Any]]) -> list[ir.Value]:
    made = [ir.node("Constant", [], {"value": ir.tensor(array)}) for array in results]
    values = [each.outputs[0] for each in made]
    for each, old, array in zip(made, node.outputs, results, strict=True):
        each.metadata_props.update(node.metadata_props)
        each.outputs[0].type, each.outputs[0].shape = old.type, ir.Shape(array.shape)
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, list(node.outputs), values)
    return values
