"""Choosing a target: every engine and precision that runs here is tried, and the fastest within the budget is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torchferry import backends
from torchferry.core.compare import TOLERANCES
from torchferry.core.errors import (
    BackendError,
    ExportError,
    FormatError,
    InputError,
    UnsupportedError,
    VerificationError,
)
from torchferry.core.report import Finding, Report
from torchferry.pipeline.bench import shown_inputs
from torchferry.pipeline.bench_driver import Contender, Plan, measure
from torchferry.pipeline.bench_report import BenchReport, BenchRow
from torchferry.pipeline.environment import usable_cores
from torchferry.pipeline.walk import Arrival, join_reports

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torchferry.core.compare import Criterion
    from torchferry.core.target import Target
    from torchferry.pipeline.walk import Walk

Verdict = Literal["chosen", "fallback", "within", "outside", "refused", "failed"]
_ROUNDS = 15
NOISE = 1.05
"""What takes at most this times as long as the fastest counts as equally fast."""


@dataclass(frozen=True)
class Tried:
    """What came of one engine at one precision.

    Attributes:
        target: The engine and its precision.
        verdict: ``chosen``; ``fallback``, packed behind the chosen one; ``within`` what was asked, and left aside;
            ``outside`` of it; ``refused``, where the engine does not take the graph; ``failed``, where it could not be
            measured.
        max_abs: Largest absolute error of any output; None if nothing was compared.
        relative: Largest L2 error of any output ÷ the L2 norm of what was expected.
        seconds: Median of its runs; None if it was not measured.
        ratio: Its time ÷ that of the fastest, median over the rounds.
        reason: Why it is outside, was refused or failed.
    """

    target: str
    verdict: Verdict
    max_abs: float | None = None
    relative: float | None = None
    seconds: float | None = None
    ratio: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        text: str = self.verdict
        if self.max_abs is not None:
            text += f", max abs {self.max_abs:.2e}, relative {self.relative:.2e}"
        if self.seconds is not None:
            text += f", {self.seconds * 1e3:.3f} ms, ratio {self.ratio:.3f}"
        return text + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Choice:
    """What is to be packed.

    Attributes:
        arrivals: In the order of preference; empty if there is nothing to pack.
        report: What verifying them found; if there are none, why.
        tried: What was tried; empty where the targets were named.
    """

    arrivals: tuple[Arrival, ...]
    report: Report
    tried: tuple[Tried, ...] = ()


def tried_table(tried: Sequence[Tried]) -> str:
    """Render what was tried as a table."""
    rows = [("tried", "verdict", "max abs", "relative", "median ms", "ratio", "")]
    for row in tried:
        errors = ("", "") if row.max_abs is None else (f"{row.max_abs:.2e}", f"{row.relative:.2e}")
        times = ("", "") if row.seconds is None else (f"{row.seconds * 1e3:.3f}", f"{row.ratio:.3f}")
        rows.append((row.target, row.verdict, *errors, *times, row.reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for target, verdict, *figures, reason in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(figures, widths[2:-1], strict=True)]
        lines.append("  ".join([f"{target:{widths[0]}}", f"{verdict:{widths[1]}}", *cells, reason]).rstrip())
    return "\n".join(lines)


def check_choice(asked: Target) -> None:
    """Check, before any work, that there is something to choose from.

    Raises:
        UnsupportedError: If no engine that runs here computes in the precision asked for.
    """
    targets, broken = _candidates(asked)
    if not targets:
        reasons = "".join(f"\n  {row.target}: {row.reason}" for row in broken)
        raise UnsupportedError(
            f"no engine that runs here can be chosen for '{asked}'{reasons}",
            hint="see what there is with `torchferry env`",
        )


def choose(walk: Walk, asked: Target, scratch: Path) -> Choice:
    """Try every engine and precision that runs here, and take the fastest that is within what is asked.

    Those within are measured in turn, each in a process of its own, on the first set of data. Of those that are as fast
    as the fastest, but for noise, the most exact is taken. One in less than fp32, which another machine may not compute
    in, has the fastest in fp32 behind it.

    Args:
        walk: What is deployed.
        asked: Its precision, if given, is the only one tried; its device and opset hold for every engine.
        scratch: A folder for compiled engines.

    Raises:
        ExportError: If the model can be exported for no engine.
    """
    criterion = walk.criterion(replace(asked, precision="fp32")) or TOLERANCES["fp32"]
    targets, broken = _candidates(asked)
    problems = _export(walk, targets)
    if len(problems) == len({target.backend for target in targets}):
        first = next(iter(problems.values()))
        if isinstance(first, ExportError):
            raise first
        return Choice((), first)
    attempts = _attempts(walk, targets, problems, criterion, scratch)
    arrivals = [attempt for attempt in attempts.values() if isinstance(attempt, Arrival)]
    within = [arrival for arrival in arrivals if arrival.report.passed]
    bench = _measured(walk, within)
    taken = _taken(list(zip(within, bench.rows, strict=True)), bench)
    tried = (*(_row(target, attempt, bench, taken) for target, attempt in attempts.items()), *broken)
    if taken:
        report = join_reports([arrival.report for arrival in taken])
    else:
        report = _nothing_left(walk, criterion, arrivals, tried)
    threads = f"{bench.threads} thread{'s' * (bench.threads > 1)} each"
    facts = {row.target: str(row) for row in tried} | {"measured on": f"{', '.join(bench.inputs)}; {threads}"}
    return Choice(taken, report.with_facts("tried", facts), tried)


def _candidates(asked: Target) -> tuple[list[Target], list[Tried]]:
    """Return what can be tried, and the engines that are installed and broken."""
    targets: list[Target] = []
    broken: list[Tried] = []
    for name in backends.running():
        try:
            able = backends.get(name).capabilities()
        except BackendError as exc:
            broken.append(Tried(name, "refused", reason=exc.message))
            continue
        precisions = [p for p in able.precisions if able.fast and asked.precision in (None, p)]
        targets += [replace(asked, backend=name, precision=p) for p in precisions]  # type: ignore[arg-type]
    return targets, broken


def _export(walk: Walk, targets: Sequence[Target]) -> dict[str, ExportError | Report]:
    """Export for every engine; return what is wrong, by engine, where that does not go well."""
    problems: dict[str, ExportError | Report] = {}
    for target in targets:
        if target.backend in problems:
            continue
        try:
            report = walk.export(target).report
        except ExportError as exc:
            problems[target.backend] = exc
        else:
            if not report.passed:
                problems[target.backend] = report
    return problems


def _attempts(
    walk: Walk,
    targets: Sequence[Target],
    problems: dict[str, ExportError | Report],
    criterion: Criterion,
    scratch: Path,
) -> dict[Target, Arrival | str]:
    """Go to every target; return where that leads, or why it leads nowhere."""
    unfit = {name: _why(problem) for name, problem in problems.items()}
    attempts: dict[Target, Arrival | str] = {}
    for target in targets:
        if target.backend in unfit:
            attempts[target] = unfit[target.backend]
            continue
        if target.precision == "int8" and walk.criterion(target) is None:
            attempts[target] = "how much error is allowed has not been said, as int8 needs"
            continue
        try:
            backends.check_target(target)
            prepared = walk.prepare(target)
            engine = walk.compile(prepared, target, scratch)
            attempts[target] = walk.verify(engine, prepared, criterion)
        except (BackendError, FormatError, InputError, VerificationError) as exc:
            attempts[target] = exc.message
            if target.precision == "fp32":  # every precision begins with this graph
                unfit[target.backend] = exc.message
    return attempts


def _why(problem: ExportError | Report) -> str:
    if isinstance(problem, ExportError):
        return problem.message
    return next(finding.message for finding in problem.findings if finding.severity == "error")


def _measured(walk: Walk, arrivals: Sequence[Arrival]) -> BenchReport:
    """Measure in turn, until those that are slower are known."""
    feeds = walk.feeds()[0]
    contenders = [
        Contender(str(arrival.target), {"kind": "engine", "folder": str(arrival.engine.folder)}, feeds)
        for arrival in arrivals
    ]
    plan = Plan(usable_cores(), rounds=_ROUNDS, race=True)
    return BenchReport(measure(contenders, plan, walk.steps), (shown_inputs(feeds),), plan.threads)


def _taken(timed: Sequence[tuple[Arrival, BenchRow]], bench: BenchReport) -> tuple[Arrival, ...]:
    """Return the one that is chosen, and its fallback if it needs one; nothing if none could be measured."""
    fastest = bench.fastest
    if fastest is None:
        return ()
    running = [(arrival, ratio.median) for arrival, row in timed if (ratio := bench.ratio(row, to=fastest)) is not None]
    chosen = min((arrival for arrival, ratio in running if ratio <= NOISE), key=lambda arrival: _errors(arrival)[1])
    if chosen.target.precision == "fp32":
        return (chosen,)
    sure = [
        (ratio, arrival)
        for arrival, ratio in running
        if arrival.target.precision == "fp32" and arrival.engine.signature == chosen.engine.signature
    ]
    return (chosen, *(arrival for _, arrival in sorted(sure, key=lambda pair: pair[0])[:1]))


def _errors(arrival: Arrival) -> tuple[float, float]:
    """Return the largest absolute and the largest relative error."""
    compared = arrival.report.comparisons
    return max((c.max_abs for c in compared), default=0.0), max((c.relative for c in compared), default=0.0)


def _row(target: Target, attempt: Arrival | str, bench: BenchReport, taken: Sequence[Arrival]) -> Tried:
    if isinstance(attempt, str):
        return Tried(str(target), "refused", reason=attempt)
    tried = Tried(str(target), "within")
    if attempt.report.comparisons:
        max_abs, relative = _errors(attempt)
        tried = replace(tried, max_abs=max_abs, relative=relative)
    if not attempt.report.passed:
        return replace(tried, verdict="outside", reason=_why(attempt.report))
    row = next(row for row in bench.rows if row.name == str(target))
    ratio = bench.ratio(row, to=bench.fastest)
    if row.measured is None or ratio is None:
        return replace(tried, verdict="failed", reason=row.failed)
    verdicts: tuple[Verdict, ...] = ("chosen", "fallback")
    verdict = dict(zip([arrival.target for arrival in taken], verdicts, strict=False)).get(target, tried.verdict)
    return replace(tried, verdict=verdict, seconds=row.measured.latency.median, ratio=ratio.median)


def _nothing_left(walk: Walk, criterion: Criterion, arrivals: Sequence[Arrival], tried: Sequence[Tried]) -> Report:
    finding = Finding(
        "nothing-within",
        "error",
        f"no engine here runs it within {criterion}" + "".join(f"\n  {row.target}: {row}" for row in tried),
        hint="allow a larger error, or name an engine and look at its report",
    )
    report = Report(f"deployment of {type(walk.source.model).__name__}", (finding,))
    if not arrivals:
        return report
    joined = join_reports([arrival.report for arrival in arrivals])
    return report.joined(replace(joined, findings=()))  # which the one finding sums up
