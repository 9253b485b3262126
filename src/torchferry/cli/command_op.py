"""``torchferry op``: what is known about an operator, and which engines run it."""

from __future__ import annotations

import dataclasses
import io
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from torchferry.cli.terminal import Terminal
    from torchferry.exporter.operators import OnnxOperator, Overload
    from torchferry.pipeline.operators import Trial

_WIDTH = 120  # characters, where the output goes to no terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "op",
        help="tell what becomes of an operator",
        description="Tell what becomes of an operator in an export, and which engines run the ONNX operators like it.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="an operator of torch, such as asinh, aten::squeeze.dim or torchvision::deform_conv2d, or of ONNX: Resize",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.pipeline.steps import Steps

    steps = Steps(terminal)
    with steps.step("import torch"):
        from torchferry.exporter.operators import describe_operator, find_overload
        from torchferry.exporter.skeletons import skeletons
        from torchferry.pipeline.operators import try_operator, try_overload
    with steps.step("look it up"):
        overloads, near = describe_operator(options.name)
        missing = [find_overload(overload.name) for overload in overloads if overload.status == "missing"]
        symbolic = skeletons(missing) if missing else ""
    trials: dict[str, list[Trial]] = {}
    for overload in overloads:
        if overload.is_exported and overload.schema:
            with steps.step(f"run {overload.name}"):
                trials[overload.name] = try_overload(overload.name)
    for operator in near:
        with steps.step(f"run {operator.name}"):
            trials[operator.name] = try_operator(operator.name)
    values = {
        "name": options.name,
        "overloads": [{**dataclasses.asdict(o), "engines": trials.get(o.name, [])} for o in overloads],
        "onnx": [{**dataclasses.asdict(operator), "engines": trials[operator.name]} for operator in near],
        "symbolic": symbolic,
        "steps": steps.done,
    }
    text = _text(overloads, near, trials)
    terminal.result(f"{text}\n\nto complete:\n\n{symbolic}" if symbolic else text, values)
    return 0


def _text(overloads: Sequence[Overload], near: Sequence[OnnxOperator], trials: dict[str, list[Trial]]) -> str:
    parts = []
    if overloads:
        rows = [(o.schema or f"{o.name}(...)", o.status, _detail(o)) for o in overloads]
        parts.append(_table(("operator of torch", "export", "how"), rows))
    if near:
        onnx_rows = [
            (operator.name, operator.why, ", ".join(operator.inputs), ", ".join(operator.attributes), _opsets(operator))
            for operator in near
        ]
        parts.append(_table(("operator of ONNX", "why", "inputs", "attributes", "opsets"), onnx_rows))
    else:
        parts.append("no ONNX operator has a similar name")
    engine_rows = [(name, t.backend, t.status, t.detail) for name, tried in trials.items() for t in tried]
    if engine_rows:
        parts.append(_table(("operator", "engine", "result", "on what, or why"), engine_rows))
    return "\n\n".join(parts)


def _detail(overload: Overload) -> str:
    return f"{overload.detail} ({', '.join(overload.onnx)})" if overload.onnx else overload.detail


def _opsets(operator: OnnxOperator) -> str:
    return ", ".join(map(str, operator.opsets)) + (" (deprecated)" if operator.deprecated else "")


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table in plain text, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=shutil.get_terminal_size((_WIDTH, 0)).columns, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
