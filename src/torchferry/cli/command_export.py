"""``torchferry export``: from a PyTorch model to an ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.cli.model_flags import add_model_flags, read_config
from torchferry.cli.outputs import check_output_file

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("export", help="export a model to an ONNX file")
    add_model_flags(parser)
    parser.add_argument("-o", "--out", metavar="FILE", default="model.onnx", help="default: model.onnx")
    parser.add_argument("--marks", action="store_true", help="keep what the model marks as nodes of the graph")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.core.target import Target
    from torchferry.pipeline.deploy import load_model_and_data
    from torchferry.pipeline.export import export
    from torchferry.pipeline.steps import Steps

    out = check_output_file(options.out)
    config = read_config(options, options.out)
    steps = Steps(terminal)
    loaded = load_model_and_data(config, steps)
    with steps.step("export") as step:
        target = Target(**config.targets[0].model_dump())
        exported = export(loaded.source, target=target, apply_marks=options.marks)
        step.detail = str(exported)
    terminal.findings(exported.report.findings)
    exported.report.raise_for_failure()
    exported.save(out)
    terminal.result(options.out, {"model": options.out, "steps": steps.done, "report": exported.report.to_dict()})
    return 0
