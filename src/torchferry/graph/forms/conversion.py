"""One node of the standard domain from the opset that it is written for to another one."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import onnx
from onnx import NodeProto, TypeProto, helper
from onnx.shape_inference import InferenceError
from onnx.version_converter import ConvertError

from torchferry.graph.forms.adapters import MEANING_CHANGED, Rewrite
from torchferry.graph.forms.downgrades import DOWN
from torchferry.graph.forms.schemas import (
    NodeError,
    form_error,
    is_standard,
    node_error,
    schema_at,
    subgraphs,
    type_error,
    versions,
)
from torchferry.graph.forms.scope import Scope, used_names
from torchferry.graph.forms.upgrades import UP

if TYPE_CHECKING:
    from collections.abc import Iterable

# The opsets in which a new version of an operator with the same form means a change of types alone, but for
# ``MEANING_CHANGED``: broadcasting came before them, and what comes after has not been looked through.
_TYPES_CHANGED_ONLY = range(9, 26)
# Function bodies that do not do what their operator does: this one squeezes away a batch of 1, and makes a Range of
# what is no scalar.
_WRONG_BODIES = {"AffineGrid"}


def convert_node(node: NodeProto, source: int, target: int, scope: Scope) -> list[NodeProto]:
    """Write a node in the form of another opset.

    Where its operator is the same at both it stays. Otherwise ONNX's version converter rewrites it, or one of our own
    adapters where that has none or changes the meaning, or its function body takes its place where the operator does
    not exist at the target. Graphs inside the node stay as they are.

    Args:
        node: A node that is valid at ``source``.
        source: The opset that it is written for.
        target: The opset wanted, older or newer.
        scope: What is known about its inputs; learns about the nodes returned.

    Returns:
        Nodes that are valid at ``target`` and give the same outputs by the same names.

    Raises:
        NodeError: If there is no way.
    """
    before, after = schema_at(node.op_type, source), schema_at(node.op_type, target)
    if not is_standard(node) or (before and after and before.since_version == after.since_version):
        return [node]
    if before is None:
        error = form_error(node, target)
        if error:
            raise error
        return [node]  # an adapter has written it for the target already
    if any(attribute.ref_attr_name for attribute in node.attribute):
        raise _refusal(node, target, "its attributes are given by the function that it stands in")
    if any(subgraphs(node)):
        return [_control_flow(node, source, target)]
    own = _own_adapter(node, source, target, scope)
    if own is not None:
        return own
    return _convert_generally(node, source, target, scope)


def _refusal(node: NodeProto, target: int, reason: str) -> NodeError:
    return node_error(node, f"'{node.op_type}' cannot be written for opset {target}: {reason}")


def _control_flow(node: NodeProto, source: int, target: int) -> NodeProto:
    """Keep an If, Loop or Scan, which have changed in the types they take alone, but for Scan's first version."""
    if node.op_type == "Scan" and min(source, target) < 9 <= max(source, target):
        raise _refusal(node, target, "it has other inputs there")
    error = form_error(node, target)
    if error:
        raise error
    return node


def _own_adapter(node: NodeProto, source: int, target: int, scope: Scope) -> list[NodeProto] | None:
    """Go over the nearest opset for whose change we have an adapter of our own; None if there is none on the way."""
    adapters = UP if target > source else DOWN
    low, high = sorted((source, target))
    on_the_way = [since for name, since in adapters if name == node.op_type and low < since <= high]
    if not on_the_way:
        return None
    since = min(on_the_way) if target > source else max(on_the_way)
    before, after = (since - 1, since) if target > source else (since, since - 1)
    converted = []
    for each in convert_node(node, source, before, scope):
        adapter = adapters.get((each.op_type, since))
        if adapter is None:
            converted += convert_node(each, before, target, scope)
            continue
        for new in adapter(Rewrite(each, scope, target)):
            scope.learn([new], after)
            converted += _checked(node, convert_node(new, after, target, scope), target, scope)
    return converted


