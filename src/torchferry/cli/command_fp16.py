"""``torchferry fp16``: find what overflows in FP16, repair it, prove the repair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.cli.model_flags import add_model_flags, read_config
from torchferry.cli.outputs import check_output_file
from torchferry.core.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal
    from torchferry.pipeline.config import DeployConfig

_EMULATED = "emulated"


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("fp16", help="find, repair and prove what overflows in FP16")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_check(verbs)
    _add_fix(verbs)
    _add_certify(verbs)
    _add_bisect(verbs)


def _add_check(verbs: Any) -> None:
    parser = verbs.add_parser(
        "check",
        help="tell what overflows",
        description="Run a PyTorch model or an ONNX file as FP16 hardware would, and name what goes wrong. Of a "
        "PyTorch model also the headroom of every module.",
    )
    add_model_flags(parser, "CONFIG|MODEL.onnx")
    parser.add_argument(
        "--mode",
        choices=("acc32", "strict", "ideal"),
        default="acc32",
        help="acc32 (default): tensors are rounded; strict: sums inside norms, means and the like too",
    )
    parser.add_argument("--report", metavar="FILE", help="write the report as .html, .json or text")
    parser.add_argument("--watch", metavar="FILE", help="write the headroom of every module as .html, .json or text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_check)


def _add_fix(verbs: Any) -> None:
    parser = verbs.add_parser(
        "fix",
        help="repair it with scales, and prove the repair",
        description="Solve a power of two for every tensor of a PyTorch model or an ONNX file, so that FP16 cannot "
        "overflow. Writes fixed.onnx, certificate.json, and what it takes to check the certificate again.",
    )
    add_model_flags(parser, "CONFIG|MODEL.onnx")
    parser.add_argument(
        "--headroom-bits",
        type=int,
        metavar="N",
        help="inputs may be 2**N times larger than those given; default: fp16.headroom_bits of the config, or 2",
    )
    parser.add_argument("--keep-io-types", action="store_true", help="inputs and outputs stay FP32")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="also repair the PyTorch model itself, and write its weights as .safetensors: with them .half() is safe",
    )
    parser.add_argument("-o", "--out", metavar="DIR", default="fp16", help="default: fp16")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_fix)


def _add_certify(verbs: Any) -> None:
    parser = verbs.add_parser(
        "certify", help="check a certificate again", description="Check again what `torchferry fp16 fix` wrote."
    )
    parser.add_argument("folder", metavar="DIR", help="what `torchferry fp16 fix` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_certify)


def _add_bisect(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bisect",
        help="find the operator at which an engine's result leaves the tolerance",
        description="Run ever shorter prefixes of a PyTorch model on an engine and the rest in PyTorch, until one "
        "operator is left. --target emulated stands for FP16 as hardware would compute it.",
    )
    add_model_flags(parser, "CONFIG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_bisect)


def _check(options: argparse.Namespace, terminal: Terminal) -> int:
    from torchferry.core.report import plain
    from torchferry.pipeline.steps import Steps

    pages = [check_output_file(page) if page else None for page in (options.report, options.watch)]
    steps = Steps(terminal)
    watched = None
    if _is_onnx(options):
        if options.watch:
            raise ConfigError("--watch needs a PyTorch model; an ONNX file has no modules to watch")
        model, calls = options.config, _arrays(options)
    else:
        from torchferry.pipeline.deploy import load_model_and_data
        from torchferry.pipeline.emulation import watch_calls

        loaded = load_model_and_data(_config(options), steps)
        model, calls = loaded.source, loaded.calls
        with steps.step("watch"):
            watched = watch_calls(loaded.source.model, calls)
    with steps.step("build") as step:
        from torchferry.pipeline.emulation import emulate

        emulation = emulate(model, mode=options.mode)
        step.detail = emulation.name
    with emulation, steps.step(f"emulate ({options.mode})"):
        report = emulation.report(calls)
    for page, saved in zip(pages, (report, watched), strict=True):
        if page is not None and saved is not None:
            saved.save(page)
    text = report.to_text() if watched is None else f"{watched}\n\n{report.to_text()}"
    values = {"report": report.to_dict(), "watch": None if watched is None else plain(watched), "steps": steps.done}
    terminal.result(text, values)
    return 0 if report.passed else 1


def _fix(options: argparse.Namespace, terminal: Terminal) -> int:
    import json

    from torchferry.core.files import check_free
    from torchferry.pipeline.config import HEADROOM_BITS
    from torchferry.pipeline.half import fix_weights
    from torchferry.pipeline.steps import Steps
    from torchferry.precision.certificate import CERTIFICATE_FILE
    from torchferry.precision.fix import fix

    out = Path(options.out)
    check_free(out, overwrite=options.overwrite, marker=CERTIFICATE_FILE)
    weights = check_output_file(options.weights) if options.weights else None
    steps = Steps(terminal)
    bits = HEADROOM_BITS
    model: Any = options.config
    if _is_onnx(options):
        if weights is not None:
            raise ConfigError("--weights needs a PyTorch model; an ONNX file's weights are in fixed.onnx")
        calls = _arrays(options)
    else:
        from torchferry.pipeline.deploy import load_model_and_data
        from torchferry.pipeline.export import export

        config = _config(options)
        bits = config.fp16.headroom_bits
        loaded = load_model_and_data(config, steps)
        calls = loaded.calls
        with steps.step("export"):
            model = export(loaded.source)
    bits = bits if options.headroom_bits is None else options.headroom_bits
    with steps.step("fix and certify") as step:
        _, certificate = fix(model, calls, bits, keep_io_types=options.keep_io_types)
        step.detail = f"{len(certificate.added)} nodes added, {len(certificate.islands)} stay FP32"
    certificate.save(out, overwrite=options.overwrite)
    written = [str(out)]
    if weights is not None:
        with steps.step("fix the module") as step:
            notes = fix_weights(loaded.source.model, calls, bits, weights)
            step.detail, step.notable = "; ".join(notes), bool(notes)
        written.append(options.weights)
    values = {**json.loads(certificate.to_json()), "written": written, "steps": steps.done}
    terminal.result("\n".join([str(certificate), "", *written]), values)
    return 0 if certificate.passed else 1


def _certify(options: argparse.Namespace, terminal: Terminal) -> int:
    import json

    from torchferry.pipeline.steps import Steps
    from torchferry.precision.checks import certify

    steps = Steps(terminal)
    with steps.step("certify"):
        certificate = certify(options.folder)
    terminal.result(str(certificate), {**json.loads(certificate.to_json()), "steps": steps.done})
    return 0 if certificate.passed else 1


def _bisect(options: argparse.Namespace, terminal: Terminal) -> int:
    import json

    from torchferry.pipeline.bisect import bisect
    from torchferry.pipeline.deploy import load_model_and_data
    from torchferry.pipeline.emulation import emulate
    from torchferry.pipeline.steps import Steps

    is_emulated = options.target == _EMULATED
    if is_emulated:
        options.target, options.precision = None, None
    config = _config(options)
    steps = Steps(terminal)
    loaded = load_model_and_data(config, steps)
    engine: Any = emulate if is_emulated else config.engines()[0]
    found = bisect(loaded.source, engine, loaded.calls, steps=steps)
    terminal.result(str(found), {**json.loads(found.to_json()), "steps": steps.done})
    return 0 if found.passed else 1


def _is_onnx(options: argparse.Namespace) -> bool:
    return options.config is not None and Path(options.config).suffix.lower() == ".onnx"


def _config(options: argparse.Namespace) -> DeployConfig:
    return read_config(options, "out")


def _arrays(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Read the inputs of an ONNX file."""
    from torchferry.graph import as_exported
    from torchferry.pipeline.inputs import read_inputs

    if not options.input:
        raise ConfigError("an ONNX file needs data to run on", hint="give --input name=file.npz or name=1,1,3")
    return read_inputs(options.input, as_exported(options.config).signature.input_names, {}).calls()
