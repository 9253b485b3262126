"""Arguments that the graph has lost: tensors that it does not read although the model does, and plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchferry.core.errors import ExportError
from torchferry.core.report import Finding
from torchferry.exporter.inputs import flatten_outputs, named_numbers
from torchferry.rewrite.sites import UNKNOWN, call_site

if TYPE_CHECKING:
    import onnx_ir as ir

    from torchferry.exporter.source import Source


def lost_inputs(model: ir.Model, source: Source) -> list[Finding]:
    """Look for arguments of the model that the graph's outputs do not depend on.

    Args:
        model: The graph, its inputs named.
        source: What it was exported from, in eval mode.

    Returns:
        A finding for every number among the arguments, which the graph has as a constant, and for every tensor that
        neither the graph nor the model uses.

    Raises:
        ExportError: If the model's outputs change with a tensor that the graph does not read; names the line that does.
    """
    findings = [
        Finding(
            "number-fixed",
            "warning",
            f"'{name}' is the number {value}, not a tensor; the graph is right for this number only",
            hint=f"if it is to change, give it as a tensor: torch.tensor({value})",
        )
        for name, value in named_numbers(source.names.parameters, source.call)
    ]
    outputs = set(model.graph.outputs)
    for value in model.graph.inputs:
        if value.uses() or value in outputs:
            continue
        place = _dependence(source, value.name or "")
        if place is not None:
            raise ExportError(
                f"the graph has lost the input '{value.name}': the model's outputs change with it, the graph's do not",
                where=place,
                hint="compute with the tensor itself while exporting too; what Python makes of it once is a constant",
            )
        findings.append(
            Finding("input-unused", "info", f"no output depends on the values of '{value.name}'; it stays an input")
        )
    return findings


def _dependence(source: Source, name: str) -> str | None:
    """Return where the model reads an input that its outputs change with; None if they do not."""
    tensors = source.names.tensors(source.call)
    if not tensors[name].numel():
        return None
    other = {**tensors, name: _changed(tensors[name])}
    reading = _Reading(other[name])
    with torch.no_grad():
        before = _outputs(source, tensors)
        try:
            with reading:
                after = _outputs(source, other)
        except Exception:  # noqa: BLE001 - what the model refuses, it looks at
            return reading.place or "unknown line"
    same = len(before) == len(after) and all(map(_equal, before, after))
    return None if same else reading.place or "unknown line"


def _outputs(source: Source, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    call = source.names.replace(source.call, tensors)
    return flatten_outputs(source.model(*call[0], **call[1]))


def _changed(tensor: torch.Tensor) -> torch.Tensor:
    return ~tensor if tensor.dtype == torch.bool else tensor + 1


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=left.is_floating_point() or left.is_complex())


class _Reading(TorchFunctionMode):
    """Notes the first line of the model that hands a tensor to a function of torch."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.place: str | None = None
        self._tensor = tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        if self.place is None and any(leaf is self._tensor for leaf in leaves):
            place = call_site().place
            self.place = None if place == UNKNOWN else place
        return func(*args, **(kwargs or {}))
