"""What an emulation has to tell: which tensors go wrong, what they do to the outputs, what comes near."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from torchferry.core.report import Finding, Report
from torchferry.precision.emulate import OutputError, worse
from torchferry.precision.rounding import FP16_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchferry.core.engine import Array
    from torchferry.exporter.inputs import Call
    from torchferry.precision.emulate import BadTensor, Emulation
    from torchferry.precision.running import Figures

_SHOWN = 10  # tensors in a list
_MUCH = 0.01  # a share of subnormal numbers worth a line
_HINTS = {
    "input": "scale the model's input, or keep it in FP32",
    "constant": "clamp it to ±65504 if it only masks; else scale it, or keep it in FP32",
    "tensor": "scale what it is computed from, or keep it in FP32",
}


class Errors:
    """Differences of outputs, over any number of runs."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}
        self._largest: dict[str, float] = {}

    def add(self, exact: Mapping[str, Array], actual: Mapping[str, Array], ideal: Mapping[str, Array]) -> None:
        """Take in one run: the outputs in FP32, as emulated, and ideal."""
        for name, want in exact.items():
            if want.dtype.kind != "f":
                continue
            known = np.isfinite(want)
            wide = want[known].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                off, least = (np.nan_to_num(np.abs(got[name][known] - wide), nan=np.inf) for got in (actual, ideal))
                squares = np.array([np.sum(np.square(part)) for part in (wide, off, least)])
            self._sums[name] = self._sums.get(name, np.zeros(3)) + squares
            self._largest[name] = max(self._largest.get(name, 0.0), float(np.max(off, initial=0)))

    def by_output(self) -> dict[str, OutputError]:
        """Return what all runs give."""
        return {name: _output_error(self._largest[name], *sums) for name, sums in self._sums.items()}


def _output_error(largest: float, norm: float, off: float, least: float) -> OutputError:
    relative, ideal = (float(np.sqrt(part / norm)) if norm else 0.0 if not part else np.inf for part in (off, least))
    return OutputError(largest, relative, ideal)


def emulation_report(emulation: Emulation, calls: Iterable[Call]) -> Report:
    """Run everything and write the report; see ``Emulation.report``."""
    errors = Errors()
    figures: Figures | None = None
    bad: dict[int, BadTensor] = {}
    legitimate: set[int] = set()
    count = 0
    for call in calls:
        feeds = emulation.feeds(call)
        own, seen = emulation.runner("census").run(feeds)
        found = emulation.bad_of(seen, feeds)
        legitimate |= {int(index) for index in np.flatnonzero(~seen.is_finite)} - found.keys()
        bad = worse(bad, found)
        errors.add(emulation.runner("fp32").run(feeds)[0], own, emulation.runner("ideal").run(feeds)[0])
        figures = seen if figures is None else figures.joined(seen)
        count += 1
    assert figures is not None  # there is at least one call
    ordered = [bad[index] for index in sorted(bad)]
    report = Report(
        f"FP16 emulation ({emulation.mode}) of {emulation.name}",
        (*_bad_findings(ordered), *_other_findings(emulation, figures, legitimate - bad.keys())),
    )
    report = report.with_facts("tensors", _range_facts(emulation, figures, len(bad), count))
    if ordered:
        report = report.with_facts("bad tensors", _listed({t.name: f"{t}; {t.where}" for t in ordered}))
    beyond = emulation.accumulators_of(figures)
    if beyond:
        rows = {a.name: f"{a.operator}, at most {a.bound:.6g}; {a.module or a.name}" for a in beyond}
        report = report.with_facts("accumulators beyond 65504", _listed(rows))
    return report.with_facts("outputs against FP32", {n: _error_text(e) for n, e in errors.by_output().items()})


def _listed(rows: dict[str, str]) -> dict[str, str]:
    shown = dict(list(rows.items())[:_SHOWN])
    return shown if len(rows) <= _SHOWN else {**shown, "…": f"{len(rows) - _SHOWN} more"}


def _error_text(error: OutputError) -> str:
    return (
        f"max abs {error.max_abs:.3g}, relative L2 {error.relative:.3g}; "
        f"ideal {error.ideal:.3g}, ratio {error.ratio:.3g}"
    )


def _bad_findings(ordered: list[BadTensor]) -> list[Finding]:
    findings: list[Finding] = []
    for tensor in [tensor for tensor in ordered if tensor.is_origin][:_SHOWN]:
        message, where, hint = str(tensor), tensor.where, _HINTS[tensor.kind]
        if tensor.kind == "constant":
            findings.append(Finding("constant-out-of-range", "error", message, where, hint))
        elif tensor.reason == "nan":
            findings.append(Finding("fp16-nan", "error", message, where, hint))
        else:
            findings.append(Finding("fp16-overflow", "error", message, where, hint))
    return findings


def _other_findings(emulation: Emulation, figures: Figures, legitimate: set[int]) -> list[Finding]:
    instrumented = emulation.runner("own").instrumented
    findings: list[Finding] = []
    clipped = [t for t in instrumented.seen if t.range and t.range[0] == FP16_MAX and instrumented.is_half]
    if clipped:
        findings.append(
            Finding(
                "constant-clipped",
                "warning",
                f"{_names([t.name for t in clipped])} hold 65504 exactly: clipped, it seems, when converted to FP16",
                hint="compare them with the FP32 model's constants",
            )
        )
    if legitimate:
        names = [instrumented.seen[index].name for index in sorted(legitimate)]
        message = f"{_names(names)} are not finite in FP32 either, so they are not judged"
        findings.append(Finding("infinite-in-fp32", "info", message))
    beyond = emulation.accumulators_of(figures)
    if beyond:
        worst = max(beyond, key=lambda a: a.bound)
        findings.append(
            Finding(
                "accumulator-overflow",
                "warning",
                f"{len(beyond)} sums may pass 65504 on an engine that adds in FP16, at worst '{worst.name}' with a "
                f"bound of {worst.bound:.6g}; they were added in FP32 here",
                where=worst.module or None,
                hint="let the engine accumulate in FP32, or scale what flows in",
            )
        )
    if instrumented.closed:
        names = [f"{t.operator} '{t.name}'" for t in instrumented.closed]
        message = f"{_names(names)} may hold sums that were not opened; they were computed in FP32"
        findings.append(Finding("sums-not-opened", "warning", message))
    if instrumented.unrounded:
        message = f"{_names(list(instrumented.unrounded))} were not rounded, since their dtype is unknown"
        findings.append(Finding("tensor-not-rounded", "warning", message))
    return findings


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _range_facts(emulation: Emulation, figures: Figures, bad: int, batches: int) -> dict[str, str]:
    seen = emulation.runner("own").instrumented.seen
    facts = {"batches": str(batches), "seen": str(len(seen)), "bad": str(bad)}
    judged = np.nan_to_num(figures.magnitude, posinf=0)  # what is infinite is told above
    if len(judged) and judged.max() > 0:
        nearest = int(judged.argmax())
        bits = np.log2(FP16_MAX / judged[nearest])
        facts["largest"] = f"{judged[nearest]:.6g} in '{seen[nearest].name}', {bits:.1f} bits below the limit"
        if bits < 0:
            facts["largest"] = f"{judged[nearest]:.6g} in '{seen[nearest].name}', {-bits:.1f} bits beyond the limit"
    many = [index for index in np.argsort(-figures.subnormal)[:3].tolist() if figures.subnormal[index] > _MUCH]
    facts["subnormal"] = (
        ", ".join(f"{figures.subnormal[i]:.1%} of '{seen[i].name}'" for i in many) or "at most 1% of any tensor"
    )
    return facts
