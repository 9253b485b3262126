"""What each way to FP16 makes of the zoo.

Usage: python benchmarks/fp16/table.py [--frozen | --development] [--nets NAME ...] [--methods NAME ...]
           [--cases FILE.py] [--peers FOLDER] [--rows FILE.json ...] [--markdown] [--json FILE.json]

A net is right if, in the mode and at the size of data in question, every tensor is finite and the outputs' error is at
most ten times that of ideal rounding (11 bits of mantissa, no end to the exponent). Data: held out, never used for
solving; 4x is the same, four times as large.

``--cases`` takes a file with a function ``cases()`` that returns a list of ``cases.Case``: any modules, any data.
``--peers`` is a folder that packages of other tools were installed into (``pip install --no-deps --target``).
``--rows`` takes what ``--json`` wrote in an earlier run: its rows are printed, and these methods are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from cases import names, of_file, of_net
from judge import from_json, judge
from methods import METHODS
from zoo import ZOO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cases import Case
    from judge import Row, Run

TIMES_IDEAL = 10.0
_RUNS = ("acc32 1x", "acc32 4x", "strict 1x", "strict 4x")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What each way to FP16 makes of the zoo.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--frozen", action="store_const", const="frozen", dest="which")
    which.add_argument("--development", action="store_const", const="development", dest="which")
    parser.add_argument("--nets", nargs="+", choices=list(ZOO), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--cases", type=Path, metavar="FILE.py")
    parser.add_argument("--peers", type=Path, metavar="FOLDER")
    parser.add_argument("--rows", nargs="+", type=Path, default=[], metavar="FILE.json")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    if chosen.peers:
        sys.path.append(str(chosen.peers.resolve()))  # last, so that what is installed here comes first
    torch.set_num_threads(1)
    earlier = [from_json(row) for file in chosen.rows for row in json.loads(file.read_text(encoding="utf-8"))]
    known = {(row.case, row.method): row for row in earlier if row.method in chosen.methods}
    rows: list[Row] = []
    for name, build in _cases(chosen):
        missing = [method for method in chosen.methods if (name, method) not in known]
        if missing:
            print(f"{name}: {', '.join(missing)}", file=sys.stderr)
            known.update({(row.case, row.method): row for row in judge(build(), missing)})
        rows += [known[name, method] for method in chosen.methods]
    if chosen.json:
        chosen.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n", encoding="utf-8")
    draw = _markdown if chosen.markdown else _text
    print(draw(summary(rows)))
    print()
    print(draw(details(rows)))
    return 0


def _cases(chosen: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Case]]]:
    if chosen.cases:
        yield from ((case.name, partial(_itself, case)) for case in of_file(chosen.cases))
    else:
        wanted = chosen.nets or names(chosen.which or "all")
        yield from ((name, partial(of_net, ZOO[name])) for name in wanted)


def _itself(case: Case) -> Case:
    return case


def is_right(run: Run) -> bool:
    """Tell whether nothing overflowed and the outputs are good."""
    return not run.first_bad and run.ratio <= TIMES_IDEAL


def summary(rows: list[Row]) -> list[list[str]]:
    """One line for each group and method."""
    lines = [
        ["group", "method", *[f"right, {name}" for name in _RUNS], "nets with 0 FP32 nodes", "FP32 nodes", "FP32 MACs"]
    ]
    lines[0] += ["nodes added", "error ÷ ideal (median, worst)", "seconds per 1000 nodes", "no result"]
    for group, method in dict.fromkeys((row.group, row.method) for row in rows):
        ours = [row for row in rows if (row.group, row.method) == (group, method)]
        done = [row for row in ours if not row.failure]
        count = len(ours)
        line = [group, method]
        if not done:
            lines.append([*line, *["" for _ in lines[0][3:]], f"{count}: {ours[0].failure}"])
            continue
        line += [f"{sum(is_right(row.runs[name]) for row in done)}/{count}" for name in _RUNS]
        ratios = [row.runs["acc32 1x"].ratio for row in done]
        line += [
            f"{sum(row.fp32_nodes == 0 for row in done)}/{count}",
            f"{sum(row.fp32_nodes for row in done) / sum(row.float_nodes for row in done):.1%}",
            f"{statistics.mean(row.fp32_macs for row in done):.1%}",
            f"{sum(row.added for row in done) / sum(row.nodes for row in done):+.1%}",
            f"{_number(statistics.median(ratios))}, {_number(max(ratios))}",
            f"{1000 * sum(row.seconds for row in done) / sum(row.nodes for row in done):.1f}",
            str(count - len(done)),
        ]
        lines.append(line)
    return lines


def details(rows: list[Row]) -> list[list[str]]:
    """One line for each net and method."""
    lines = [["net", "method", *_RUNS, "FP32 nodes", "FP32 MACs", "added", "error ÷ ideal", "s", "first bad tensor"]]
    for row in rows:
        if row.failure:
            lines.append([row.case, row.method, *["" for _ in lines[0][3:]], row.failure])
            continue
        first = next((row.runs[name].first_bad for name in _RUNS if row.runs[name].first_bad), "")
        lines.append(
            [
                row.case,
                row.method,
                *[_verdict(row.runs[name]) for name in _RUNS],
                f"{row.fp32_nodes}/{row.float_nodes}",
                f"{row.fp32_macs:.0%}",
                f"{row.added:+d}",
                _number(row.runs["acc32 1x"].ratio),
                f"{row.seconds:.2f}",
                first,
            ]
        )
    return lines


def _verdict(run: Run) -> str:
    return "overflow" if run.first_bad else "right" if is_right(run) else "wrong"


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2f}" if value < TIMES_IDEAL else f"{value:.0f}"


def _text(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    cells = [[cell.replace("|", "\\|") for cell in line] for line in [lines[0], rule, *lines[1:]]]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


if __name__ == "__main__":
    sys.exit(main())
