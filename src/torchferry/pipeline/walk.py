"""The way to one target: exported, made ready for its precision, compiled, verified."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from torchferry import backends
from torchferry.core.report import Finding, Report
from torchferry.pipeline.half import halved
from torchferry.pipeline.prepared import Prepared
from torchferry.pipeline.quantized import quantized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torchferry.core.compare import Criterion
    from torchferry.core.engine import Array, Engine
    from torchferry.core.target import Target
    from torchferry.exporter import Source
    from torchferry.graph import Exported
    from torchferry.pipeline.steps import Steps

# How a graph is made ready for a precision; for those that are not here it is compiled as it was exported.
_PREPARATIONS: Mapping[str, Callable[[Exported, Walk], Prepared]] = {"fp16": halved, "int8": quantized}


@dataclass(frozen=True)
class Arrival:
    """A target that was reached, rightly or not.

    Attributes:
        engine: Its engine.
        exported: The graph as it was exported.
        prepared: The graph as it was compiled.
        report: What verifying found.
    """

    engine: Engine
    exported: Exported
    prepared: Prepared
    report: Report

    @property
    def target(self) -> Target:
        """Where it is."""
        return self.engine.target


@dataclass
class Walk:
    """What all targets of one deployment start from.

    Attributes:
        source: The module with its example, names and dynamic dimensions.
        data: Inputs to measure and verify on; the source's example if None.
        criterion: What is asked of a target; None for what its precision asks.
        sizes: Sizes of dynamic dimensions to verify at; chosen from their ranges if None.
        cfg: What rewriters see as ``ctx.cfg``.
        headroom_bits: Powers of two that inputs may be larger than ``data`` before FP16 overflows.
        steps: Where to record time and memory, and whom to tell.
    """

    source: Source
    data: Any
    criterion: Callable[[Target], Criterion | None]
    sizes: Mapping[str, Sequence[int]] | None
    cfg: Any
    headroom_bits: int
    steps: Steps
    _exports: dict[str, Exported] = field(default_factory=dict, init=False)

    def feeds(self) -> list[dict[str, Array]]:
        """Return the data as arrays by the graph's input names."""
        from torchferry.exporter.inputs import as_calls, to_numpy

        calls = [self.source.call] if self.data is None else as_calls(self.data)
        tensors = map(self.source.names.tensors, calls)
        return [{name: to_numpy(tensor) for name, tensor in call.items()} for call in tensors]

    def export(self, target: Target) -> Exported:
        """Export for a target's engine, once for all its precisions: rewriters go by the engine."""
        from torchferry.pipeline.export import export

        if target.backend not in self._exports:
            with self.steps.step(f"export for {target.backend}" if self._exports else "export") as step:
                self._exports[target.backend] = exported = export(self.source, target=target, cfg=self.cfg)
                step.detail = str(exported)
        return self._exports[target.backend]

    def prepare(self, target: Target) -> Prepared:
        """Make the graph ready for a target's precision.

        Raises:
            VerificationError: If what is to be proved about it does not hold.
        """
        exported = self.export(target)
        prepare = _PREPARATIONS.get(target.precision)
        return Prepared(exported) if prepare is None else prepare(exported, self)

    def compile(self, prepared: Prepared, target: Target, scratch: Path) -> Engine:
        """Compile a graph into a folder of its own."""
        with self.steps.step(f"compile for {target}") as step:
            engine = backends.compile(prepared.exported, target, scratch / str(target))
            size = sum((engine.folder / file).stat().st_size for file in engine.files)
            step.detail = f"{size / 2**20:.2f} MiB"
        return engine

    def verify(self, engine: Engine, prepared: Prepared, criterion: Criterion | None) -> Arrival:
        """Compare an engine with what it must agree with."""
        from torchferry.pipeline.export import reference, rewriter_context

        exported = self.export(engine.target)
        context = functools.partial(rewriter_context, self.source, engine.target, self.cfg)
        with reference(exported, self.source, context) as against:
            report = verify_at(self.steps, engine, against, self.data, criterion, self.sizes)
        return Arrival(engine, exported, prepared, report)

    def reach(self, target: Target, scratch: Path) -> Arrival:
        """Go all the way to a target.

        Raises:
            TorchferryError: As ``export``, ``prepare``, ``compile`` and ``verify``.
        """
        prepared = self.prepare(target)
        return self.verify(self.compile(prepared, target, scratch), prepared, self.criterion(target))


def verify_at(
    steps: Steps,
    engine: Engine,
    source: Source,
    data: Any,
    tolerance: Criterion | None,
    sizes: Mapping[str, Sequence[int]] | None,
) -> Report:
    """Verify as one step, at every combination of the sizes given, or at sizes chosen from the ranges.

    An engine that only compiles here gives a report with nothing compared and the warning ``engine-not-run``.
    """
    from torchferry.verification import verify

    available = backends.get(engine.target.backend).availability()
    if available.ok and not available.can_run:
        return _not_run(engine, source, available.reason)
    chosen = None if sizes is None else [dict(zip(sizes, values, strict=True)) for values in product(*sizes.values())]
    with steps.step(f"verify {engine.target}") as step:
        report = verify(engine, source, data, tolerance=tolerance, sizes=chosen)
        worst = max((c.max_abs for c in report.comparisons), default=0.0)
        cases = len({c.case for c in report.comparisons})
        step.detail = f"{cases} cases, max abs difference {worst:.3g}"
    return report


def _not_run(engine: Engine, source: Source, reason: str) -> Report:
    finding = Finding(
        "engine-not-run",
        "warning",
        f"{engine.target} was compiled and not run: {reason}",
        where=str(engine.target),
        hint="run `torchferry verify` on the package where the engine runs",
    )
    return Report(f"verification of {type(source.model).__name__} on {engine.target}", (finding,))


def join_reports(reports: Sequence[Report]) -> Report:
    """Join the verifications of several engines into one; every comparison and finding says which it is about."""
    return functools.reduce(Report.joined, reports if len(reports) == 1 else [_labelled(report) for report in reports])


def _labelled(report: Report) -> Report:
    target = report.title.rpartition(" on ")[2]
    return dataclasses.replace(
        report,
        comparisons=tuple(dataclasses.replace(c, name=f"{c.name} on {target}") for c in report.comparisons),
        findings=tuple(dataclasses.replace(f, where=f"{f.where}, on {target}") for f in report.findings),
    )
