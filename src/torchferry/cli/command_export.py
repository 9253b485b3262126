"""``torchferry export``: from a PyTorch model, or from a codebase's configs, to ONNX files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.cli.model_flags import add_model_flags, read_config
from torchferry.cli.outputs import check_output_file
from torchferry.core.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal

_OUT = "model.onnx"
# Flags of the form with a deploy.toml or --model.
_OTHER_FORM = ("model", "checkpoint", "input", "input_names", "output_names", "dynamic", "target", "precision", "opset",
    "set", "marks")  # fmt: skip


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="export a model to an ONNX file",
        description="Export a model to an ONNX file. With four arguments: a model of OpenMMLab as its deploy config "
        "says, verified, with its parts and a report.",
    )
    add_model_flags(parser)
    parser.add_argument(
        "codebase",
        nargs="*",
        metavar="MODEL_CFG CHECKPOINT IMAGE",
        help="of OpenMMLab; CONFIG is then the deploy config, .py or .toml. CHECKPOINT: a file, an https address, none",
    )
    parser.add_argument("--work-dir", metavar="FOLDER", help="where everything goes; of the form with four arguments")
    parser.add_argument("--device", help="where it is verified; of the form with four arguments, default: cpu")
    parser.add_argument("-o", "--out", metavar="FILE", default=_OUT, help=f"default: {_OUT}")
    parser.add_argument("--marks", action="store_true", help="keep what the model marks as nodes of the graph")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    if options.codebase:
        return _run_codebase(options, terminal)
    for flag in ("work_dir", "device"):
        if getattr(options, flag) is not None:
            raise ConfigError(
                f"--{flag.replace('_', '-')} needs a deploy config, a model config, a checkpoint and a picture",
                hint="torchferry export DEPLOY_CFG MODEL_CFG CHECKPOINT IMAGE --work-dir FOLDER",
            )
    from torchferry.pipeline.deploy import load_model_and_data, tolerance_of
    from torchferry.pipeline.export import export
    from torchferry.pipeline.parts import export_parts
    from torchferry.pipeline.steps import Steps

    out = check_output_file(options.out)
    config = read_config(options, options.out)
    steps = Steps(terminal)
    loaded = load_model_and_data(config, steps)
    with steps.step("export") as step:
        target = config.engines()[0]
        partition = config.partition_config
        marks = options.marks or (partition is not None and partition.apply_marks)
        exported = export(loaded.source, target=target, apply_marks=marks)
        step.detail = str(exported)
    report, text = exported.report.with_findings(config.findings()), options.out
    terminal.findings(report.findings)
    report.raise_for_failure()
    if partition is not None:
        tolerance = tolerance_of(config, target)
        parts = export_parts(
            exported, partition, out, loaded.calls, target, steps, source=loaded.source, tolerance=tolerance
        ).raise_for_failure()
        report, text = parts.joined(report), f"{options.out}\n{parts}"
    exported.save(out)
    terminal.result(text, {"model": options.out, "steps": steps.done, "report": report.to_dict()})
    return 0


def _run_codebase(options: argparse.Namespace, terminal: Terminal) -> int:
    from torchferry.pipeline.codebase import export_codebase
    from torchferry.pipeline.steps import Steps

    if len(options.codebase) != 3 or options.work_dir is None:
        got = " ".join([options.config, *options.codebase])
        raise ConfigError(
            f"a codebase's model needs four arguments and --work-dir, got '{got}'"
            + ("" if options.work_dir is None else f" --work-dir {options.work_dir}"),
            hint="torchferry export DEPLOY_CFG MODEL_CFG CHECKPOINT IMAGE --work-dir FOLDER",
        )
    idle = [flag for flag in _OTHER_FORM if getattr(options, flag) not in (None, False)]
    if idle or options.out != _OUT:
        flag = f"--{(idle or ['out'])[0].replace('_', '-')}"
        raise ConfigError(f"{flag} has no effect beside a deploy config", hint="say it in the deploy config")
    steps = Steps(terminal)
    model_config, checkpoint, picture = options.codebase
    report = export_codebase(
        options.config,
        model_config,
        checkpoint,
        picture,
        options.work_dir,
        device=options.device or "cpu",
        unsafe_checkpoint=options.unsafe_checkpoint,
        steps=steps,
    )
    terminal.findings(report.findings)
    report.raise_for_failure()
    page = f"{options.work_dir}/report.html"
    terminal.result(f"{options.work_dir}\nreport: {page}", {"steps": steps.done, "report": report.to_dict()})
    return 0
