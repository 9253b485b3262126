"""``torchferry deploy``: from a PyTorch model to a proven package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.cli.model_flags import add_budget_flag, add_model_flags, read_config

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "deploy",
        help="export, compile, verify and pack a model",
        description="Export, compile, verify and pack a model. The package is whole or absent.",
    )
    add_model_flags(parser)
    add_budget_flag(parser)
    parser.add_argument("-o", "--out", metavar="FOLDER", help="the package's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.pipeline.auto import tried_table
    from torchferry.pipeline.deploy import deploy_config
    from torchferry.pipeline.steps import Steps

    config = read_config(options, options.out)
    steps = Steps(terminal)
    deployed = deploy_config(config, overwrite=options.overwrite, steps=steps)
    package, report, tried = deployed.package, deployed.report, deployed.tried
    terminal.findings(report.findings)
    values = {"package": str(package.folder), "steps": steps.done, "report": report.to_dict()}
    terminal.result(
        "\n".join(
            [str(package), *([tried_table(tried)] if tried else []), f"report: {package.folder / 'report.html'}"]
        ),
        {**values, "tried": tried} if tried else values,
    )
    return 0
