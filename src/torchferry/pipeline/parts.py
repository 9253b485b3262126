"""From an exported model and a ``partition_config`` to the files of its parts, each verified on an engine.

Both forms of ``torchferry export`` call ``export_parts``: the one that takes a ``deploy.toml``, and any that takes
another project's configs and turns what these say of partitions into a ``PartitionSection``.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.core.errors import ConfigError
from torchferry.core.files import new_files
from torchferry.core.report import Finding
from torchferry.core.sections import read_section
from torchferry.partitioning import find_policy, plan_partition, split
from torchferry.pipeline.chain import compile_parts
from torchferry.pipeline.config import PartSection

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchferry.core.compare import Criterion
    from torchferry.core.report import Report
    from torchferry.core.target import Target
    from torchferry.exporter import Source
    from torchferry.graph import Exported
    from torchferry.partitioning import PartitionPlan
    from torchferry.pipeline.config import PartitionSection
    from torchferry.pipeline.steps import Steps


def export_parts(
    exported: Exported,
    partition_config: PartitionSection,
    beside: Path,
    data: Any,
    target: Target,
    steps: Steps,
    *,
    source: Source | None = None,
    tolerance: Criterion | None = None,
    codebase: str | None = None,
    cfg: Any = None,
) -> Report:
    """Cut a model into parts, verify each on the target, and write them into the folder of the whole's file.

    Args:
        exported: The whole, exported with ``apply_marks`` where the config's selectors are marks.
        partition_config: What is asked for.
        beside: The whole's file, which is not written here; no part may have its name.
        data: Inputs of the whole, as ``verify_parts`` takes them.
        target: The engine on which the parts are verified.
        steps: Where to record time and memory, and whom to tell.
        source: The module, to compare the tensors at the cuts with PyTorch as well.
        tolerance: What is asked of every part; the precision's own by default.
        codebase: Where to look for a policy; everywhere if None.
        cfg: What rewriters saw as ``ctx.cfg`` in the export.

    Returns:
        The report of ``verify_parts``. Where it did not pass, nothing was written.

    Raises:
        ConfigError: If the config cannot be used on this model.
        BackendError: If an engine refuses a part.
        OutputError: If the files cannot be written; then none is.
    """
    with steps.step("partition") as step:
        plan, parts, unmet = _cut(exported, partition_config, codebase)
        clash = next((part.name for part in plan.parts if part.save_file == beside.name), None)
        if clash is not None:
            raise ConfigError(f"part '{clash}' has the whole's save_file, '{beside.name}'", hint="give it another")
        step.detail = "; ".join(map(str, plan.parts))
    report = verify_plan(plan, data, target, steps, source=source, tolerance=tolerance, cfg=cfg)
    report = report.with_findings(unmet)
    if report.passed:
        with new_files(beside.parent) as partial:
            for part, graph in zip(plan.parts, parts, strict=True):
                graph.save(partial / part.save_file)
    return report


def verify_plan(
    plan: PartitionPlan,
    data: Any,
    target: Target,
    steps: Steps,
    *,
    source: Source | None = None,
    tolerance: Criterion | None = None,
    cfg: Any = None,
) -> Report:
    """Compile every part for one target, somewhere that vanishes again, and verify it there.

    Args:
        plan: The cut.
        data: As for ``verify_parts``.
        target: The engine.
        steps: Where to record time and memory.
        source: As for ``export_parts``.
        tolerance: As for ``verify_parts``.
        cfg: As for ``export_parts``.
    """
    from torchferry.pipeline.export import reference, rewriter_context
    from torchferry.verification import verify_parts

    with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
        with steps.step(f"compile parts for {target}"):
            engines = compile_parts(plan, target, Path(scratch) / "parts")
        with steps.step("verify parts") as step:
            if source is None:
                report = verify_parts(engines, plan, data, tolerance=tolerance)
            else:
                context = functools.partial(rewriter_context, source, target, cfg)
                with reference(plan.whole, source, context) as against:
                    report = verify_parts(engines, plan, data, source=against, tolerance=tolerance)
            worst = max((comparison.max_abs for comparison in report.comparisons), default=0.0)
            step.detail = f"{len(plan.parts)} parts, max abs difference {worst:.3g}"
    return report


def _cut(
    exported: Exported, config: PartitionSection, codebase: str | None
) -> tuple[PartitionPlan, Sequence[Exported], list[Finding]]:
    """Return plan and graphs of the parts that a config asks for, and where their axes are not what it says."""
    asked: Sequence[PartSection] = config.partition_cfg
    if not asked:
        assert config.type is not None  # the config has checked that one of the two is there
        asked = [read_section(PartSection, part, config.type) for part in find_policy(config.type, codebase)]
    tables: list[Any] = [section.model_dump(exclude={"dynamic_axes"}, exclude_none=True) for section in asked]
    plan = plan_partition(exported, [*tables, "rest"] if config.rest else tables)
    parts = split(plan)
    pairs = zip(asked, plan.parts, parts, strict=False)
    return plan, parts, [finding for section, part, graph in pairs for finding in _unmet(section, part.name, graph)]


def _unmet(section: PartSection, name: str, graph: Exported) -> Iterator[Finding]:
    """Say which axes should be dynamic and are not: those of a part follow from the whole's."""
    specs = {spec.name: spec for spec in (*graph.signature.inputs, *graph.signature.outputs)}
    for tensor, axes in section.dynamic_axes.items():
        spec = specs.get(tensor)
        for axis in axes:
            if spec is None:
                why = f"it has no tensor '{tensor}', only {', '.join(specs)}"
            elif spec.shape is None or (axis < len(spec.shape) and not isinstance(spec.shape[axis], int)):
                continue
            else:
                why = f"its axis {axis} is fixed in {spec}"
            yield Finding(
                "axis-not-dynamic",
                "warning",
                f"part '{name}' cannot have the dynamic_axes of '{tensor}': {why}",
                hint="a part is as dynamic as the whole: declare the axis of the whole's input in export.dynamic",
            )
