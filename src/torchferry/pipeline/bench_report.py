"""What a benchmark measured, as text, JSON and a page."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.core.files import write_text
from torchferry.core.report import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.core.engine import LayerTime

_TITLES = ("median ms", "quartiles", "ratio", "quartiles", "runs/s", "cpu ms", "cold s", "peak MiB", "max diff")
_LAYERS = 10  # the slowest ones, that the text shows


@dataclass(frozen=True)
class Quartiles:
    """The middle of some numbers, and how far the middle half of them spreads."""

    first: float
    median: float
    third: float

    @staticmethod
    def of(values: list[float]) -> Quartiles:
        """Return the quartiles of at least one number."""
        if len(values) == 1:
            return Quartiles(values[0], values[0], values[0])
        return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Quartiles:
    """Return one contender's times ÷ another's, round by round, over the rounds that both had."""
    return Quartiles.of([statistics.median(a) / statistics.median(b) for a, b in zip(own, other, strict=False)])


@dataclass(frozen=True)
class Measured:
    """What one contender took.

    Attributes:
        rounds: Seconds of every run, by round.
        cpu_seconds: Time of all its threads together, a run; median of the rounds.
        open_seconds: From nothing, in a fresh process: the library imported, the model loaded.
        first_seconds: The first run after that.
        peak_mib: Largest resident memory of its process, in MiB, Python included.
        layers: Where the engine tells them, the times of its layers, measured apart from the rest.
        difference: Largest absolute difference of its outputs from the baseline's; None if they cannot be compared.
    """

    rounds: tuple[tuple[float, ...], ...]
    cpu_seconds: float
    open_seconds: float
    first_seconds: float
    peak_mib: float
    layers: tuple[LayerTime, ...] = ()
    difference: float | None = None

    @property
    def latency(self) -> Quartiles:
        """Seconds of one run."""
        return Quartiles.of([seconds for taken in self.rounds for seconds in taken])

    @property
    def throughput(self) -> float:
        """Runs a second, one after the other."""
        return sum(map(len, self.rounds)) / sum(map(sum, self.rounds))

    @property
    def cold_seconds(self) -> float:
        """Opening and the first run."""
        return self.open_seconds + self.first_seconds


@dataclass(frozen=True)
class BenchRow:
    """One contender.

    Attributes:
        name: The engine and its precision, ``torch`` or ``torch.compile``; after its model's where there are several.
        version: Of the engine.
        measured: What was measured; None if it failed.
        failed: Why it failed; empty if it did not.
        compile_seconds: What compiling it took, if that was done here.
    """

    name: str
    version: str = ""
    measured: Measured | None = None
    failed: str = ""
    compile_seconds: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """All contenders of one benchmark.

    Attributes:
        rows: In the order given.
        inputs: What every contender was run on, such as ``x: float32[1, 3, 224, 224]``.
        threads: Threads of each.
        machine: The processor, its cores, and how busy the machine was at the start.
    """

    rows: tuple[BenchRow, ...]
    inputs: tuple[str, ...]
    threads: int
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> BenchRow | None:
        """The contender that the others are compared with: the first that did not fail."""
        return next((row for row in self.rows if row.measured is not None), None)

    @property
    def fastest(self) -> BenchRow | None:
        """The fastest of those that were in all rounds; None if all failed."""
        measured = [row for row in self.rows if row.measured is not None]
        most = max((len(row.measured.rounds) for row in measured if row.measured), default=0)
        whole = [row for row in measured if row.measured and len(row.measured.rounds) == most]
        return min(whole, key=lambda row: row.measured.latency.median if row.measured else 0, default=None)

    def ratio(self, row: BenchRow, to: BenchRow | None = None) -> Quartiles | None:
        """Return a contender's latency ÷ another's, the baseline's by default, round by round; None if one failed.

        A machine that is slow for a while is slow for both contenders of a round, so that this varies less than the
        latencies do.
        """
        other = to or self.baseline
        if other is None or other.measured is None or row.measured is None:
            return None
        return ratios(row.measured.rounds, other.measured.rounds)

    def to_text(self) -> str:
        """Render for a terminal or a log."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        table = [("", *_TITLES), *((row.name, *self._cells(row)) for row in self.rows)]
        # The reason of one that failed stands in place of its figures, and is as long as it is.
        widths = [max(len(line[i]) for line in table if len(line) > len(_TITLES)) for i in range(len(_TITLES) + 1)]
        widths[0] = max(len(line[0]) for line in table)
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines = [f"{'; '.join(self.inputs)}; {threads} each; {machine}"]
        for name, *cells in table:
            figures = zip(cells, widths[1:], strict=True) if len(cells) == len(_TITLES) else [(cells[0], 0)]
            lines.append("  ".join([f"{name:{widths[0]}}", *(f"{cell:>{w}}" for cell, w in figures)]).rstrip())
        for row in self.rows:
            lines += _layer_lines(row)
        return "\n".join(lines)

    def _cells(self, row: BenchRow) -> list[str]:
        measured, ratio = row.measured, self.ratio(row)
        if measured is None or ratio is None:
            return [row.failed]
        latency = measured.latency
        return [
            f"{latency.median * 1e3:.3f}",
            f"{latency.first * 1e3:.3f}..{latency.third * 1e3:.3f}",
            f"{ratio.median:.3f}",
            f"{ratio.first:.3f}..{ratio.third:.3f}",
            f"{measured.throughput:.1f}",
            f"{measured.cpu_seconds * 1e3:.3f}",
            f"{measured.cold_seconds:.2f}",
            f"{measured.peak_mib:.0f}",
            "" if measured.difference is None else f"{measured.difference:.1e}",
        ]

    def __str__(self) -> str:
        return self.to_text()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON values, with the figures that the text shows."""
        values: dict[str, Any] = plain(self)
        baseline = self.baseline
        values["baseline"] = baseline.name if baseline else None
        for row, shown in zip(self.rows, values["rows"], strict=True):
            if row.measured is not None:
                shown["measured"] |= {
                    "latency": plain(row.measured.latency),
                    "throughput": row.measured.throughput,
                    "cold_seconds": row.measured.cold_seconds,
                    "ratio": plain(self.ratio(row)),
                }
        return values

    def to_json(self) -> str:
        """Render as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """Render as one self-contained page with plots (needs Jinja2, which comes with the ``export`` extra)."""
        from torchferry.pipeline.bench_page import render

        return render(self)

    def save(self, path: str | Path) -> None:
        """Write ``.html``, ``.json`` or text, by the name's ending.

        Raises:
            OutputError: If the file cannot be written, or is a page and Jinja2 is not installed.
        """
        path = Path(path)
        renderer = {".html": self.to_html, ".json": self.to_json}.get(path.suffix, self.to_text)
        write_text(path, renderer())


def _layer_lines(row: BenchRow) -> list[str]:
    layers = row.measured.layers if row.measured else ()
    if not layers:
        return []
    total = sum(layer.seconds for layer in layers) or 1.0
    slowest = sorted(layers, key=lambda layer: -layer.seconds)[:_LAYERS]
    return [f"{row.name}: the slowest {len(slowest)} of {len(layers)} layers"] + [
        f"  {layer.seconds * 1e3:9.3f} ms {layer.seconds / total:6.1%}  {layer.kind}  {layer.name}" for layer in slowest
    ]
