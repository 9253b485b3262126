"""``torchferry inspect``: what is in an ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.cli.outputs import check_output_file
from torchferry.core.errors import OutputError
from torchferry.core.files import require_file, write_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from torchferry.cli.terminal import Terminal
    from torchferry.graph.inspection import Inspection, ModuleRow

_NETRON_PAGE = "https://netron.app"


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("inspect", help="show what is in an ONNX file")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="levels of modules to show; default: 2")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every module")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--html", metavar="FILE", help="draw the graph as a page that needs no network")
    shown.add_argument("--netron", action="store_true", help="show the file in Netron, served here until Ctrl-C")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.graph import as_exported
    from torchferry.graph.inspection import inspect

    if options.netron:
        return _show_in_netron(options.model, terminal)
    out = check_output_file(options.html) if options.html else None
    exported = as_exported(options.model)
    if out is not None:
        from torchferry.graph.inspection_page import render

        write_text(out, render(exported, Path(options.model).name))
        terminal.result(options.html, {"html": options.html})
        return 0
    found = inspect(exported)
    terminal.result("\n".join(_lines(found, options.depth)), dataclasses.asdict(found))
    return 0


def _show_in_netron(model: str, terminal: Terminal) -> int:
    """Serve the file on this machine's own address; nothing is sent anywhere."""
    require_file(model, "ONNX model")
    try:
        import netron  # type: ignore[import-not-found]
    except ImportError as exc:
        raise OutputError(
            f"cannot show '{model}' in Netron: it is not installed",
            hint=f"pip install netron; or open {_NETRON_PAGE} in a browser and choose the file there, or draw it with "
            "--html FILE",
        ) from exc
    host, port = netron.start(model, browse=True)
    address = f"http://{host}:{port}"
    terminal.result(f"{address}  (Ctrl-C ends it)", {"address": address})
    netron.wait()  # ends the server on Ctrl-C, which is the way to end it
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
    yield from _section("nodes", [f"{found.nodes:,}"])
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
