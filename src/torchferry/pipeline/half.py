"""A graph for a target that computes in FP16: checked, repaired, certified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.core.report import Finding
from torchferry.pipeline.prepared import Prepared

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from torchferry.graph import Exported
    from torchferry.pipeline.walk import Walk


def halved(exported: Exported, walk: Walk) -> Prepared:
    """Repair a graph, so that FP16 cannot overflow, and prove it.

    Args:
        exported: The FP32 graph.
        walk: Its data is measured on.

    Returns:
        A graph whose tensors are FLOAT16 but for inputs, outputs and what the certificate lists.

    Raises:
        VerificationError: If the certificate fails.
    """
    from torchferry.precision.emulate import Emulation
    from torchferry.precision.fix import fix

    feeds, steps = walk.feeds(), walk.steps
    with steps.step("fp16 check") as step, Emulation(exported, "strict") as emulation:
        for each in feeds:
            emulation.run(each)
        first = emulation.first_bad
        step.detail = "nothing overflows" if first is None else f"{first}; {first.where}"
    with steps.step("fp16 fix and certify") as step:
        fixed, certificate = fix(exported, feeds, walk.headroom_bits, keep_io_types=True)
        step.detail = f"{len(certificate.added)} nodes added, {len(certificate.islands)} stay FP32"
    certificate.raise_for_failure()
    findings: list[Finding] = []
    if first is not None:
        message = f"in FP16 {first}; {len(certificate.added)} nodes were added and {len(certificate.islands)} stay FP32"
        findings.append(Finding("fp16-repaired", "info", message, where=first.where))
    facts = {"certificate": {check.name: str(check) for check in certificate.checks}}
    return Prepared(fixed, tuple(findings), facts, certificate.to_json())


def fix_weights(model: torch.nn.Module, calls: Any, headroom_bits: int, path: Path) -> list[str]:
    """Repair a module by its weights and write them as safetensors; with them, ``.half()`` is safe.

    Args:
        model: The module; it is not changed.
        calls: Inputs to measure on.
        headroom_bits: See ``ferry.fp16.fix``.
        path: The file.

    Returns:
        What the weights cannot say, such as the eps of a norm, as assignments to be made to the module.

    Raises:
        ModelError: If weights alone do not do.
        VerificationError: If the certificate fails.
        OutputError: If the file cannot be written.
    """
    from torchferry.exporter.checkpoint import save_weights
    from torchferry.precision.modules.fix import fix_module

    fixed, certificate = fix_module(model, calls, headroom_bits, weights_only=True)
    certificate.raise_for_failure()
    save_weights(fixed, path)
    before = dict(model.named_modules())
    return [
        f"model.{name}.{key} = {value!r}"
        for name, module in fixed.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, float) and vars(before[name]).get(key) != value
    ]
