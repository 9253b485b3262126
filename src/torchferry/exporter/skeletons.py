"""Writing the first lines of a symbolic function, for an operator that torch.onnx cannot translate."""

from __future__ import annotations

import json
import keyword
import math
from typing import TYPE_CHECKING, Any

from torchferry.exporter.operators import nearest_onnx, overloads_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch._ops import OpOverload

    from torchferry.exporter.operators import OnnxOperator

# What `arg_descriptors` calls a schema's types; whatever else there is, the function gets as it is.
_DESCRIPTORS = {
    "Tensor": "v",
    "List[Tensor]": "v",
    "List[Optional[Tensor]]": "v",
    "int": "i",
    "List[int]": "is",
    "float": "f",
    "number": "f",
    "List[float]": "fs",
    "List[number]": "fs",
    "bool": "b",
    "List[bool]": "is",
    "str": "s",
}
_SUFFIXES = {"i": "i", "is": "i", "b": "i", "f": "f", "fs": "f", "s": "s"}  # of attributes, as `g.op` wants them
_ONNX_TYPES = {"i": "INT", "is": "INTS", "b": "INT", "f": "FLOAT", "fs": "FLOATS", "s": "STRING"}


def skeletons(ops: Iterable[OpOverload]) -> str:
    """Return Python source with one symbolic function for each operator, their ONNX forms left to the reader."""
    return "\n\n".join(["import torchferry", *map(skeleton, ops)])


def skeleton(op: OpOverload) -> str:
    """Return the source of a symbolic function for an operator, with every argument of its schema in order.

    >>> import torch
    >>> print(skeleton(torch.ops.aten.erfinv.default))
    # aten::erfinv(Tensor self) -> Tensor
    @torchferry.SYMBOLIC_REWRITER.register_symbolic("erfinv", is_pytorch=True, arg_descriptors=["v"])
    def erfinv(g, input):
        return g.op("custom::Erfinv", input)  # write the ONNX form here
    """
    schema: Any = op._schema
    kinds = [str(argument.real_type).removeprefix("Optional[") for argument in schema.arguments]
    kinds = [kind.removesuffix("]") if kind.count("[") < kind.count("]") else kind for kind in kinds]
    descriptors = [_DESCRIPTORS.get(kind, "none") for kind in kinds]
    names = _parameter_names([argument.name for argument in schema.arguments])
    namespace, _, function = schema.name.partition("::")
    near = nearest_onnx(schema.name)
    body = _call(namespace, function, list(zip(names, descriptors, strict=True)), near[0] if near else None)
    outputs = f", outputs={len(schema.returns)}" if len(schema.returns) > 1 else ""
    registered = [f'"{_registered_name(op)}"', *(["is_pytorch=True"] if namespace == "aten" else [])]
    quoted = ", ".join(f'"{descriptor}"' for descriptor in descriptors)
    lines = [
        f"# {schema}",
        *(f"# near by name: {operator}" for operator in near),
        f"@torchferry.SYMBOLIC_REWRITER.register_symbolic({', '.join(registered)}, arg_descriptors=[{quoted}])",
        f"def {_identifier(function)}({', '.join(['g', *_parameters(schema.arguments, names)])}):",
        f"    return g.op({body}{outputs})  # write the ONNX form here",
    ]
    return "\n".join(lines)


def _registered_name(op: OpOverload) -> str:
    """Return the shortest name that means this overload: without ``aten::``, and bare where it is the only one."""
    others = [other for other in overloads_of(op._overloadpacket) if other != op and not other._schema.is_mutable]
    name = op._schema.name.removeprefix("aten::")
    return f"{name}.{op._schema.overload_name or 'default'}" if others else name


def _call(namespace: str, function: str, arguments: list[tuple[str, str]], near: OnnxOperator | None) -> str:
    """Write what stands in ``g.op(...)``: the operator, the tensors, and what fits its attributes."""
    tensors = [name for name, descriptor in arguments if descriptor == "v"]
    plain = [(name, descriptor) for name, descriptor in arguments if descriptor in _SUFFIXES]
    if near is None:
        domain = "custom" if namespace in ("aten", "prims") else namespace
        op_type = f"{domain}::{''.join(word.capitalize() for word in function.split('_'))}"
    else:
        op_type = near.name
        tensors = tensors if near.inputs[-1:] and near.inputs[-1].endswith("...") else tensors[: len(near.inputs)]
        plain = [item for item in plain if near.attributes.get(item[0]) == _ONNX_TYPES[item[1]]]
    attributes = [f"{name}_{_SUFFIXES[descriptor]}={name}" for name, descriptor in plain]
    return ", ".join([f'"{op_type}"', *tensors, *attributes])


def _parameter_names(names: list[str]) -> list[str]:
    """Name the parameters as in the schema, where Python and ``g`` allow it; ``self`` is called ``input``."""
    own = ["input" if name == "self" and "input" not in names else name for name in names]
    return [_identifier(name) + ("_" if name in ("g", "self") else "") for name in own]


def _identifier(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


def _parameters(arguments: Iterable[Any], names: Iterable[str]) -> list[str]:
    """Write the parameters with their defaults; what has none stands behind a star where the schema has it later."""
    written: list[str] = []
    seen_default = seen_star = False
    for argument, name in zip(arguments, names, strict=True):
        has_default = argument.has_default_value()
        if seen_default and not has_default and not seen_star:
            written.append("*")
            seen_star = True
        seen_default = seen_default or has_default
        written.append(f"{name}={_literal(argument.default_value)}" if has_default else name)
    return written


def _literal(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return json.dumps(value)
    return repr(value) if isinstance(value, int | float | complex) else "None"
