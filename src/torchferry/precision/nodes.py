"""Making nodes of a graph, many of them: onnx-ir's own ``node`` asks of each attribute what it might be."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def new_node(
    op_type: str,
    inputs: Iterable[ir.Value | None],
    name: str,
    dtype: ir.DataType,
    attributes: Mapping[str, Any] | None = None,
    shape: ir.Shape | None = None,
) -> ir.Node:
    """Return a node of the default domain with one output that has its name.

    Args:
        op_type: The operator.
        inputs: Its operands.
        name: Of the node and its output.
        dtype: Of its output.
        attributes: By name; whole numbers, or whatever onnx-ir converts.
        shape: Of its output.
    """
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    converted = [_attribute(key, value) for key, value in attributes.items()] if attributes else []
    return ir.Node("", op_type, list(inputs), converted, outputs=[output], name=name)


def _attribute(name: str, value: Any) -> ir.Attr:
    if type(value) is int or isinstance(value, ir.DataType):
        return _whole_number(name, int(value))
    return ir.convenience.convert_attribute(name, value)


@functools.cache
def _whole_number(name: str, value: int) -> ir.Attr:
    return ir.AttrInt64(name, value)
