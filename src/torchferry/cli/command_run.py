"""``torchferry run``: a package on a picture or on arrays; needs neither torch nor onnx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.cli.outputs import check_output_file
from torchferry.core.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Container

    from torchferry.cli.terminal import Terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("run", help="run a package on a picture or on arrays")
    parser.add_argument("package", metavar="PACKAGE")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="DATA",
        help="picture.png, name=picture.png, name=file.npz or name=1,1,3,3; repeatable",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="a picture, or .npz for all outputs as arrays")
    parser.add_argument("--backend", metavar="ENGINE", help="an engine of the package; default: the first that is here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    import numpy as np

    from torchferry.core.files import new_files
    from torchferry.package import load
    from torchferry.pipeline.inputs import read_inputs
    from torchferry.pipeline.steps import Steps

    output = check_output_file(options.output)
    steps = Steps(terminal)
    with steps.step("load"):
        package = load(options.package)
    names = package.signature.input_names
    with package.open(options.backend) as session:
        if output.suffix != ".npz":
            picture, others = _one_picture(options.input, package.manifest.preprocess)
            extra = read_inputs(others, names, package.manifest.preprocess).calls()[0] if others else {}
            with steps.step("run"):
                package.run_picture(session, picture, output, extra)
        else:
            data = read_inputs(options.input, names, package.manifest.preprocess).calls()
            if len(data) > 1:
                raise ConfigError("several pictures for one input", hint="run them one by one")
            with steps.step("run"):
                outputs = session.run(data[0])
            with new_files(output.parent) as partial:
                np.savez(partial / output.name, **outputs)  # type: ignore[arg-type]
    terminal.result(str(output), {"output": str(output), "steps": steps.done})
    return 0


def _one_picture(items: list[str], declared: Container[str]) -> tuple[str, list[str]]:
    """Tell the picture from the other inputs: the item without a name, else the one named like a declared picture."""
    from torchferry.pipeline.inputs import split_item

    plain = [item for item in items if not split_item(item)[0] and not item.endswith((".npz", ".npy"))]
    chosen = plain or [item for item in items if split_item(item)[0] in declared]
    if len(chosen) != 1:
        given = f"several: {', '.join(chosen)}" if chosen else "none"
        raise ConfigError(f"expected one picture to run on, got {given}", hint="an --output file.npz takes arrays")
    return split_item(chosen[0])[1], [item for item in items if item is not chosen[0]]
