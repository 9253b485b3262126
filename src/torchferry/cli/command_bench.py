"""``torchferry bench``: engines, and PyTorch, on the same inputs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.cli.model_flags import add_weights_flags
from torchferry.cli.outputs import check_output_file
from torchferry.core.errors import ConfigError
from torchferry.core.target import DEFAULT_BACKEND, Target

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal
    from torchferry.core.engine import Array


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure packages and ONNX files on engines, side by side",
        description="Measure latency, throughput, memory and cold start, in turn, each engine in a process of its own.",
    )
    parser.add_argument("subjects", nargs="+", metavar="PACKAGE|MODEL.onnx")
    parser.add_argument(
        "--backends",
        metavar="ENGINE[:PRECISION],…",
        help=f"for an ONNX file, default: {DEFAULT_BACKEND}; for a package, default: all of its own; "
        "'all' for every one that runs any graph here",
    )
    parser.add_argument(
        "--input",
        action="append",
        metavar="DATA",
        help="picture.png, name=picture.png, name=file.npz or name=1,1,3,3; repeatable; default: random",
    )
    parser.add_argument(
        "--size",
        action="append",
        metavar="NAME=N,…",
        help="sizes of dynamic dimensions for random inputs, such as batch=1,height=224; repeatable",
    )
    model = parser.add_argument_group("PyTorch, to compare with")
    add_weights_flags(model)
    model.add_argument(
        "--torch", metavar="MODE,…", default="eager,compile", help="eager, compile or both; default: both"
    )
    how = parser.add_argument_group("measuring")
    how.add_argument("--threads", type=int, help="of each contender; default: the cores that may be used")
    how.add_argument("--rounds", type=int, default=20, help="how often each contender has its turn; default: 20")
    how.add_argument("--runs", type=int, help="runs a turn; default: as many as take a tenth of a second")
    how.add_argument("--warm-up", type=int, default=5, help="runs before the first turn; default: 5")
    how.add_argument("--profile", action="store_true", help="also measure layers, where the engine tells them")
    parser.add_argument("--report", metavar="FILE", help="write the report as .html with plots, .json or text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.pipeline.bench import TORCH_MODES, bench

    sizes = dict(pair for item in options.size or () for pair in map(_size, item.split(",")))
    modes = [mode for mode in TORCH_MODES if mode in options.torch.split(",")]
    if len(modes) != len(options.torch.split(",")):
        raise ConfigError(f"--torch '{options.torch}' must be eager, compile or eager,compile")
    targets = _targets(options.backends)
    page = check_output_file(options.report) if options.report else None
    report = bench(
        options.subjects,
        _inputs(options),
        targets=targets,
        model=_model(options),
        torch_modes=modes,
        sizes=sizes,
        threads=options.threads,
        rounds=options.rounds,
        runs=options.runs,
        warm_up=options.warm_up,
        profile=options.profile,
        watcher=terminal,
    )
    if page is not None:
        report.save(page)
    terminal.result(report.to_text(), report.to_dict())
    return 0 if report.baseline is not None else 1


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdecimal():
        raise ConfigError(f"--size '{text}' must look like batch=1")
    return name.strip(), int(size)


def _targets(text: str | None) -> list[Target]:
    from torchferry.pipeline.bench import EVERY, every_target

    if text == EVERY:
        return list(every_target())
    parts = [part.partition(":") for part in (text or "").split(",") if part]
    return [Target(name, precision or Target.precision) for name, _, precision in parts]  # type: ignore[arg-type]


def _model(options: argparse.Namespace) -> Any:
    """Return what says how the PyTorch model is built; None if none is to be measured."""
    if options.model is None:
        if options.checkpoint is not None or options.unsafe_checkpoint:
            raise ConfigError("--checkpoint belongs to a --model, of which there is none")
        return None
    from torchferry.pipeline.config import ModelSection

    return ModelSection(
        factory=options.model, checkpoint=options.checkpoint, unsafe_checkpoint=options.unsafe_checkpoint
    )


def _inputs(options: argparse.Namespace) -> dict[str, Array]:
    """Read ``--input`` under the names of the first subject, and as its package says."""
    if not options.input:
        return {}
    from torchferry.pipeline.bench import inputs_of

    return inputs_of(options.subjects[0], options.input)
