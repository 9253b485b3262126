"""``torchferry verify``: every engine of a package against the PyTorch model that it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.cli.model_flags import add_budget_flag, add_model_flags, read_config
from torchferry.cli.outputs import check_output_file
from torchferry.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal
    from torchferry.core.engine import Engine


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "verify",
        help="compare a package with its PyTorch model",
        description="Compare every engine of a package, or those of --target, with the PyTorch model.",
    )
    parser.add_argument("package", metavar="PACKAGE")
    add_model_flags(parser)
    add_budget_flag(parser)
    parser.add_argument("--report", metavar="FILE", help="write the report as .html, .json or text")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command."""
    from torchferry.package import load
    from torchferry.pipeline.deploy import load_model_and_data, tolerance_of
    from torchferry.pipeline.steps import Steps
    from torchferry.pipeline.walk import join_reports, verify_at

    package = load(options.package)
    engines = _chosen(package.engines, options.target)
    page = check_output_file(options.report) if options.report else None
    config = read_config(options, options.package)
    if not config.export.input_names:
        named = config.export.model_copy(update={"input_names": package.signature.input_names})
        config = config.model_copy(update={"export": named})
    steps = Steps(terminal)
    loaded = load_model_and_data(config, steps)
    reports = [
        verify_at(steps, engine, loaded.source, loaded.calls, tolerance_of(config, engine.target), config.verify.sizes)
        for engine in engines
    ]
    report = join_reports(reports)
    if page is not None:
        report.save(page)
    terminal.result(report.to_text(), {"steps": steps.done, "report": report.to_dict()})
    return 0 if report.passed and report.comparisons else 1


def _chosen(engines: tuple[Engine, ...], backend: str | None) -> tuple[Engine, ...]:
    chosen = tuple(engine for engine in engines if backend in (None, engine.target.backend))
    if not chosen:
        known = [engine.target.backend for engine in engines]
        raise ConfigError(f"the package has no engine '{backend}'", hint=did_you_mean(str(backend), known))
    return chosen
