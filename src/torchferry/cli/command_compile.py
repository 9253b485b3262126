"""``torchferry compile``: from any ONNX file to a package for one engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError
from torchferry.core.target import DEFAULT_BACKEND, Target

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from torchferry.cli.terminal import Terminal
    from torchferry.graph import Exported
    from torchferry.pipeline.steps import Steps


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("compile", help="compile an ONNX file for an engine")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("--backend", "--target", dest="backend", default=DEFAULT_BACKEND, metavar="ENGINE")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default=Target.device, help="for which devices, such as cuda:sm86,sm120")
    parser.add_argument(
        "--range",
        action="append",
        metavar="NAME=MIN[..OPT]..MAX",
        help="sizes of a dynamic dimension, such as batch=1..8, or with the usual one, batch=1..4..8; repeatable",
    )
    parser.add_argument(
        "--input",
        action="append",
        metavar="DATA",
        help="for int8: data to quantise on, name=file.npz, name=picture.png or name=1,1,3; repeatable",
    )
    parser.add_argument("-o", "--out", metavar="FOLDER", required=True, help="the package's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry import backends
    from torchferry.core.files import check_free
    from torchferry.graph import as_exported
    from torchferry.package import MANIFEST_FILE, pack
    from torchferry.pipeline.steps import Steps

    target = Target(options.backend, options.precision, options.device)
    ranges = [_range(text) for text in options.range or ()]
    backends.check_target(target)
    check_free(Path(options.out), overwrite=options.overwrite, marker=MANIFEST_FILE)
    steps = Steps(terminal)
    exported = as_exported(options.model, target)
    exported = exported.replace(signature=exported.signature.narrowed(ranges))
    if options.input or (target.precision == "int8" and not exported.is_quantized):
        exported = _quantized(exported, target, options.input or (), steps)
    with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
        with steps.step(f"compile for {target}") as step:
            engine = backends.compile(exported, target, Path(scratch) / str(target))
            step.detail = ", ".join(engine.adaptations)
            step.notable = any(done.endswith("in fp32") for done in engine.adaptations)
        with steps.step("pack"):
            package = pack(engine, options.out, name=Path(options.model).stem, overwrite=options.overwrite)
    terminal.findings(exported.report.findings)
    terminal.result(str(package), {"package": str(package.folder), "steps": steps.done})
    return 0


def _quantized(exported: Exported, target: Target, items: Sequence[str], steps: Steps) -> Exported:
    from torchferry.pipeline.inputs import read_inputs
    from torchferry.pipeline.quantized import quantize_for

    if target.precision != "int8":
        raise ConfigError("--input is data to quantise on, which --precision int8 asks for")
    if not items:
        raise ConfigError(
            "int8 needs data to quantise on", hint="give --input name=file.npz, several times or with several samples"
        )
    calls = read_inputs(items, exported.signature.input_names, {}).calls()
    with steps.step("quantize") as step:
        result = quantize_for(exported, calls)
        step.detail = f"on {len(calls)} calls"
    return result


def _range(text: str) -> Dimension:
    """Read ``batch=1..8`` or ``batch=1..4..8``."""
    dim = Dimension.parse(text)
    if dim.is_bare:
        raise ConfigError(f"--range '{text}' must look like batch=1..8 or batch=1..4..8")
    return dim
