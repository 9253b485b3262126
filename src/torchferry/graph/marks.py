"""How a Mark looks in a graph: a node that changes nothing and names a boundary. See ``exporter.marks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

MARK_DOMAIN = "torchferry.mark"
MARK_OPERATOR = "Mark"


def is_mark(node: ir.Node) -> bool:
    """Tell whether a node is a Mark."""
    return (node.domain, node.op_type) == (MARK_DOMAIN, MARK_OPERATOR)
