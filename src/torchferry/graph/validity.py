"""Nodes in any form that ONNX ever had, made valid at one opset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx import helper
from onnx.shape_inference import InferenceError

from torchferry.core.errors import OperatorError
from torchferry.graph.forms.conversion import convert_node
from torchferry.graph.forms.schemas import (
    NEWEST_OPSET,
    STANDARD_DOMAINS,
    NodeError,
    first_valid,
    form_error,
    is_end,
    is_standard,
    node_error,
    schema_at,
    subgraphs,
    type_error,
    versions,
)
from torchferry.graph.forms.scope import Scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx import GraphProto, ModelProto, NodeProto


def make_valid(fragment: ModelProto, opset: int) -> ModelProto:
    """Return a fragment in which every standard node is valid at an opset and does what it did.

    A node that is valid as it is written is kept. Otherwise it is read in the newest older opset that allows its form,
    such as ``Squeeze(x, axes=[0])`` of opset 11, and rewritten from there.

    Args:
        fragment: A graph whose nodes may each be written for another opset. Types of its inputs may be unknown. It is
            not changed.
        opset: The opset that its nodes shall have.

    Returns:
        A copy with the same inputs and outputs, importing ``opset``. Nodes of other domains are as they were; a domain
        that was not imported is, as version 1.

    Raises:
        OperatorError: If an operator or its form does not exist up to this opset, if inputs or attributes are missing
            or too many, or if dtypes or shapes that are known do not fit. Its ``node_name`` says which node.

    >>> from onnx import helper
    >>> x, y = (helper.make_tensor_value_info(name, 1, None) for name in "xy")
    >>> old = helper.make_model(helper.make_graph([helper.make_node("Squeeze", ["x"], ["y"], axes=[0])], "g", [x], [y]))
    >>> [node.op_type for node in make_valid(old, 18).graph.node]
    ['Constant', 'Squeeze']
    """
    require_known(opset)
    valid = onnx.ModelProto()
    valid.CopyFrom(fragment)
    scope = Scope(taken={name for graph in _graphs(valid.graph) for name in _names(graph)})
    _make_graph_valid(valid.graph, opset, scope)
    imported = {each.domain: each.version for each in valid.opset_import if each.domain not in STANDARD_DOMAINS}
    for graph in _graphs(valid.graph):
        for node in graph.node:
            if not is_standard(node):
                imported.setdefault(node.domain, 1)
    del valid.opset_import[:]
    valid.opset_import.extend(helper.make_opsetid(*each) for each in {"": opset, **imported}.items())
    valid.ir_version = max(valid.ir_version, ir_version_for(opset))
    return valid


def require_known(opset: int) -> None:
    """Refuse an opset that the installed ONNX does not know.

    Raises:
        OperatorError: If it does not.
    """
    if not 1 <= opset <= NEWEST_OPSET:
        raise OperatorError(
            f"opset {opset} is not known, ONNX {onnx.__version__} knows 1 to {NEWEST_OPSET}",
            hint="ask for one of these, or install a newer onnx",
        )


def ir_version_for(opset: int) -> int:
    """Return the version of the file format that came with an opset; 4 at least, for weights that are no inputs."""
    return max(4, helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset])


def _make_graph_valid(graph: GraphProto, opset: int, scope: Scope) -> None:
    scope.types |= {info.name: info.type for info in graph.input if info.type.WhichOneof("value")}
    for tensor in graph.initializer:
        scope.hold(tensor.name, tensor)
    # What the caller says about values serves where ONNX does not know better, as for nodes of other domains.
    declared = {i.name: i.type for i in (*graph.value_info, *graph.output) if i.type.WhichOneof("value")}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.domain == "ai.onnx":
            node.ClearField("domain")  # the other name of the same, which the imports no longer have
        for inner in subgraphs(node):
            _make_graph_valid(inner, opset, scope)
        made = _make_node_valid(node, opset, scope) if is_standard(node) else [node]
        for each in made:
            error = is_standard(each) and (type_error(each, opset, scope.type_of) or _shape_error(each, opset, scope))
            if error:
                error.node_name = node.name or next(iter(node.output), "")
                raise error
            scope.learn([each], opset)
            for name in declared.keys() & set(each.output):
                scope.types.setdefault(name, declared[name])
        nodes += made
    del graph.node[:]
    graph.node.extend(nodes)


def _make_node_valid(node: NodeProto, opset: int, scope: Scope) -> list[NodeProto]:
    error = form_error(node, opset)
    if error is None:
        return [node]
    older = first_valid(node, range(opset - 1, _oldest(node, opset) - 1, -1))
    if older is None:
        raise _refusal(node, opset, error)
    made = convert_node(node, older, opset, scope)
    made[-1].name = node.name
    for each in made:
        if each is not node:
            each.metadata_props.extend(node.metadata_props)
    return made


def _oldest(node: NodeProto, opset: int) -> int:
    """Return the oldest opset to read a node in: not one that gives a default for what has been required long since.

    ``Concat`` without its axis is a slip, not a node of opset 3.
    """
    schema = schema_at(node.op_type, opset)
    required = {name for name, each in schema.attributes.items() if each.required} if schema else set()
    return 1 if required <= {attribute.name for attribute in node.attribute} else 7


def _refusal(node: NodeProto, opset: int, error: NodeError) -> NodeError:
    """Say what is wrong with a node that no opset up to the one wanted allows."""
    newer = first_valid(node, range(opset + 1, NEWEST_OPSET + 1))
    if newer is not None and schema_at(node.op_type, opset) is not None:
        message = f"'{node.op_type}' has this form from opset {newer} on, the graph has {opset}: {error.message}"
        return node_error(node, message, f"ask for opset {newer}")
    known = versions(node.op_type)
    if newer is None and known and is_end(known[-1]):  # against the last form that it had
        return form_error(node, known[-1].since_version - 1) or error
    return error


def _shape_error(node: NodeProto, opset: int, scope: Scope) -> NodeError | None:
    """Say why the shapes of a node's inputs do not fit; None if they do, or are not known."""
    schema = schema_at(node.op_type, opset)
    is_told = schema is not None and schema.has_type_and_shape_inference_function  # what function bodies tell is unsure
    if not is_told or any(scope.shape(name) is None for name in node.input if name) or any(subgraphs(node)):
        return None
    model = scope.model([node], opset)
    del model.graph.output[:]
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except InferenceError as exc:
        shapes = ", ".join(f"'{name}' {scope.shape(name)}" for name in node.input if name)
        reason = str(exc).strip().rpartition("Error] ")[2]
        return node_error(node, f"'{node.op_type}' does not take inputs of these shapes ({shapes}): {reason}")
    return None


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _names(graph: GraphProto) -> Iterator[str]:
    yield from (each.name for each in (*graph.input, *graph.initializer, *graph.output))
    for node in graph.node:
        yield from node.input
        yield from node.output
