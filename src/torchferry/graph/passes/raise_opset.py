"""A newer opset for a graph of an old one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.core.errors import OperatorError
from torchferry.graph.opset import convert_opset

if TYPE_CHECKING:
    import onnx_ir as ir

_OPSET = 20  # the first whose operators have been what they are now, GridSample being the last to change


def apply(model: ir.Model) -> int:
    """Rewrite a graph older than opset 20 in it, for engines that know the operators as they are now.

    ``y = Upsample(x, scales)`` → ``y = Resize(x, , scales)``. A graph with an operator that has no newer form stays in
    its opset.

    Returns:
        1 if the graph was rewritten.
    """
    if model.opset_imports.get("", _OPSET) >= _OPSET:
        return 0
    try:
        raised = convert_opset(model, _OPSET)
    except OperatorError:
        return 0
    model.graph = raised.graph
    model.functions.clear()
    model.functions.update(raised.functions)
    model.ir_version = raised.ir_version
    return 1
