"""A graph for a target that computes in int8: quantised on the user's data, some of which is kept back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry import backends
from torchferry.core.report import Finding
from torchferry.pipeline.prepared import Prepared

if TYPE_CHECKING:
    from torchferry.graph import Exported
    from torchferry.pipeline.walk import Walk


def quantized(exported: Exported, walk: Walk) -> Prepared:
    """Quantise a graph to int8; one that was trained to be quantised is taken as it is.

    Of several calls the last quarter is kept back, so that verification is not on the data of the calibration alone.

    Args:
        exported: The FP32 graph.
        walk: Its data is what the graph is quantised on.

    Raises:
        TorchferryError: As ``ferry.quantize``.
    """
    from torchferry.precision.planning import split_data

    if exported.is_quantized:
        return Prepared(exported)
    feeds = walk.feeds()
    calibration, kept, _ = split_data(feeds)
    with walk.steps.step(f"quantize for {exported.target.backend}") as step:
        result = quantize_for(exported, calibration)
        step.detail = f"on {len(calibration)} of {len(feeds)} calls"
    findings = result.report.findings[len(exported.report.findings) :]
    if len(feeds) > 1:
        message = f"the last {len(kept)} of {len(feeds)} calls were not calibrated on; it is verified on all of them"
        findings = (*findings, Finding("int8-held-out", "info", message, where=str(result.target)))
    return Prepared(result, findings)


def quantize_for(exported: Exported, calibration: Any) -> Exported:
    """Quantise a graph in the form that its target's engine wants; otherwise as ``ferry.quantize``."""
    from torchferry.precision.quantize import quantize

    symmetric = backends.get(exported.target.backend).capabilities().symmetric_int8
    return quantize(exported, calibration, symmetric=symmetric)
