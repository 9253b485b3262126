"""Drawing a report as one self-contained HTML page.

The page holds everything it shows: styles, histograms as SVG, pictures as ``data:`` URIs. It has no script and asks
the network for nothing; every text of the report is escaped.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from torchferry.core.compare import Tolerance
from torchferry.core.pages import page_environment

if TYPE_CHECKING:
    from torchferry.core.compare import Comparison
    from torchferry.core.report import Report

_LOWEST_DECADE = -10  # of ``Comparison.histogram``: zero, below 1e-10, the decades from there, above
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# The drawing's own units; the page scales it to its column.
_LEFT, _TOP, _BAR, _GAP, _HEIGHT = 58, 22, 30, 14, 150


def render(report: Report) -> str:
    """Return the report as an HTML page.

    Args:
        report: Its comparisons are grouped by output, with one histogram an output summed over the cases.

    Raises:
        OutputError: If Jinja2 is not installed.
    """
    environment = page_environment("the report")
    environment.filters |= {"figure": _figure, "png": _png, "tolerance": _tolerance}
    template = environment.from_string(files("torchferry.core").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(report=report, outputs=_outputs(report.comparisons))


@dataclass(frozen=True)
class _Bar:
    x: float
    y: float
    height: float
    count: int
    label: str


@dataclass(frozen=True)
class _Histogram:
    """Where every bar and tick lies, in the drawing's units; y grows downwards.

    Attributes:
        bars: Those that hold at least one element.
        x_ticks: Place and label of the decades' edges, and of the bar for zero.
        y_ticks: Place and label of the powers of ten of the count.
        limit: Place of the absolute tolerance or budget; None where it is not on the axis or differs between the cases.
        width: Of the drawing.
        right: Where the x axis ends.
        bottom: Where the x axis lies.
    """

    bars: tuple[_Bar, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    limit: float | None
    width: float
    right: float
    bottom: float


@dataclass(frozen=True)
class _Output:
    """One output over all cases, those that differ first."""

    name: str
    cases: tuple[Comparison, ...]
    histogram: _Histogram | None
    unplotted: int

    @property
    def failed(self) -> int:
        return sum(not case.passed for case in self.cases)


def _outputs(comparisons: tuple[Comparison, ...]) -> list[_Output]:
    grouped: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        grouped.setdefault(comparison.name, []).append(comparison)
    outputs = []
    for name, cases in grouped.items():
        counts = [sum(column) for column in zip(*(c.histogram for c in cases if c.histogram), strict=True)]
        limits = {_limit(case) for case in cases}
        outputs.append(
            _Output(
                name=name,
                cases=tuple(sorted(cases, key=lambda case: case.passed)),
                histogram=_histogram(counts, limits.pop() if len(limits) == 1 else None) if any(counts) else None,
                unplotted=sum(case.elements for case in cases) - sum(counts),
            )
        )
    return outputs


def _limit(case: Comparison) -> float | None:
    asked = case.tolerance
    absolute = asked.atol if isinstance(asked, Tolerance) else asked.max_abs
    return absolute if absolute and not _is_exact(case) else None


def _histogram(counts: list[int], limit: float | None) -> _Histogram:
    decades = range(_LOWEST_DECADE, _LOWEST_DECADE + len(counts) - 2)  # the edges, also the last one
    edge = {decade: _LEFT + _BAR + _GAP + (i + 1) * _BAR for i, decade in enumerate(decades)}
    starts = [float(_LEFT), *(edge[decades[0]] - _BAR + i * _BAR for i in range(len(counts) - 1))]
    names = [
        "exactly 0",
        f"below {_power(decades[0])}",
        *(f"{_power(d)} to {_power(d + 1)}" for d in decades[:-1]),
        f"{_power(decades[-1])} and above",
    ]
    bottom = _TOP + _HEIGHT
    top = max(1, math.ceil(math.log10(max(counts))))
    # The count's axis starts below 1, so that a single stray element still has a bar.
    unit = _HEIGHT / (top + 0.4)
    bars = [
        _Bar(x=x, y=bottom - height, height=height, count=count, label=name)
        for x, count, name in zip(starts, counts, names, strict=True)
        if count and (height := (math.log10(count) + 0.4) * unit)
    ]
    step = math.ceil(top / 4)
    within = limit is not None and decades[0] <= math.log10(limit) <= decades[-1]
    right = starts[-1] + _BAR
    return _Histogram(
        bars=tuple(bars),
        x_ticks=((_LEFT + _BAR / 2, "0"), *((edge[d], _power(d)) for d in decades[::2])),
        y_ticks=tuple((bottom - (e + 0.4) * unit, _power(e) if e > 1 else str(10**e)) for e in range(0, top + 1, step)),
        limit=edge[decades[0]] + (math.log10(limit) - decades[0]) * _BAR if limit and within else None,
        width=right + 10,
        right=right,
        bottom=bottom,
    )


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _png(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _is_exact(case: Comparison) -> bool:
    return case.dtype.startswith(("int", "uint", "bool"))


def _tolerance(case: Comparison) -> str:
    return "exact" if _is_exact(case) else str(case.tolerance)
