"""``torchferry compile``: from any ONNX file to a package for one engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.core.target import DEFAULT_BACKEND

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("compile", help="compile an ONNX file for an engine")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("--backend", "--target", dest="backend", default=DEFAULT_BACKEND, metavar="ENGINE")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help="the package's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry import backends
    from torchferry.core.files import check_free
    from torchferry.core.target import Target
    from torchferry.graph import as_exported
    from torchferry.package import MANIFEST_FILE, pack
    from torchferry.pipeline.steps import Steps

    target = Target(options.backend, options.precision)
    backends.check_target(target)
    check_free(Path(options.out), overwrite=options.overwrite, marker=MANIFEST_FILE)
    steps = Steps(terminal)
    with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
        with steps.step(f"compile for {target}"):
            exported = as_exported(options.model, target)
            engine = backends.compile(exported, target, Path(scratch) / str(target))
        with steps.step("pack"):
            package = pack(engine, options.out, name=Path(options.model).stem, overwrite=options.overwrite)
    terminal.result(str(package), {"package": str(package.folder), "steps": steps.done})
    return 0
