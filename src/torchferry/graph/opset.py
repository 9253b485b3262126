"""A whole graph from one opset to another, node by node, its weights untouched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx import AttributeProto, GraphProto, NodeProto, ValueInfoProto
from onnx_ir.passes.common import ShapeInferencePass

from torchferry.core.errors import OperatorError
from torchferry.graph.forms.conversion import convert_node
from torchferry.graph.forms.schemas import STANDARD_DOMAINS, NodeError, form_error, type_error
from torchferry.graph.forms.scope import SMALL_BYTES, Scope, used_names
from torchferry.graph.provenance import SOURCE_KEY
from torchferry.graph.validity import ir_version_for, require_known

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    # What stands in the way, with the node of the user's graph.
    Failure = tuple[ir.Node, NodeError]

# The version of the file format that brought functions.
_FUNCTIONS_IR_VERSION = 8


def convert_opset(model: ir.Model, opset: int) -> ir.Model:
    """Return a model whose standard nodes are those of another opset and do the same.

    A node whose operator did not change in between is kept, every other is rewritten on its own. Below opset 14
    ``Reshape`` cannot make an axis of size 0: one whose sizes are computed is taken not to.

    Args:
        model: The graph; it is not changed, and shares its weights with the result.
        opset: The opset wanted, older or newer.

    Returns:
        A copy with the same names of inputs, outputs and weights, or the model itself if it has that opset. Nodes of
        other domains are as they were; the properties of a node are on all nodes that came of it.

    Raises:
        OperatorError: If an operator is in the way; names all such, and the nearest opset that can be had.
    """
    require_known(opset)
    source = model.opset_imports.get("", model.opset_imports.get("ai.onnx", opset))
    if source == opset:
        return model
    converted, failures = _attempt(model, opset)
    if not failures:
        return converted
    step = 1 if source > opset else -1
    nearest = next((each for each in range(opset + step, source, step) if not _attempt(model, each)[1]), source)
    reasons = {node.op_type: error.message for node, error in reversed(failures)}
    texts = [text if text.startswith(f"'{name}'") else f"'{name}': {text}" for name, text in sorted(reasons.items())]
    node, error = failures[0]
    raise OperatorError(
        f"the graph cannot go from opset {source} to {opset}: {'; '.join(texts)}",
        where=node.metadata_props.get(SOURCE_KEY) or None,
        hint=f"ask for opset {nearest}",
    ) from error


def _attempt(model: ir.Model, opset: int) -> tuple[ir.Model, list[Failure]]:
    """Convert a copy as far as it goes."""
    source = model.opset_imports.get("", model.opset_imports.get("ai.onnx", opset))
    copy = model.clone()
    if any(output.type is None for node in copy.graph for output in node.outputs):
        ShapeInferencePass()(copy)
    failures = _convert_nodes(copy.graph, source, opset)
    _import(copy.opset_imports, opset)
    for function in copy.functions.values():
        imports = function.opset_imports
        failures += _convert_nodes(function, imports.get("", imports.get("ai.onnx", opset)), opset)
        _import(imports, opset)
    needed = max(ir_version_for(opset), _FUNCTIONS_IR_VERSION if copy.functions else 0)
    copy.ir_version = needed if opset < source else max(needed, copy.ir_version)
    return copy, failures


def _import(imports: MutableMapping[str, int], opset: int) -> None:
    imports.pop("ai.onnx", None)
    imports[""] = opset


def _convert_nodes(root: ir.Graph | ir.Function, source: int, target: int) -> list[Failure]:
    nodes = list(ir.traversal.RecursiveGraphIterator(root))
    scope = Scope(taken=_names(root, nodes))
    failures = []
    for node in nodes:
        if node.domain not in STANDARD_DOMAINS:
            continue
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                _tell(scope, value)
        try:
            _convert(node, source, target, scope)
        except NodeError as refusal:
            failures.append((node, refusal))
    return failures


def _convert(node: ir.Node, source: int, target: int, scope: Scope) -> None:
    """Put what a node is at the target in its place."""
    if node.op_type == "Constant" and "value" in node.attributes:  # it may be large, and has one form everywhere
        error = type_error(NodeProto(op_type="Constant", output=[node.outputs[0].name or ""]), target, scope.type_of)
    else:
        proto = _proto(node)
        made = convert_node(proto, source, target, scope)
        if made != [proto]:
            _replace(node, made, scope)
            return
        error = form_error(proto, target)
    if error is not None:
        raise error
    if node.version is not None:
        node.version = target


def _names(root: ir.Graph | ir.Function, nodes: list[ir.Node]) -> set[str]:
    """Return the names in use, of values and of nodes."""
    graphs = {root, *(node.graph for node in nodes if node.graph is not None)}
    values = [value for node in nodes for value in (*node.inputs, *node.outputs)]
    for graph in graphs:
        values.extend(graph.inputs)
        if isinstance(graph, ir.Graph):
            values.extend(graph.initializers.values())
    return {value.name or "" for value in values if value is not None} | {node.name or "" for node in nodes}


def _proto(node: ir.Node) -> NodeProto:
    """Write a node without what its subgraphs hold."""
    proto = NodeProto(op_type=node.op_type, name=node.name or "")
    proto.input.extend(value.name or "" if value is not None else "" for value in node.inputs)
    proto.output.extend(value.name or "" for value in node.outputs)
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) and not attribute.is_ref():
            proto.attribute.append(AttributeProto(name=attribute.name, type=attribute.type.name))
        else:
            proto.attribute.append(ir.serde.serialize_attribute(attribute))
    return proto


def _tell(scope: Scope, value: ir.Value) -> None:
    """Tell a scope what the graph knows about a value."""
    name = value.name or ""
    if value.type is not None:
        scope.types.setdefault(name, ir.serde.serialize_value(value).type)
    tensor = _constant(value)
    if name not in scope.constants and tensor is not None and tensor.nbytes <= SMALL_BYTES:
        scope.hold(name, ir.serde.serialize_tensor(tensor))


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    if value.const_value is not None:
        return None if value.is_graph_input() else value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain not in STANDARD_DOMAINS:
        return None
    attribute = next(iter(producer.attributes.values()))
    if attribute.is_ref() or "string" in attribute.name or attribute.name == "sparse_value":
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor()
    return ir.tensor(attribute.value, dtype=ir.DataType.FLOAT if "float" in attribute.name else ir.DataType.INT64)


def _replace(node: ir.Node, protos: list[NodeProto], scope: Scope) -> None:
    """Put nodes in the place of one; they take over its name, its properties and its outputs."""
    graph = node.graph
    assert graph is not None
    made = {name for proto in protos for name in proto.output}
    used = dict.fromkeys(name for proto in protos for name in used_names(proto) if name not in made)
    inner = made - {value.name for value in node.outputs}
    piece = ir.serde.deserialize_graph(
        GraphProto(
            name="piece",
            node=protos,
            input=[ValueInfoProto(name=name) for name in used],
            value_info=[ValueInfoProto(name=name, type=scope.types[name]) for name in inner if name in scope.types],
        )
    )
    known = {value.name: value for value in node.inputs if value is not None}
    for value in piece.inputs:
        ir.convenience.replace_all_uses_with(value, known[value.name])
    nodes = list(piece)
    outputs = {value.name: value for each in nodes for value in each.outputs}
    piece.remove(nodes)
    for each in nodes:
        each.name = scope.fresh(f"{node.name}_part") if node.name and each is not nodes[-1] else node.name
        each.metadata_props.update(node.metadata_props)
    kept = [value for value in node.outputs if value.name in outputs]
    inputs = list(known.values())
    new = [outputs[value.name] for value in kept]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, kept, new)
    for value in inputs:
        _drop_unused(value)


def _drop_unused(value: ir.Value) -> None:
    """Remove a constant that has become an attribute, unless something else needs it."""
    producer = value.producer()
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    if value.is_initializer() and value.graph is not None:
        del value.graph.initializers[value.name or ""]
    elif producer is not None and producer.op_type == "Constant" and producer.graph is not None:
        producer.graph.remove(producer)
