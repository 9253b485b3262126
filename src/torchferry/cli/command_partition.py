"""``torchferry partition``: a part of an ONNX file, cut at marks, modules or tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.cli.outputs import check_output_file
from torchferry.core.target import DEFAULT_BACKEND

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
    parser.add_argument(
        "--input",
        action="append",
        metavar="DATA",
        help="verify the part with this input of the whole: name=file.npz, name=picture.png or name=1,1,3; repeatable",
    )
    parser.add_argument("--target", metavar="ENGINE", default=DEFAULT_BACKEND, help="verify it there")
    parser.add_argument("--precision", default="fp32", help="verify it so; default: fp32")
    parser.add_argument("-o", "--out", metavar="FILE", default="part.onnx", help="default: part.onnx")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.core.target import Target
    from torchferry.partitioning import partition, plan_partition
    from torchferry.pipeline.steps import Steps

    out = check_output_file(options.out)
    target = Target(options.target, options.precision)
    given = {"start": options.start, "end": options.end, "save_file": Path(options.out).name}
    asked = [{key: value for key, value in given.items() if value is not None}]
    steps = Steps(terminal)
    with steps.step("partition") as step:
        (part,) = partition(options.model, asked)
        step.detail = str(part)
    values = {"model": options.out, "inputs": list(map(str, part.signature.inputs))}
    values |= {"outputs": list(map(str, part.signature.outputs))}
    text = options.out
    if options.input:
        from torchferry.pipeline.inputs import read_inputs
        from torchferry.pipeline.parts import verify_plan

        plan = plan_partition(options.model, asked)
        data = read_inputs(options.input, plan.whole.signature.input_names, {}).calls()
        report = verify_plan(plan, data, target, steps).raise_for_failure()
        values |= {"report": report.to_dict()}
        text = f"{options.out}\n{report}"
    part.save(out)
    terminal.result(text, {**values, "steps": steps.done})
    return 0
