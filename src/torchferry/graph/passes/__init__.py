"""L1: changes that make a graph fit an engine and leave its meaning alone; one file a pass.

A pass is a function ``apply(model) -> int`` that changes an ``ir.Model`` in place and returns how often it did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.graph.passes import (
    compose_deform_conv,
    fold_constants,
    inline_functions,
    name_tensors,
    raise_opset,
    remove_identities,
    trim_inputs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

__all__ = ["PASSES", "adapt"]

PASSES = {
    "compose-deform-conv": compose_deform_conv.apply,
    "fold-constants": fold_constants.apply,
    "inline-functions": inline_functions.apply,
    "name-tensors": name_tensors.apply,
    "raise-opset": raise_opset.apply,
    "remove-identities": remove_identities.apply,
    "trim-inputs": trim_inputs.apply,
}


def adapt(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, tuple[str, ...]]:
    """Run passes on a copy of a graph, which shares the weights.

    Args:
        model: The graph; left as it is.
        names: Of the passes, keys of ``PASSES``, in order.

    Returns:
        The copy, and each pass that changed something as ``name xN``.
    """
    copy = model.clone()
    counts = [(name, PASSES[name](copy)) for name in names]
    return copy, tuple(f"{name} x{count}" for name, count in counts if count)
