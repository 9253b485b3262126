"""Plain names for inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


_GIVEN_KEY = "torchferry.name"


def apply(model: ir.Model) -> int:
    """Call the inputs ``input0``, ``input1``, … and the outputs ``output0``, …, for engines that stumble over others.

    ``"out, 1" = Neg("a b")`` → ``output0 = Neg(input0)``. What an output shares with an input keeps the input's name.

    Returns:
        The number of names changed.
    """
    graph = model.graph
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    given = set(graph.inputs)
    changed = 0
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for place, value in enumerate(values):
            if value.name in graph.initializers or (kind == "output" and value in given):
                continue
            name = f"{kind}{place}"
            while name in taken and name != value.name:
                name += "_"
            if value.name != name:
                value.metadata_props[_GIVEN_KEY] = value.name or ""
                value.name = name
                changed += 1
    return changed


def given_name(value: ir.Value) -> str:
    """Return what a tensor was called before it got a plain name."""
    return value.metadata_props.get(_GIVEN_KEY, value.name or "")
