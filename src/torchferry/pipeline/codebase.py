"""The verb ``export`` for codebases: from a deploy config and a model config to the graph, its parts and a report."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry import backends
from torchferry.codebases.openmmlab.deploy_config import read_python, validate_deploy_config
from torchferry.core.compare import TOLERANCES
from torchferry.core.engine import platform_versions
from torchferry.core.errors import ConfigError, InputError, MissingBackendError, OutputError, UnsupportedError
from torchferry.core.files import new_files, output_errors
from torchferry.core.report import Finding, Report
from torchferry.core.sections import read_section
from torchferry.core.target import Precision, Target
from torchferry.partitioning import find_policy, plan_partition, split
from torchferry.pipeline.chain import Chain, compile_parts
from torchferry.pipeline.config import PartitionSection, read_toml
from torchferry.pipeline.export import export
from torchferry.pipeline.parts import export_parts
from torchferry.pipeline.steps import Steps
from torchferry.pipeline.walk import verify_at

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchferry.codebases.openmmlab.deploy_config import CodebaseDeployConfig
    from torchferry.codebases.openmmlab.source import Prepared
    from torchferry.core.engine import Array, Engine
    from torchferry.exporter import Source
    from torchferry.graph import Exported

REPORTS = ("report.html", "report.json")
_MIB = 1 << 20
_SELECTION = "multiclass_nms"  # the mark behind which rows are in an order of their own
_STRIDE = 32  # sizes that the usual detectors take are multiples of it


def read_deploy_config(path: str | Path) -> CodebaseDeployConfig:
    """Read a deploy config with MMDeploy's keys: Python, which is run, or TOML.

    Raises:
        MissingFileError: If there is no such file.
        ConfigError: If it cannot be read, or a key is unknown or has a wrong value.
    """
    file = Path(path)
    values = read_toml(file) if file.suffix == ".toml" else read_python(file)
    return validate_deploy_config(values, str(file))


def export_codebase(
    deploy_config: str | Path,
    model_config: str,
    checkpoint: str,
    picture: str | Path,
    work_dir: str | Path,
    *,
    device: str = "cpu",
    unsafe_checkpoint: bool = False,
    steps: Steps | None = None,
) -> Report:
    """Export a codebase's model as its deploy config says, verify it, and write graph, parts and report.

    Args:
        deploy_config: Its path; see ``read_deploy_config``.
        model_config: The model's config: a path, or a name that its library knows.
        checkpoint: A path, an https address, ``none`` or ``none:COUNT``; see ``prepare``.
        picture: A picture, the example.
        work_dir: Where ``onnx_config.save_file``, the parts, ``report.html`` and ``report.json`` go; files of these
            names are replaced.
        device: Where it is verified.
        unsafe_checkpoint: Let a pickled checkpoint run its code.
        steps: Where to record time and memory, and whom to tell.

    Returns:
        What was found. Where it did not pass, the reports alone are written.

    Raises:
        TorchferryError: As ``prepare``, ``export``, ``compile`` and ``export_parts``.
    """
    steps = steps or Steps()
    out = Path(work_dir)
    _check_folder(out)
    with steps.step("read deploy config"):
        deploy = read_deploy_config(deploy_config)
        section = None
        if deploy.partition_config is not None:
            section = read_section(PartitionSection, deploy.partition_config, f"{deploy_config}: partition_config")
        save_file = deploy.onnx_config.save_file
        if Path(save_file).name != save_file:
            raise ConfigError(f"onnx_config.save_file must be the name of a file, got '{save_file}'")
    target, unavailable = _verifying_target(
        dataclasses.replace(deploy.target, device=device, precision=deploy.verified_in)
    )
    prepared = _prepared(deploy, model_config, checkpoint, picture, unsafe_checkpoint, steps)
    cfg = deploy.model_dump()
    marks = section is not None and section.apply_marks
    with steps.step("export") as step:
        exported = export(
            prepared.source, target=deploy.target, apply_marks=marks, cfg=cfg, tolerance=prepared.tolerance
        )
        step.detail = str(exported)
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with new_files(out) as partial:
        reports = [exported.report.with_findings((*prepared.findings, *unavailable))]
        if exported.report.passed:
            reports.insert(0, _verified(exported, prepared, target, steps))
        if section is not None and all(report.passed for report in reports):
            library = prepared.config.library
            asked = _parts_asked(section, library)
            if _SELECTION in str(asked):
                parts = _selected_parts(exported, asked, partial, prepared.source, target, steps)
            else:
                parts = export_parts(
                    exported,
                    section,
                    partial / save_file,
                    prepared.source.args,
                    target,
                    steps,
                    source=prepared.at_cuts(),
                    codebase=library,
                    cfg=cfg,
                )
            reports.insert(1, parts)
        report = functools.reduce(Report.joined, reports)
        report = dataclasses.replace(report, title=f"{prepared.config.name} on {target}")
        report = report.with_facts("graph", {"graph": str(exported), **exported.statistics()})
        report = report.with_facts("steps", {step.name: str(step) for step in steps.done})
        if report.passed:
            exported.save(partial / save_file)
        for name in REPORTS:
            report.save(partial / name)
    return report


def _prepared(
    deploy: CodebaseDeployConfig, model_config: str, checkpoint: str, picture: str | Path, unsafe: bool, steps: Steps
) -> Prepared:
    with steps.step("import torch"):
        from torchferry.codebases.openmmlab.source import prepare
    name = "load model, weights and picture"

    def progress(done: int, total: int | None) -> None:
        if steps.watcher is not None:
            of = f" of {total // _MIB}" if total else ""
            steps.watcher.started(f"fetch checkpoint: {done // _MIB}{of} MiB")

    with steps.step(name) as step:
        prepared = prepare(deploy, model_config, checkpoint, picture, unsafe_checkpoint=unsafe, progress=progress)
        step.detail = prepared.config.name
    return prepared


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"'{out}' is a file, not a folder", hint="choose another --work-dir")


def _verifying_target(target: Target) -> tuple[Target, list[Finding]]:
    """Return the target if its engine is here, else the default one and a warning that says so.

    Raises:
        UnsupportedError: If its engine cannot do what it asks, or it is int8.
    """
    if target.precision == "int8":
        raise UnsupportedError(
            "models of a codebase are not quantised while they are exported",
            hint="export for fp32, then give the graph and data to `torchferry compile --precision int8 --input …`",
        )
    try:
        backends.check_target(target)
        available = backends.get(target.backend).availability()
        reason = "" if available.can_run else available.reason
    except MissingBackendError as exc:
        reason = exc.message
    if not reason:
        return target, []
    other = Target(opset=target.opset)
    finding = Finding(
        "verified-elsewhere",
        "warning",
        f"the graph was verified on {other}, not on {target}: {reason}",
        hint="verify it again where that engine is",
    )
    return other, [finding]


def _verified(exported: Exported, prepared: Prepared, target: Target, steps: Steps) -> Report:
    """Compare the whole with what the library itself gives, on the picture and at other sizes."""
    from torchferry.codebases.openmmlab.detectors import Detector

    source = prepared.source
    with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
        with steps.step(f"compile for {target}"):
            engine = backends.compile(exported, target, Path(scratch) / "engine")
        if not isinstance(source.model, Detector):
            return verify_at(steps, engine, source, None, None, None)
        with steps.step(f"verify {target}") as step:
            with engine.open() as session:
                report = _verified_detections(session.run, engine, source)
            step.detail = "; ".join(f"{case}: {words}" for case, words in report.facts["detections"].items())
    return report


def _parts_asked(section: PartitionSection, library: str) -> list[dict[str, Any]]:
    """Return the parts of a config, or of the cut that it names."""
    if section.partition_cfg:
        return [each.model_dump(exclude={"dynamic_axes"}, exclude_none=True) for each in section.partition_cfg]
    assert section.type is not None  # the config has checked that one of the two is there
    return [dict(part) for part in find_policy(section.type, library)]


def _selected_parts(
    exported: Exported,
    asked: list[dict[str, Any]],
    folder: Path,
    source: Source,
    target: Target,
    steps: Steps,
) -> Report:
    """Write parts that are cut where candidates are selected, once a chain of all parts detects what PyTorch does.

    The order of candidates with nearly equal scores is the engine's, so the tensors at the cut cannot be compared.
    """
    with steps.step("partition") as step:
        plan = plan_partition(exported, [*asked, "rest"])
        step.detail = "; ".join(map(str, plan.parts))
    with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch, steps.step("verify parts"):
        engines = compile_parts(plan, target, Path(scratch) / "parts")
        with Chain(plan, engines) as chain:
            report = _verified_detections(chain.run, engines[plan.parts[0].name], source, "all parts, ")
    if report.passed:
        for part, graph in zip(plan.parts[: len(asked)], split(plan), strict=False):
            graph.save(folder / part.save_file)
    return report


def _verified_detections(
    run: Callable[[dict[str, Array]], dict[str, Array]],
    engine: Engine,
    source: Source,
    label: str = "",
) -> Report:
    """Match what an engine, or a chain of them, detects with the library's own detections, as sets."""
    from torchferry.codebases.openmmlab.detections import Detections, match_detections
    from torchferry.exporter.inputs import to_numpy
    from torchferry.verification.sizes import resized, run_torch

    example = source.names.tensors(source.call)
    own = engine.signature.sizes_of({name: to_numpy(tensor) for name, tensor in example.items()})
    findings: list[Finding] = []
    matched: dict[str, str] = {}
    for sizes in _sizes(own, engine):
        tensors = resized(example, engine.signature, {**own, **sizes}) if sizes else example
        expected = zip(*map(to_numpy, run_torch(source, tensors)), strict=True)
        given = run({name: to_numpy(each) for name, each in tensors.items()})
        actual = zip(*(given[name] for name in source.output_names), strict=True)
        case = label + (", ".join(f"{dim}={size}" for dim, size in sizes.items()) or "data")
        for number, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
            where = f"{case}, picture {number}" if number or sizes.get("batch", 1) > 1 else case
            matching = match_detections(
                Detections.of_rows(*ours),
                Detections.of_rows(*theirs),
                where=where,
                **_limits(source.model, engine.target.precision),
            )
            findings += matching.findings
            matched[where] = str(matching)
    report = Report(f"verification of {type(source.model).__name__} on {engine.target}", tuple(findings))
    return report.with_facts("detections", matched).with_facts(
        "environment", {**platform_versions(), **engine.versions}
    )


