"""A graph for a target that computes in FP16: checked, repaired, certified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchferry.core.report import Finding

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from torchferry.core.report import Report
    from torchferry.exporter import Source
    from torchferry.graph import Exported
    from torchferry.pipeline.steps import Steps
    from torchferry.precision.certificate import Certificate


@dataclass(frozen=True)
class Half:
    """A repaired graph.

    Attributes:
        exported: Its tensors are FLOAT16 but for inputs, outputs and what the certificate lists.
        certificate: The proof.
        overflow: What overflowed before, as a finding; None if nothing did.
    """

    exported: Exported
    certificate: Certificate
    overflow: Finding | None

    def added_to(self, report: Report, target: str) -> Report:
        """Return a report that also tells of the repair."""
        report = report.with_findings([self.overflow]) if self.overflow else report
        return report.with_facts(f"certificate of {target}", {c.name: str(c) for c in self.certificate.checks})


def halved(exported: Exported, source: Source, data: Any, headroom_bits: int, steps: Steps) -> Half:
    """Repair a graph, so that FP16 cannot overflow, and prove it.

    Args:
        exported: The FP32 graph.
        source: The module with its example.
        data: Inputs to measure on, as the module takes them; the example if None.
        headroom_bits: Powers of two that inputs may be larger than these.
        steps: Where to record time and memory, and whom to tell.

    Raises:
        VerificationError: If the certificate fails.
    """
    from torchferry.exporter.inputs import as_calls, to_numpy
    from torchferry.precision.emulate import Emulation
    from torchferry.precision.fix import fix

    calls = [source.call] if data is None else as_calls(data)
    feeds = [{name: to_numpy(tensor) for name, tensor in source.names.tensors(call).items()} for call in calls]
    with steps.step("fp16 check") as step, Emulation(exported, "strict") as emulation:
        for each in feeds:
            emulation.run(each)
        first = emulation.first_bad
        step.detail = "nothing overflows" if first is None else f"{first}; {first.where}"
    with steps.step("fp16 fix and certify") as step:
        fixed, certificate = fix(exported, feeds, headroom_bits, keep_io_types=True)
        step.detail = f"{len(certificate.added)} nodes added, {len(certificate.islands)} stay FP32"
    certificate.raise_for_failure()
    if first is None:
        return Half(fixed, certificate, None)
    message = f"in FP16 {first}; {len(certificate.added)} nodes were added and {len(certificate.islands)} stay FP32"
    return Half(fixed, certificate, Finding("fp16-repaired", "info", message, where=first.where))


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
