"""No empty inputs at the end of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def apply(model: ir.Model) -> int:
    """Take off the empty inputs at the end of a node, which mean the same as none.

    ``Conv(x, w, "")`` → ``Conv(x, w)``.

    Returns:
        The number of nodes that had some.
    """
    trimmed = 0
    for graph in model.graphs():
        for node in graph:
            count = len(node.inputs)
            while count and node.inputs[count - 1] is None:
                count -= 1
            trimmed += count < len(node.inputs)
            node.resize_inputs(count)
    return trimmed
