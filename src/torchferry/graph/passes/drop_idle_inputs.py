"""No inputs that nothing uses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from torchferry.core.signature import Signature


def drop_idle_inputs(model: ir.Model, signature: Signature) -> Signature:
    """Take inputs that nothing uses, and weights that are listed as inputs, off a graph.

    ``f(x, unused) = Neg(x)`` → ``f(x) = Neg(x)``. It stands beside the passes of ``adapt``, since the signature
    changes.

    Args:
        model: The graph; changed in place.
        signature: Its signature.

    Returns:
        The signature of what remains.
    """
    graph = model.graph
    taken = [value for value in graph.inputs if value.name not in graph.initializers]
    specs = dict(zip(taken, signature.inputs, strict=True))
    used = {value: spec for value, spec in specs.items() if value.uses() or value.is_graph_output()}
    for value in list(graph.inputs):
        if value not in used:
            graph.inputs.remove(value)
    return dataclasses.replace(signature, inputs=tuple(used.values()))
