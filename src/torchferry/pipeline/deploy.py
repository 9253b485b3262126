"""The verb ``deploy``: all verbs in order, from a module to a proven package."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry import backends
from torchferry.core.compare import TOLERANCES, Budget, Criterion, Tolerance, usual_tolerance
from torchferry.core.errors import ConfigError, OutputError, TorchferryError, VerificationError
from torchferry.core.files import check_free, output_errors
from torchferry.core.target import AUTO, DEFAULT_BACKEND, Target
from torchferry.package import MANIFEST_FILE, Package, Postprocess, Preprocess, pack
from torchferry.pipeline.auto import Choice, check_choice, choose
from torchferry.pipeline.config import HEADROOM_BITS
from torchferry.pipeline.steps import Steps
from torchferry.pipeline.walk import Walk, join_reports

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from torchferry.core.report import Finding, Report
    from torchferry.exporter import Source
    from torchferry.graph import Exported
    from torchferry.package.pictures import Channels
    from torchferry.pipeline.auto import Tried
    from torchferry.pipeline.config import DeployConfig
    from torchferry.pipeline.loading import Loaded


@dataclass(frozen=True)
class Deployed:
    """What came of a deployment.

    Attributes:
        package: The package, loaded.
        report: The report that lies in it.
        tried: What was tried, where the target was ``auto``.
    """

    package: Package
    report: Report
    tried: tuple[Tried, ...] = ()


def deploy(
    source: Source,
    targets: str | Target | Sequence[Target] = DEFAULT_BACKEND,
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
    """Export, compile, verify and pack a model.

    For targets of precision fp16 also repair what would overflow, for those of int8 quantise.

    Args:
        source: The module with its example, names and dynamic dimensions.
        targets: One or more engines, or the name of one; the first that a machine has is the one that the package opens
            there. ``"auto"`` tries every engine and precision that runs here and packs the fastest that is within
            ``budget``, or within what fp32 is held to.
        out: The package's folder; it is whole or absent at the end.
        data: Inputs to verify on, one tuple or dict of tensors or an iterable of them; the source's example if None.
            For int8 also to quantise on; of several calls the last quarter is kept back then, for verification alone.
        tolerance: What is asked of every engine; its precision's own by default, which int8 does not have.
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
        ConfigError: If both a tolerance and a budget are given, neither and a target is int8, or the targets do not go
            together.
        VerificationError: If an engine does not give what PyTorch gives. Nothing is packed; the report lies beside the
            folder, as ``OUT.report.html``.
        TorchferryError: As ``export``, ``compile``, ``verify`` and ``pack``.
    """
    if tolerance is not None and budget is not None:
        raise ConfigError("a tolerance and a budget both say which error is allowed", hint="give one of them")
    if isinstance(targets, str):
        targets = Target(targets)
    walk = Walk(source, data, lambda _: tolerance or budget, sizes, cfg, headroom_bits, steps or Steps())
    return _deploy(
        walk,
        [targets] if isinstance(targets, Target) else targets,
        Path(out),
        preprocess=preprocess,
        postprocess=postprocess,
        name=name or type(source.model).__name__,
        overwrite=overwrite,
    ).package


def _deploy(
    walk: Walk,
    targets: Sequence[Target],
    out: Path,
    *,
    preprocess: Mapping[str, Preprocess] | None,
    postprocess: Mapping[str, Postprocess] | None,
    name: str,
    overwrite: bool,
    findings: Sequence[Finding] = (),
) -> Deployed:
    check_free(out, overwrite=overwrite, marker=MANIFEST_FILE)
    check_targets(targets, walk.criterion)
    with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
        if targets[0].backend == AUTO:
            choice = choose(walk, targets[0], Path(scratch))
        else:
            choice = _all_of(walk, targets, Path(scratch), out)
        if not choice.arrivals:
            raise _refusal(choice.report, out)
        report = _whole_report(choice, walk.steps).with_findings(findings)
        if not report.passed:
            raise _refusal(report, out)
        exported = choice.arrivals[0].exported
        certificates = {str(arrival.target): arrival.prepared.certificate for arrival in choice.arrivals}
        with walk.steps.step("pack") as step:
            package = pack(
                [arrival.engine for arrival in choice.arrivals],
                out,
                report=report,
                exported=exported,
                preprocess=preprocess,
                postprocess=_picture_outputs(exported) if preprocess and postprocess is None else postprocess,
                name=name,
                rewrites=exported.rewrites,
                versions=_versions(),
                certificates={target: text for target, text in certificates.items() if text is not None},
                overwrite=overwrite,
            )
            step.detail = str(out)
    return Deployed(package, report, choice.tried)


def _all_of(walk: Walk, targets: Sequence[Target], scratch: Path, out: Path) -> Choice:
    """Go to every target, all that can be exported first."""
    for target in targets:
        exported = walk.export(target)
        if not exported.report.passed:
            raise _refusal(exported.report, out)
    arrivals = tuple(walk.reach(target, scratch) for target in targets)
    return Choice(arrivals, join_reports([arrival.report for arrival in arrivals]))


def check_targets(targets: Sequence[Target], asked: Callable[[Target], Criterion | None]) -> None:
    """Check, before any work, that a package can be made for these targets.

    Args:
        targets: Where it goes.
        asked: What the user asks of a target's outputs; None for the usual.

    Raises:
        ConfigError: If there are none, two are alike, they ask for different opsets, ``auto`` is one of several, or one
            needs to be told how much error is allowed.
        BackendError: As ``backends.check_target``.
    """
    if not targets:
        raise ConfigError("there is no target to deploy to")
    if any(target.backend == AUTO for target in targets):
        if len(targets) > 1:
            raise ConfigError(f"'{AUTO}' chooses among all engines, so it must be the only target, got {len(targets)}")
        check_choice(targets[0])
    else:
        for target in targets:
            backends.check_target(target)
    for target in targets:
        if target.precision is not None and asked(target) is None:
            usual_tolerance(target.precision)
    names = [str(target) for target in targets]
    if len(set(names)) < len(names):
        raise ConfigError(f"two targets are alike: {', '.join(names)}")
    if len({target.opset for target in targets}) > 1:
        raise ConfigError("all targets are compiled from one graph, so they must ask for the same opset")


def _whole_report(choice: Choice, steps: Steps) -> Report:
    """Join what export and every verification found into the page that the package carries."""
    exported = choice.arrivals[0].exported
    report = choice.report.joined(exported.report)
    report = report.with_facts("graph", {"graph": str(exported), **exported.statistics()})
    report = report.with_facts("steps", {step.name: str(step) for step in steps.done})
    adapted = {str(a.target): ", ".join(a.engine.adaptations) for a in choice.arrivals if a.engine.adaptations}
    report = report.with_facts("adaptations", adapted) if adapted else report
    for arrival in choice.arrivals:
        report = arrival.prepared.added_to(report, str(arrival.target))
    return report


def _picture_outputs(exported: Exported) -> dict[str, Postprocess]:
    """Take float outputs with four axes, the second of 1 or 3 channels, for pictures."""
    modes: dict[Any, Channels] = {1: "L", 3: "RGB"}
    return {
        spec.name: Postprocess(channels=modes[spec.shape[1]])
        for spec in exported.signature.outputs
        if spec.shape is not None and len(spec.shape) == 4 and spec.shape[1] in modes and spec.dtype == "float32"
    }


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


def deploy_config(config: DeployConfig, *, overwrite: bool = False, steps: Steps | None = None) -> Deployed:
    """Deploy what a config describes.

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
    tolerance = functools.partial(tolerance_of, config)
    check_targets(targets, tolerance)
    loaded = load_model_and_data(config, steps)
    walk = Walk(
        loaded.source,
        loaded.calls,
        tolerance,
        config.verify.sizes,
        config,
        config.fp16.headroom_bits,
        steps,
    )
    return _deploy(
        walk,
        targets,
        config.out,
        preprocess=loaded.preprocess,
        postprocess=config.postprocess or None,
        name=config.name or config.model.factory.rpartition(":")[2],
        overwrite=overwrite,
        findings=config.findings(),
    )


def tolerance_of(config: DeployConfig, target: Target) -> Criterion | None:
    """Return what a config asks of a target's outputs; None where it leaves that to the precision."""
    if config.budget is not None:
        return Budget(**config.budget.model_dump())
    if config.verify.atol is None and config.verify.rtol is None:
        return None
    default = TOLERANCES.get(target.precision, Tolerance(0, 0))
    return Tolerance(
        default.atol if config.verify.atol is None else config.verify.atol,
        default.rtol if config.verify.rtol is None else config.verify.rtol,
    )
