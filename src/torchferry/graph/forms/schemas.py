"""What ONNX allows in a node, opset by opset."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, TypeProto

from torchferry.core.errors import OperatorError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from onnx.defs import OpSchema

    TypeOf = Callable[[str], TypeProto | None]

# The standard operators go by either name.
STANDARD_DOMAINS = ("", "ai.onnx")
NEWEST_OPSET = onnx.defs.onnx_opset_version()
_UNBOUNDED = 2**31 - 1
_Option = onnx.defs.OpSchema.FormalParameterOption

# Changes in the values that an attribute may have, which schemas do not tell: the opset, old names and new.
RENAMED_VALUES = {("GridSample", "mode"): (20, {"bilinear": "linear", "bicubic": "cubic"})}
# Values that came later than their attribute, and the opset that brought them.
_NEW_VALUES = {
    ("Pad", "mode"): (19, {"wrap"}),
    ("Resize", "coordinate_transformation_mode"): (19, {"half_pixel_symmetric"}),
    ("ScatterElements", "reduction"): (18, {"max", "min"}),
    ("ScatterND", "reduction"): (18, {"max", "min"}),
}


class NodeError(OperatorError):
    """A node is not valid ONNX.

    Attributes:
        node_name: The node's name, or that of its first output if it has none; empty if not known.
    """

    node_name: str = ""


def node_error(node: NodeProto, message: str, hint: str | None = None) -> NodeError:
    """Make an error about a node."""
    error = NodeError(message, hint=hint)
    error.node_name = node.name or next(iter(node.output), "")
    return error


def is_standard(node: NodeProto) -> bool:
    """Tell whether a node is of ONNX's own domain."""
    return node.domain in STANDARD_DOMAINS


@functools.cache
def versions(operator: str) -> tuple[OpSchema, ...]:
    """Return every version of a standard operator, oldest first; none for an unknown name."""
    return _history().get(operator, ())


@functools.cache
def _history() -> dict[str, tuple[OpSchema, ...]]:
    found: dict[str, list[OpSchema]] = {}
    for each in onnx.defs.get_all_schemas_with_history():
        if each.domain in STANDARD_DOMAINS:
            found.setdefault(each.name, []).append(each)
    return {name: tuple(sorted(each, key=lambda s: s.since_version)) for name, each in found.items()}


def schema_at(operator: str, opset: int) -> OpSchema | None:
    """Return what holds for an operator at an opset; None if it does not exist there, or no longer does."""
    until = [each for each in versions(operator) if each.since_version <= opset]
    return until[-1] if until and not is_end(until[-1]) else None


def is_end(schema: OpSchema) -> bool:
    """Tell whether a version takes an operator away; one that a better one followed may be used until then."""
    return schema.deprecated and versions(schema.name)[-1].since_version == schema.since_version


def subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node holds, such as the branches of an If."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def first_valid(node: NodeProto, opsets: Iterable[int]) -> int | None:
    """Return the first of some opsets at which a node is valid as it is written."""
    return next((opset for opset in opsets if form_error(node, opset) is None), None)


def form_error(node: NodeProto, opset: int) -> NodeError | None:
    """Say why a standard node, as it is written, is not valid at an opset; None if it is.

    Looks at names, types and presence of attributes and at the number of inputs and outputs, not at types of inputs.
    """
    schema = schema_at(node.op_type, opset)
    if schema is None:
        return _existence_error(node, opset)
    return (
        _attribute_error(node, schema)
        or _arity_error(node, schema)
        or _value_error(node, opset)
        or _choice_error(node, opset)
    )


def _existence_error(node: NodeProto, opset: int) -> NodeError:
    name = node.op_type
    known = versions(name)
    if not known:
        return node_error(node, f"ONNX has no operator '{name}'", did_you_mean(name, _history()))
    first = known[0].since_version
    if first > opset:
        return node_error(
            node, f"'{name}' exists from opset {first} on, the graph has {opset}", f"ask for opset {first}"
        )
    last = known[-1].since_version - 1
    return node_error(node, f"'{name}' exists up to opset {last}, the graph has {opset}", "use what replaced it")


def _attribute_error(node: NodeProto, schema: OpSchema) -> NodeError | None:
    of = f"'{node.op_type}' of opset {schema.since_version}"
    given = {attribute.name for attribute in node.attribute}
    for attribute in node.attribute:
        expected = schema.attributes.get(attribute.name)
        if expected is None:
            known = did_you_mean(attribute.name, schema.attributes)
            as_input = [p.name for p in schema.inputs if p.name == attribute.name]
            hint = f"'{attribute.name}' is an input there" if as_input else known
            return node_error(node, f"{of} has no attribute '{attribute.name}'", hint)
        wanted: Any = expected.type  # an enumeration, though it is not typed as one
        if attribute.type != wanted.value:
            got = AttributeProto.AttributeType.Name(attribute.type)
            return node_error(node, f"attribute '{attribute.name}' of {of} is {wanted.name}, got {got}")
    missing = [f"'{name}'" for name, each in schema.attributes.items() if each.required and name not in given]
    if missing:
        return node_error(node, f"{of} needs the attribute {', '.join(missing)}, got {_listed(sorted(given))}")
    return None


