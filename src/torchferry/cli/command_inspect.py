"""``torchferry inspect``: what is in an ONNX file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from torchferry.cli.terminal import Terminal
    from torchferry.graph.inspection import Inspection, ModuleRow


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("inspect", help="show what is in an ONNX file")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="levels of modules to show; default: 2")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every module")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.graph import as_exported
    from torchferry.graph.inspection import inspect

    found = inspect(as_exported(options.model))
    terminal.result("\n".join(_lines(found, options.depth)), dataclasses.asdict(found))
    return 0


def _lines(found: Inspection, depth: int) -> Iterable[str]:
    yield from _section("inputs", found.inputs)
    yield from _section("outputs", found.outputs)
    yield from _section("dimensions", [f"{name} {allowed}" for name, allowed in found.dims.items()])
    yield from _section("opsets", [f"{domain} {version}" for domain, version in found.opsets.items()])
    yield from _section("parameters", [f"{found.parameters:,}, {found.weights_bytes / 2**20:.2f} MiB"])
    counted = {
        domain: ", ".join(f"{n} x{count}" for n, count in ops.items()) for domain, ops in found.operators.items()
    }
    yield from _section("operators", [f"{domain}: {operators}" for domain, operators in counted.items()])
    yield from _section("marks", found.marks)
    yield from _section("modules", [_module(row) for row in found.modules if _level(row) <= depth])


def _section(title: str, lines: Iterable[str]) -> list[str]:
    shown = [f"  {line}" for line in lines]
    return [title, *shown] if shown else []


def _level(row: ModuleRow) -> int:
    return row.path.count(".") + 1 if row.path else 0


def _module(row: ModuleRow) -> str:
    name = "  " * _level(row) + (row.path.rpartition(".")[2] or "(root)")
    return f"{name:30} {row.nodes:6} nodes {row.parameters:14,} parameters"
