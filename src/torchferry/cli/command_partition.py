"""``torchferry partition``: a part of an ONNX file, cut at marks, modules or tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.cli.outputs import check_output_file

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("partition", help="cut a part out of an ONNX file")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument(
        "--start", action="append", metavar="SELECTOR", help="where the part begins, such as detector:input; repeatable"
    )
    parser.add_argument(
        "--end", action="append", metavar="SELECTOR", help="where it ends, such as backbone:output; repeatable"
    )
    parser.add_argument("-o", "--out", metavar="FILE", default="part.onnx", help="default: part.onnx")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.partitioning import partition
    from torchferry.pipeline.steps import Steps

    out = check_output_file(options.out)
    asked = {"start": options.start, "end": options.end, "save_file": Path(options.out).name}
    steps = Steps(terminal)
    with steps.step("partition") as step:
        (part,) = partition(options.model, [{key: value for key, value in asked.items() if value is not None}])
        part.save(out)
        step.detail = str(part)
    values = {"model": options.out, "inputs": list(map(str, part.signature.inputs))}
    values |= {"outputs": list(map(str, part.signature.outputs)), "steps": steps.done}
    terminal.result(options.out, values)
    return 0
