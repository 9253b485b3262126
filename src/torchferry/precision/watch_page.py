"""The headroom along the network as a drawing, and the page around it; self-contained, without scripts."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchferry.precision.watch_report import ModuleRange, WatchReport

_LEFT, _TOP, _RIGHT, _BOTTOM = 46, 14, 12, 30
_HEIGHT = 240
_MOST, _LEAST = 24.0, -24.0  # bits; what lies outside is drawn at the edge
_STEP = 4  # bits from one line to the next
_STYLE = """
  :root { color-scheme: light dark; --ink: #1b1f24; --faint: #5b6470; --line: #d6dae0; --ok: #3a6fb0; --bad: #b3261e; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e4e7eb; --faint: #9aa4b0; --line: #363c45; --ok: #6ea3e0; --bad: #ff8a80; }
  }
  text { font: 12px system-ui, "Liberation Sans", sans-serif; fill: var(--faint); }
  .grid { stroke: var(--line); } .limit { stroke: var(--bad); } .ok { fill: var(--ok); } .bad { fill: var(--bad); }
"""
_PAGE_STYLE = """
  body { margin: 0 auto; padding: 1.5rem 1rem; max-width: 70rem; color: var(--ink);
    font: 15px/1.5 system-ui, "Liberation Sans", sans-serif; }
  svg { width: 100%; height: auto; } table { border-collapse: collapse; font-size: .9rem; }
  th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
  th:first-child, td:first-child { text-align: left; } tr.beyond td { color: var(--bad); }
"""


def headroom_svg(report: WatchReport) -> str:
    """Draw one bar for each innermost module in the order of execution: up for headroom, down for what is missing."""
    rows = [row for row in report.modules if row.is_leaf]
    bits = [min(_MOST, max(_LEAST, row.headroom)) for row in rows]
    top = math.ceil(max([_STEP, *bits]) / _STEP) * _STEP
    low = math.floor(min([0, *bits]) / _STEP) * _STEP
    width = max(4.0, min(28.0, 900 / max(1, len(rows))))
    right = _LEFT + width * len(rows)

    def y(value: float) -> float:
        return _TOP + _HEIGHT * (top - value) / (top - low)

    parts = [
        f'<line class="{"limit" if bit == 0 else "grid"}" x1="{_LEFT}" x2="{right:g}" y1="{y(bit):g}" y2="{y(bit):g}"/>'
        f'<text x="{_LEFT - 6}" y="{y(bit) + 4:g}" text-anchor="end">{f"{bit:+d}" if bit else 0}</text>'
        for bit in range(low, top + 1, _STEP)
    ]
    for index, (row, value) in enumerate(zip(rows, bits, strict=True)):
        upper, lower = sorted((y(value), y(0)))
        parts.append(
            f'<rect class="{"bad" if value < 0 else "ok"}" x="{_LEFT + index * width + 1:g}" y="{upper:g}" '
            f'width="{width - 2:g}" height="{max(1.0, lower - upper):g}"><title>{escape(_label(row))}</title></rect>'
        )
    bottom = _TOP + _HEIGHT + 20
    parts.append(f'<text x="{_LEFT}" y="{bottom}">bits below 65504, module after module</text>')
    size = f"0 0 {max(right + _RIGHT, 320):g} {_TOP + _HEIGHT + _BOTTOM}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" '
        f'aria-label="headroom along the network"><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _label(row: ModuleRange) -> str:
    return f"{row.path or '(root)'} ({row.kind}): largest {row.given:.4g}, {row.headroom:+.1f} bits"


def page(report: WatchReport) -> str:
    """Return the page: verdict, crossings, the drawing and the table of modules."""
    head, *lines = report.to_text().splitlines()
    notes = [line for line in lines[: len(lines) - len(report.modules) - 1 - bool(report.not_called)] if line]
    rows = "".join(
        f"<tr{' class=beyond' if row.is_beyond else ''}><td>{escape(row.path or '(root)')} ({escape(row.kind)})</td>"
        f"<td>{row.calls}</td><td>{row.taken:.4g}</td><td>{row.given:.4g}</td><td>{row.headroom:+.1f}</td>"
        f"<td>{row.subnormal:.1%}</td><td>{row.flushed:.1%}</td><td>{row.nans}</td><td>{row.infinities}</td></tr>"
        for row in report.modules
    )
    titles = ("module", "calls", "largest in", "largest out", "headroom", "subnormal", "to zero", "NaN", "infinite")
    heading = "".join(f"<th>{title}</th>" for title in titles)
    missing = f"<p>not called: {escape(', '.join(report.not_called))}</p>" if report.not_called else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(head)}</title><style>{_STYLE}{_PAGE_STYLE}</style></head><body><h1>{escape(head)}</h1>"
        f"<pre>{escape(chr(10).join(notes))}</pre>{headroom_svg(report)}"
        f"<table><thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table>{missing}</body></html>\n"
    )
