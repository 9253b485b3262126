"""Why a pass left a node as it is, kept on the node for the error of the engine that then refuses it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_KEY = "torchferry.declined"


def decline(node: ir.Node, reason: str) -> None:
    """Note why a pass does not act on a node."""
    node.metadata_props[_KEY] = reason


def declined(node: ir.Node) -> str:
    """Return the reason noted last; empty if there is none."""
    return node.metadata_props.get(_KEY, "")
