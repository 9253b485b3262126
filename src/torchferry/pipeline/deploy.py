"""The verb ``deploy``: all verbs in order, from a module to a proven package."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry import backends
from torchferry.core.compare import TOLERANCES, Budget, Criterion, Tolerance
from torchferry.core.errors import ConfigError, OutputError, TorchferryError, VerificationError
from torchferry.core.files import check_free, output_errors
from torchferry.core.report import Finding, Report
from torchferry.core.target import Target
from torchferry.package import MANIFEST_FILE, Package, Postprocess, Preprocess, pack
from torchferry.pipeline.config import HEADROOM_BITS
from torchferry.pipeline.half import Half, halved
from torchferry.pipeline.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from torchferry.core.engine import Engine
    from torchferry.exporter import Source
    from torchferry.graph import Exported
    from torchferry.package.pictures import Channels
    from torchferry.pipeline.config import DeployConfig
    from torchferry.pipeline.loading import Loaded


def deploy(
    source: Source,
    targets: Sequence[Target] = (Target(),),
    out: str | PathLike[str] = "out",
    *,
    data: Any = None,
    tolerance: Tolerance | None = None,
    budget: Budget | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    preprocess: Mapping[str, Preprocess] | None = None,
    postprocess: Mapping[str, Postprocess] | None = None,
    name: str | None = None,
    overwrite: bool = False,
    steps: Steps | None = None,
    cfg: Any = None,
    headroom_bits: int = HEADROOM_BITS,
) -> Package:
    """Export, compile, verify and pack a model; for targets of precision fp16 also repair what would overflow.

    Args:
        source: The module with its example, names and dynamic dimensions.
        targets: One or more engines; the first that a machine has is the one that the package opens there.
        out: The package's folder; it is whole or absent at the end.
        data: Inputs to verify on, one tuple or dict of tensors or an iterable of them; the source's example if None.
        tolerance: What is asked of every engine; its precision's own by default.
        budget: The error that every output may have, in place of a tolerance.
        sizes: Sizes of dynamic dimensions to verify at; chosen from their ranges by default.
        preprocess: How a picture becomes each input.
        postprocess: How each output becomes a picture; where inputs are pictures and this is not said, outputs shaped
            like pictures are taken for pictures in 0..1.
        name: The package's name; the module's class by default.
        overwrite: Replace the folder if it exists.
        steps: Where to record time and memory, and whom to tell.
        cfg: What rewriters see as ``ctx.cfg``.
        headroom_bits: Powers of two that inputs may be larger than ``data`` before FP16 overflows.

    Returns:
        The package, loaded.

    Raises:
        ConfigError: If both a tolerance and a budget are given.
        VerificationError: If an engine does not give what PyTorch gives. Nothing is packed; the report lies beside the
            folder, as ``OUT.report.html``.
        TorchferryError: As ``export``, ``compile``, ``verify`` and ``pack``.
    """
    if tolerance is not None and budget is not None:
        raise ConfigError("a tolerance and a budget both say which error is allowed", hint="give one of them")
    return _walk(
        source,
        targets,
        Path(out),
        data=data,
        tolerance=lambda _: tolerance or budget,
        sizes=sizes,
        preprocess=preprocess,
        postprocess=postprocess,
        name=name,
        overwrite=overwrite,
        steps=steps or Steps(),
        cfg=cfg,
        headroom_bits=headroom_bits,
    )[0]


def _walk(
    source: Source,
    targets: Sequence[Target],
    out: Path,
    *,
    data: Any,
    tolerance: Callable[[Target], Criterion | None],
    sizes: Mapping[str, Sequence[int]] | None,
    preprocess: Mapping[str, Preprocess] | None,
    postprocess: Mapping[str, Postprocess] | None,
    name: str | None,
    overwrite: bool,
    steps: Steps,
    cfg: Any,
    headroom_bits: int,
    findings: Sequence[Finding] = (),
) -> tuple[Package, Report]:
    from torchferry.pipeline.export import export, reference, rewriter_context

    check_free(out, overwrite=overwrite, marker=MANIFEST_FILE)
    check_targets(targets)
    exports: dict[str, Exported] = {}
    for target in targets:  # rewriters go by the engine, so every engine has a graph of its own
        if target.backend in exports:
            continue
        with steps.step("export" if not exports else f"export for {target.backend}") as step:
            exports[target.backend] = exported = export(source, target=target, cfg=cfg)
            step.detail = str(exported)
        if not exported.report.passed:
            raise _refusal(exported.report, out)
    exported = exports[targets[0].backend]
    halves: dict[str, Half] = {}

    with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
        engines: list[Engine] = []
        reports: list[Report] = []
        for target in targets:
            graph = exports[target.backend]
            if target.precision == "fp16":
                halves[str(target)] = half = halved(graph, source, data, headroom_bits, steps)
                graph = half.exported
            with steps.step(f"compile for {target}") as step:
                engine = backends.compile(graph, target, Path(scratch) / str(target))
                size = sum((engine.folder / file).stat().st_size for file in engine.files)
                step.detail = f"{size / 2**20:.2f} MiB"
            engines.append(engine)
            context = functools.partial(rewriter_context, source, target, cfg)
            with reference(exports[target.backend], source, context) as against:
                reports.append(verify_at(steps, engine, against, data, tolerance(target), sizes))
        report = _whole_report(exported, reports, steps).with_findings(findings)
        adapted = {str(engine.target): ", ".join(engine.adaptations) for engine in engines if engine.adaptations}
        report = report.with_facts("adaptations", adapted) if adapted else report
        for halved_for, half in halves.items():
            report = half.added_to(report, halved_for)
        if not report.passed:
            raise _refusal(report, out)
        with steps.step("pack") as step:
            package = pack(
                engines,
                out,
                report=report,
                exported=exported,
                preprocess=preprocess,
                postprocess=_picture_outputs(exported) if preprocess and postprocess is None else postprocess,
                name=name or type(source.model).__name__,
                rewrites=exported.rewrites,
                versions=_versions(),
                certificates={halved_for: half.certificate.to_json() for halved_for, half in halves.items()},
                overwrite=overwrite,
            )
            step.detail = str(out)
    return package, report


def check_targets(targets: Sequence[Target]) -> None:
    """Check, before any work, that a package can be made for these targets.

    Raises:
        ConfigError: If there are none, two are alike, or they ask for different opsets.
        BackendError: As ``backends.check_target``.
    """
    if not targets:
        raise ConfigError("there is no target to deploy to")
    for target in targets:
        backends.check_target(target)
    names = [str(target) for target in targets]
    if len(set(names)) < len(names):
        raise ConfigError(f"two targets are alike: {', '.join(names)}")
    if len({target.opset for target in targets}) > 1:
        raise ConfigError("all targets are compiled from one graph, so they must ask for the same opset")


def verify_at(
    steps: Steps,
    engine: Engine,
    source: Source,
    data: Any,
    tolerance: Criterion | None,
    sizes: Mapping[str, Sequence[int]] | None,
) -> Report:
    """Verify as one step, at every combination of the sizes given, or at sizes chosen from the ranges.

    An engine that only compiles here gives a report with nothing compared and the warning ``engine-not-run``.
    """
    from torchferry.verification import verify

    available = backends.get(engine.target.backend).availability()
    if available.ok and not available.can_run:
        return _not_run(engine, source, available.reason)
    chosen = None if sizes is None else [dict(zip(sizes, values, strict=True)) for values in product(*sizes.values())]
    with steps.step(f"verify {engine.target}") as step:
        report = verify(engine, source, data, tolerance=tolerance, sizes=chosen)
        worst = max((c.max_abs for c in report.comparisons), default=0.0)
        cases = len({c.case for c in report.comparisons})
        step.detail = f"{cases} cases, max abs difference {worst:.3g}"
    return report


def _not_run(engine: Engine, source: Source, reason: str) -> Report:
    finding = Finding(
        "engine-not-run",
        "warning",
        f"{engine.target} was compiled and not run: {reason}",
        where=str(engine.target),
        hint="run `torchferry verify` on the package where the engine runs",
    )
    return Report(f"verification of {type(source.model).__name__} on {engine.target}", (finding,))


def join_reports(reports: Sequence[Report]) -> Report:
    """Join the verifications of several engines into one; every comparison and finding says which it is about."""
    return functools.reduce(Report.joined, reports if len(reports) == 1 else [_labelled(report) for report in reports])


def _whole_report(exported: Exported, reports: list[Report], steps: Steps) -> Report:
    """Join what export and every verification found into the page that the package carries."""
    joined = join_reports(reports).joined(exported.report)
    timed = {step.name: str(step) for step in steps.done}
    return joined.with_facts("graph", {"graph": str(exported), **exported.statistics()}).with_facts("steps", timed)


def _picture_outputs(exported: Exported) -> dict[str, Postprocess]:
    """Take float outputs with four axes, the second of 1 or 3 channels, for pictures."""
    modes: dict[Any, Channels] = {1: "L", 3: "RGB"}
    return {
        spec.name: Postprocess(channels=modes[spec.shape[1]])
        for spec in exported.signature.outputs
        if spec.shape is not None and len(spec.shape) == 4 and spec.shape[1] in modes and spec.dtype == "float32"
    }


def _labelled(report: Report) -> Report:
    target = report.title.rpartition(" on ")[2]
    return dataclasses.replace(
        report,
        comparisons=tuple(dataclasses.replace(c, name=f"{c.name} on {target}") for c in report.comparisons),
        findings=tuple(dataclasses.replace(f, where=f"{f.where}, on {target}") for f in report.findings),
    )


def _refusal(report: Report, out: Path) -> TorchferryError:
    """Write the report beside where the package would have been, and word its errors."""
    out = out.absolute()
    page = out.with_name(f"{out.name}.report.html")
    hint = f"nothing was packed; read '{page}'"
    try:
        with output_errors(page):
            page.parent.mkdir(parents=True, exist_ok=True)
        report.save(page)
    except OutputError as exc:  # must not hide what is wrong with the model
        hint = f"nothing was packed, and the report could not be written: {exc.message}"
    errors = [f for f in report.findings if f.severity == "error"]
    return VerificationError(
        f"the model did not arrive intact: {errors[0].message}"
        + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""),
        where=errors[0].where,
        hint=hint,
    )


def _versions() -> dict[str, str]:
    import onnx
    import onnx_ir
    import torch

    import torchferry

    return {
        "torchferry": torchferry.__version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnx_ir": onnx_ir.__version__,
    }


def load_model_and_data(config: DeployConfig, steps: Steps) -> Loaded:
    """Build the model and read its weights and data, as two steps.

    Raises:
        TorchferryError: As ``load_source``.
    """
    with steps.step("import torch"):
        from torchferry.pipeline.loading import load_source
    with steps.step("load model and data") as step:
        loaded = load_source(config)
        step.detail = "; ".join(loaded.notes)
        step.notable = bool(loaded.notes)
    return loaded


def deploy_config(
    config: DeployConfig, *, overwrite: bool = False, steps: Steps | None = None
) -> tuple[Package, Report]:
    """Deploy what a config describes; return the package and the report that lies in it.

    Args:
        config: The config.
        overwrite: Replace the package's folder if it exists.
        steps: Where to record time and memory, and whom to tell.

    Raises:
        TorchferryError: As ``deploy``, and for a model, checkpoint or input that cannot be read.
    """
    steps = steps or Steps()
    targets = config.engines()
    check_free(config.out, overwrite=overwrite, marker=MANIFEST_FILE)
    check_targets(targets)
    loaded = load_model_and_data(config, steps)
    return _walk(
        loaded.source,
        targets,
        config.out,
        data=loaded.calls,
        tolerance=functools.partial(tolerance_of, config),
        sizes=config.verify.sizes,
        preprocess=loaded.preprocess,
        postprocess=config.postprocess or None,
        name=config.name or config.model.factory.rpartition(":")[2],
        overwrite=overwrite,
        steps=steps,
        cfg=config,
        headroom_bits=config.fp16.headroom_bits,
        findings=config.findings(),
    )


def tolerance_of(config: DeployConfig, target: Target) -> Criterion | None:
    """Return what a config asks of a target's outputs; None where it leaves that to the precision."""
    if config.budget is not None:
        return Budget(**config.budget.model_dump())
    if config.verify.atol is None and config.verify.rtol is None:
        return None
    default = TOLERANCES[target.precision]
    return Tolerance(
        default.atol if config.verify.atol is None else config.verify.atol,
        default.rtol if config.verify.rtol is None else config.verify.rtol,
    )