def _limits(detector: Any, precision: Precision) -> dict[str, Any]:
    """Return how near two detections must be to be the same, and what may leave one without a partner."""
    from torchferry.codebases.openmmlab.detectors import last_head

    own = last_head(detector.model).test_cfg or {}
    nms = own.get("nms") or {}
    # A second stage looks at the boxes of the first, so small differences of these grow.
    grows = hasattr(detector.model, "roi_head")
    exact = precision == "fp32" and not grows
    score_atol = TOLERANCES[precision].atol * (10 if grows else 1)
    limits = {"score_thr": own.get("score_thr"), "max_per_img": detector.rows, "nms_iou": nms.get("iou_threshold")}
    return {"iou": 0.99 if exact else 0.9, "score_atol": score_atol, **limits}


def _sizes(own: Mapping[str, int], engine: Engine) -> list[dict[str, int]]:
    """Return sizes of the dynamic dimensions to run: the example's, those of the config, and a few others."""
    other = {
        dim: size + 1 if size < _STRIDE else max(size * 3 // 4 // _STRIDE, 1) * _STRIDE for dim, size in own.items()
    }
    wanted = [{}, *engine.signature.profile(), *({dim: size} for dim, size in other.items()), other]
    chosen: list[dict[str, int]] = []
    for sizes in wanted:
        try:
            engine.signature.check_sizes({**own, **sizes})
        except InputError:  # not one of those that the graph takes
            continue
        if sizes not in chosen:
            chosen.append(sizes)
    return chosen
