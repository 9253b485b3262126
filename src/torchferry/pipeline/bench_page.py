"""A benchmark as one page with plots: self-contained, without scripts, every text escaped."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from torchferry.core.pages import page_environment

if TYPE_CHECKING:
    from torchferry.pipeline.bench_report import BenchReport, BenchRow, Measured

# The drawings' own units; the page scales them to its column.
_LABEL, _WIDTH, _LINE = 170, 640, 26
_ROUNDS_HEIGHT = 200
_COLOURS = 6  # of the style sheet
_LAYERS = 15


def render(report: BenchReport) -> str:
    """Return the report as an HTML page.

    Raises:
        OutputError: If Jinja2 is not installed.
    """
    environment = page_environment("the report")
    template = environment.from_string(files("torchferry.pipeline").joinpath("bench.html.j2").read_text("utf-8"))
    rows = [(row, row.measured) for row in report.rows if row.measured is not None]
    return template.render(
        report=report,
        boxes=_boxes(rows),
        rounds=_rounds(rows),
        totals=[
            _bars("Cold start, seconds", [(row.name, taken.cold_seconds, "") for row, taken in rows], "{:.2f}"),
            _bars("Peak memory, MiB", [(row.name, taken.peak_mib, "") for row, taken in rows], "{:.0f}"),
        ],
        layers=[_layers(row, taken) for row, taken in rows if taken.layers],
    )


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis over some positive numbers, with a tick at 1, 2 and 5 of every decade."""

    low: float
    high: float
    length: float

    @staticmethod
    def over(values: list[float], length: float) -> _Axis:
        low, high = math.log10(min(values)), math.log10(max(values))
        edge = max(0.05, (high - low) * 0.05)
        return _Axis(low - edge, high + edge, length)

    def at(self, value: float) -> float:
        return (math.log10(value) - self.low) / (self.high - self.low) * self.length

    @property
    def ticks(self) -> list[tuple[float, str]]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        leads = (1, 2, 5) if self.high - self.low < 3 else (1,)
        found = [lead * 10.0**decade for decade in decades for lead in leads]
        return [(self.at(value), f"{value:g}") for value in found if self.low <= math.log10(value) <= self.high]


@dataclass(frozen=True)
class _Box:
    """One contender's latencies: the middle half, the median, and the whisker from the 5th to the 95th hundredth."""

    name: str
    y: float
    low: float
    first: float
    median: float
    third: float
    high: float
    title: str


@dataclass(frozen=True)
class _Boxes:
    boxes: tuple[_Box, ...]
    ticks: list[tuple[float, str]]
    height: float
    label: float = _LABEL
    width: float = _WIDTH
    line: float = _LINE


def _boxes(rows: list[tuple[BenchRow, Measured]]) -> _Boxes | None:
    if not rows:
        return None
    hundredths = []
    for _, taken in rows:
        values = [seconds * 1e3 for round_ in taken.rounds for seconds in round_]
        hundredths.append(statistics.quantiles(values * 2 if len(values) == 1 else values, n=20, method="inclusive"))
    axis = _Axis.over([value for cuts in hundredths for value in cuts], _WIDTH)
    boxes = []
    for place, ((row, taken), cuts) in enumerate(zip(rows, hundredths, strict=True)):
        low, first, median, third, high = (axis.at(cuts[cut]) for cut in (0, 4, 9, 14, 18))
        title = f"{row.name}: {taken.latency.median * 1e3:.3f} ms"
        boxes.append(_Box(row.name, place * _LINE, low, first, median, third, high, title))
    return _Boxes(tuple(boxes), axis.ticks, len(boxes) * _LINE)


@dataclass(frozen=True)
class _Line:
    name: str
    colour: int
    points: str


@dataclass(frozen=True)
class _Rounds:
    lines: tuple[_Line, ...]
    ticks: list[tuple[float, str]]
    label: float = 60
    width: float = _LABEL + _WIDTH - 60
    height: float = _ROUNDS_HEIGHT


def _rounds(rows: list[tuple[BenchRow, Measured]]) -> _Rounds | None:
    """Draw the median of every round, which shows whether the machine was at rest."""
    medians = [[statistics.median(round_) * 1e3 for round_ in taken.rounds] for _, taken in rows]
    if not rows or len(medians[0]) < 2:
        return None
    axis = _Axis.over([value for line in medians for value in line], _ROUNDS_HEIGHT)
    step = (_LABEL + _WIDTH - 60) / (len(medians[0]) - 1)
    lines = tuple(
        _Line(
            row.name,
            place % _COLOURS,
            " ".join(f"{i * step:.1f},{_ROUNDS_HEIGHT - axis.at(value):.1f}" for i, value in enumerate(line)),
        )
        for place, ((row, _), line) in enumerate(zip(rows, medians, strict=True))
    )
    return _Rounds(lines, [(_ROUNDS_HEIGHT - y, text) for y, text in axis.ticks])


@dataclass(frozen=True)
class _Bar:
    name: str
    y: float
    width: float
    figure: str
    title: str


@dataclass(frozen=True)
class _Bars:
    caption: str
    bars: tuple[_Bar, ...]
    height: float
    label: float = _LABEL
    width: float = _WIDTH
    line: float = _LINE


def _bars(caption: str, values: list[tuple[str, float, str]], style: str) -> _Bars:
    most = max((value for _, value, _ in values), default=0.0) or 1.0
    bars = tuple(
        _Bar(name, place * _LINE, value / most * (_WIDTH - 60), style.format(value), title or f"{name}: {value:g}")
        for place, (name, value, title) in enumerate(values)
    )
    return _Bars(caption, bars, len(bars) * _LINE)


def _layers(row: BenchRow, taken: Measured) -> _Bars:
    slowest = sorted(taken.layers, key=lambda layer: -layer.seconds)[:_LAYERS]
    return _bars(
        f"{row.name}: the slowest {len(slowest)} of {len(taken.layers)} layers, milliseconds",
        [(layer.kind, layer.seconds * 1e3, layer.name) for layer in slowest],
        "{:.3f}",
    )