def _convert_generally(node: NodeProto, source: int, target: int, scope: Scope) -> list[NodeProto]:
    """Keep the form if it means the same, else take ONNX's converter, else the operator's function body."""
    kept = _unchanged(node, source, target, scope)
    if kept is not None:
        return _checked(node, [kept], target, scope)
    reason = getattr(form_error(node, target), "message", "")
    if schema_at(node.op_type, target) is not None or target > source:
        converted, refusal = _by_converter(node, source, target, scope)
        if not refusal:
            return _checked(node, converted, target, scope)
        # That it has no adapter says nothing to the user, any other reason does.
        reason = reason if reason and "Adapter" in refusal else refusal
    expanded = _expand(node, source, target, scope)
    if expanded is not None:
        return expanded
    raise _refusal(node, target, reason)


def _unchanged(node: NodeProto, source: int, target: int, scope: Scope) -> NodeProto | None:
    """Return the node as it is, without attributes that say what holds anyway, if that means the same; else None.

    Between most versions of an operator only the types have changed, or attributes have come whose defaults are what
    it did before.
    """
    low, high = sorted((source, target))
    changes = [each.since_version for each in versions(node.op_type) if low < each.since_version <= high]
    if any(each not in _TYPES_CHANGED_ONLY or (node.op_type, each) in MEANING_CHANGED for each in changes):
        return None
    before, after = schema_at(node.op_type, source), schema_at(node.op_type, target)
    assert before is not None
    if after is None:
        return None
    kept = NodeProto()
    kept.CopyFrom(node)
    del kept.attribute[:]
    for attribute in node.attribute:
        default = before.attributes[attribute.name].default_value
        if attribute.name in after.attributes or _value(attribute) != _value(default):
            kept.attribute.append(attribute)
    if form_error(kept, target) or type_error(kept, target, scope.type_of):
        return None
    return kept


def _count_axes_from_the_front(node: NodeProto, scope: Scope) -> None:
    """Replace negative axes, which came with opset 11."""
    for attribute in node.attribute:
        if attribute.name in ("axis", "axes") and min([attribute.i, *attribute.ints]) < 0:
            shape = scope.shape(node.input[0])
            if shape is None:
                raise node_error(node, f"'{node.op_type}' needs the rank of '{node.input[0]}' below opset 11")
            rank = len(shape) + len(attribute.ints) * (node.op_type == "Unsqueeze")
            if attribute.name == "axis":
                attribute.i %= rank
            attribute.ints[:] = [axis % rank for axis in attribute.ints]


def _value(attribute: onnx.AttributeProto) -> object:
    return helper.get_attribute_value(attribute) if attribute.type else None


def _checked(origin: NodeProto, nodes: list[NodeProto], opset: int, scope: Scope) -> list[NodeProto]:
    """Refuse a conversion that left a node which the target does not allow; a converter may not notice."""
    scope.learn(nodes, opset)
    for node in nodes:
        if not is_standard(node):
            continue
        if opset < 11:
            _count_axes_from_the_front(node, scope)
        error = form_error(node, opset) or type_error(node, opset, scope.type_of)
        if error:
            raise _refusal(origin, opset, error.message)
    return nodes


def _by_converter(node: NodeProto, source: int, target: int, scope: Scope) -> tuple[list[NodeProto], str]:
    """Let ONNX's version converter rewrite one node; gives the nodes, or the reason why not."""
    model = scope.model([node], source)
    try:
        converted = onnx.version_converter.convert_version(model, target).graph
    except (ConvertError, InferenceError, RuntimeError, ValueError, IndexError) as exc:
        return [], str(exc).strip().splitlines()[0].rpartition("failed: ")[2]
    given = {i.name for i in model.graph.initializer}
    constants = [
        helper.make_node("Constant", [], [i.name], value=i) for i in converted.initializer if i.name not in given
    ]
    nodes = _used([*constants, *converted.node], node.output)
    rename_values(nodes, {name: name for name in [*used_names(node), *node.output]}, node.output[0], scope)
    return nodes, ""


