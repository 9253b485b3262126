"""``torchferry verify``: a package against the PyTorch model that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.cli.model_flags import add_model_flags, read_config

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("verify", help="compare a package with its PyTorch model")
    parser.add_argument("package", metavar="PACKAGE")
    add_model_flags(parser)
    parser.add_argument("--report", metavar="FILE", help="write the report as .html, .json or text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.package import load
    from torchferry.pipeline.deploy import tolerance_of, verify_at
    from torchferry.pipeline.steps import Steps

    package = load(options.package)
    config = read_config(options, options.package)
    steps = Steps(terminal)
    with steps.step("import torch"):
        from torchferry.pipeline.loading import load_source
    with steps.step("load model and data") as step:
        loaded = load_source(config)
        step.detail = "; ".join(loaded.notes)
    engine = package.engines[0]
    report = verify_at(
        steps, engine, loaded.source, loaded.calls, tolerance_of(config, engine.target), config.verify.sizes
    )
    if options.report:
        report.save(Path(options.report))
    terminal.result(report.to_text(), {"steps": steps.done, "report": report.to_dict()})
    return 0 if report.passed else 1