def _arity_error(node: NodeProto, schema: OpSchema) -> NodeError | None:
    of = f"'{node.op_type}' of opset {schema.since_version}"
    inputs = _inputs(node)
    if not schema.min_input <= len(inputs) <= schema.max_input:
        names = _listed([p.name for p in schema.inputs])
        expected = _range(schema.min_input, schema.max_input)
        return node_error(node, f"{of} takes {expected} inputs ({names}), got {len(inputs)}")
    for name, formal in zip(inputs, schema.inputs, strict=False):
        if not name and formal.option == _Option.Single:
            return node_error(node, f"{of} needs its input '{formal.name}', which is left out")
    if not schema.min_output <= len(node.output) <= schema.max_output:
        expected = _range(schema.min_output, schema.max_output)
        return node_error(node, f"{of} has {expected} outputs, got {len(node.output)}")
    return None


def _value_error(node: NodeProto, opset: int) -> NodeError | None:
    for attribute in node.attribute:
        key = (node.op_type, attribute.name)
        renaming, names = RENAMED_VALUES.get(key, (0, {}))
        since, new = _NEW_VALUES.get(key, (renaming, set(names.values())))
        value = attribute.s.decode(errors="replace")
        of = f"'{attribute.name}' of '{node.op_type}'"
        if value in new and since > opset:
            message = f"{of} may be '{value}' from opset {since} on, the graph has {opset}"
            return node_error(node, message, f"ask for opset {since}")
        if value in names and renaming <= opset:
            return node_error(node, f"{of} is called '{names[value]}' from opset {renaming} on, got '{value}'")
    return None


def _choice_error(node: NodeProto, opset: int) -> NodeError | None:
    """Say which of several things an operator needs one, where its schema says that each may be left out."""
    count = len(_inputs(node))
    attributes = {a.name for a in node.attribute}
    if node.op_type == "Split" and opset >= 18 and (count > 1) == ("num_outputs" in attributes):
        got = "both" if count > 1 else "neither"
        message = f"'Split' of opset 18 needs the input 'split' or the attribute 'num_outputs', got {got}"
        return node_error(node, message, "keep one of them")
    if node.op_type == "Resize" and opset >= 11 and count < 3:
        message = f"'Resize' of opset {opset} needs its input 'scales' or 'sizes', got {count} inputs"
        return node_error(node, message, "the inputs are X, roi, scales, sizes; roi may be left out")
    return None


def _inputs(node: NodeProto) -> list[str]:
    """Return the inputs without the omitted ones at the end."""
    names = list(node.input)
    while names and not names[-1]:
        names.pop()
    return names


def type_error(node: NodeProto, opset: int, type_of: TypeOf) -> NodeError | None:
    """Say which input or output of a node has a dtype that its operator does not take; None if none, or not known.

    Args:
        node: A standard node whose form is valid.
        opset: The graph's.
        type_of: Gives the type of a value by name; None if not known.
    """
    schema = schema_at(node.op_type, opset)
    assert schema is not None
    allowed = {each.type_param_str: sorted(each.allowed_type_strs) for each in schema.type_constraints}
    bound: dict[str, tuple[str, str]] = {}  # type variable: the input that settled it, its type
    for kind, names, formals in (("input", node.input, schema.inputs), ("output", node.output, schema.outputs)):
        for index, name in enumerate(names):
            formal = formals[min(index, len(formals) - 1)]
            got = type_string(type_of(name)) if name else None
            if got is None:
                continue
            is_more = len(formals) <= index or formal.option == _Option.Variadic
            label = f"{formal.name}[{index - len(formals) + 1}]" if is_more else formal.name
            of = f"{kind} '{label}' of '{node.op_type}' ('{name}')"
            types = allowed.get(formal.type_str, [formal.type_str])
            if got not in types:
                return node_error(node, f"{of} is {got}, opset {opset} expects {', '.join(types)}", "cast it")
            if formal.type_str in allowed and formal.is_homogeneous:
                other, settled = bound.setdefault(formal.type_str, (label, got))
                if settled != got:
                    message = f"{of} is {got}, expected {settled} as '{other}' is"
                    return node_error(node, message, "cast one of them")
    return None


def type_string(of: TypeProto | None) -> str | None:
    """Write a type as schemas do, such as ``tensor(float)``; None if it is not known."""
    if of is None:
        return None
    kind = of.WhichOneof("value")
    if kind == "tensor_type" and of.tensor_type.elem_type:
        return f"tensor({TensorProto.DataType.Name(of.tensor_type.elem_type).lower()})"
    if kind in ("sequence_type", "optional_type"):
        inner = type_string(getattr(of, kind).elem_type)
        return inner and f"{'seq' if kind == 'sequence_type' else 'optional'}({inner})"
    return None


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} or more" if high >= _UNBOUNDED else f"{low} to {high}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