def _used(nodes: list[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """Leave out the nodes that nothing uses."""
    needed = set(outputs)
    kept = []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed.update(used_names(node))
    return kept[::-1]


def rename_values(nodes: list[NodeProto], names: dict[str, str], prefix: str, scope: Scope) -> None:
    """Rename values in place: as ``names`` say, and others to new names that begin with ``prefix``."""
    new = defaultdict(lambda: scope.fresh(f"{prefix}_part"), {"": "", **names})
    for node in nodes:
        node.input[:] = [new[name] for name in node.input]
        node.output[:] = [new[name] for name in node.output]
        for graph in subgraphs(node):
            for info in (*graph.input, *graph.initializer, *graph.output):
                info.name = new[info.name]
            del graph.value_info[:]
            inner = list(graph.node)
            rename_values(inner, new, prefix, scope)


def _expand(node: NodeProto, source: int, target: int, scope: Scope) -> list[NodeProto] | None:
    """Put an operator's function body in its place, written for the target; None if it has none."""
    body = function_body(node, source, target, scope)
    if body is None:
        return None
    opset = next(each.version for each in body.opset_import if is_standard(NodeProto(domain=each.domain)))
    given = {a.name: a for a in (*body.attribute_proto, *node.attribute)}
    nodes = list(body.node)
    for inner in nodes:
        _settle_attributes(inner, given)
    names = dict.fromkeys(body.input, "") | dict(zip(body.input, node.input, strict=False))
    names |= {inside: outside for inside, outside in zip(body.output, node.output, strict=False) if outside}
    rename_values(nodes, names, node.output[0], scope)
    converted = []
    for inner in _used(nodes, [name for name in node.output if name]):
        scope.learn([inner], opset)
        for graph in subgraphs(inner):
            _convert_subgraph(graph, opset, target, scope)
        converted += _checked(node, convert_node(inner, opset, target, scope), target, scope)
    return converted


def _convert_subgraph(graph: onnx.GraphProto, source: int, target: int, scope: Scope) -> None:
    """Write the nodes of a graph inside a node for the target, in place."""
    nodes = []
    for node in graph.node:
        scope.learn([node], source)
        for inner in subgraphs(node):
            _convert_subgraph(inner, source, target, scope)
        nodes += convert_node(node, source, target, scope)
    del graph.node[:]
    graph.node.extend(nodes)


def function_body(node: NodeProto, source: int, target: int, scope: Scope) -> onnx.FunctionProto | None:
    """Return the function that defines an operator, for the newest opset up to the target if there is one."""
    schema: Any = schema_at(node.op_type, source)  # its type does not tell all of its members
    plain, dependent = schema.function_opset_versions, schema.context_dependent_function_opset_versions
    known = sorted({*plain, *dependent})
    if not known or node.op_type in _WRONG_BODIES:
        return None
    opset = max((each for each in known if each <= target), default=known[0])
    if opset in plain:
        text = schema.get_function_with_opset_version(opset)
    else:
        types = [(scope.type_of(name) or TypeProto()).SerializeToString() for name in node.input]
        text = schema.get_context_dependent_function_with_opset_version(opset, node.SerializeToString(), types)
    body = onnx.FunctionProto.FromString(text)
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name and name not in {a.name for a in body.attribute_proto}:
            body.attribute_proto.append(attribute.default_value)
    return body if body.node else None


def _settle_attributes(node: NodeProto, given: dict[str, onnx.AttributeProto]) -> None:
    """Put values in place of references to the function's attributes; what was not given is left out."""
    settled = []
    for attribute in node.attribute:
        value = attribute
        if attribute.ref_attr_name:
            if attribute.ref_attr_name not in given:
                continue
            value = onnx.AttributeProto()
            value.CopyFrom(given[attribute.ref_attr_name])
            value.name = attribute.name
        settled.append(value)
    copies = [onnx.AttributeProto.FromString(value.SerializeToString()) for value in settled]
    del node.attribute[:]
    node.attribute.extend(copies)
    for graph in subgraphs(node):
        for inner in graph.node:
            _settle_attributes(inner, given)
