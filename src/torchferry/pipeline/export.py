"""The verb ``export``: rewrite, capture, check the rewrites, then settle what capturing cannot know."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchferry.core.compare import TOLERANCES
from torchferry.core.errors import ConfigError
from torchferry.core.report import Finding
from torchferry.core.target import Target, check_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from torchferry.core.compare import Tolerance
    from torchferry.exporter import Source
    from torchferry.graph import Exported
    from torchferry.rewrite import FunctionRewriter, ModuleRewriter, RewriteLog, RewriterContext, SymbolicRewriter


def export(
    model: Any,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: Target | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    apply_marks: bool = False,
    cfg: Any = None,
    function_rewriter: FunctionRewriter | None = None,
    module_rewriter: ModuleRewriter | None = None,
    symbolic_rewriter: SymbolicRewriter | None = None,
    tolerance: Tolerance | None = None,
) -> Exported:
    """Export a module to an ONNX graph that knows for which sizes it is right.

    The rewriters registered for the target act while the model is traced. Each that acted is run once more in eager
    mode on the example and compared with the original; the report says what became of every rewriter.

    Args:
        model: A ``torch.nn.Module``, or a ``Source`` that holds everything else as well. It is exported in eval mode,
            and left as it was.
        args: Example inputs: a tuple of positional arguments, a dict of keyword arguments, or one tensor.
        kwargs: Keyword arguments besides ``args``.
        target: What it is exported for; ONNX Runtime by default.
        dynamic_shapes: ``{input: {axis: name}}``. An input is called by its name in ``input_names``, else by
            ``forward``'s parameter. Equal names declare equal sizes. ``name=1..8`` bounds them, ``name=1..4..8`` also
            says the usual one.
        input_names: Names of the graph's inputs in order; ``forward``'s parameters where not given.
        output_names: Names of the graph's outputs in order.
        apply_marks: Keep what ``mark`` and ``mark_tensors`` name, as nodes of the graph that change nothing.
        cfg: What rewriters see as ``ctx.cfg``.
        function_rewriter: A private registry in place of ``FUNCTION_REWRITER``.
        module_rewriter: A private registry in place of ``MODULE_REWRITER``.
        symbolic_rewriter: A private registry in place of ``SYMBOLIC_REWRITER``.
        tolerance: What is asked of the graph where it is run at sizes 0 and 1; that of fp32 by default.

    Returns:
        The graph, its signature with the valid range of every dimension, and a report of what was found.

    Raises:
        ModelError: If the model fails on its own example in PyTorch.
        ExportError: If it cannot be exported; names the line of the model.
        FrozenDimensionError: If a dimension declared dynamic became constant; names the line that fixed it.
        ConfigError: If names or dimensions do not fit the example, two rewriters fit equally well, or the target names
            no engine.
    """
    from torchferry.exporter import Source, capture
    from torchferry.verification import settle

    if isinstance(model, Source):
        if args is not None or kwargs or dynamic_shapes is not None or input_names or output_names:
            raise ConfigError("a Source holds its own inputs, names and dynamic_shapes; give them there")
        source = model
    else:
        source = Source(
            model,
            () if args is None else args,
            dict(kwargs or {}),
            dynamic_shapes,
            tuple(input_names),
            tuple(output_names),
        )
    target = target or Target()
    check_named(target.backend)
    registries = {
        "function_rewriter": function_rewriter,
        "module_rewriter": module_rewriter,
        "symbolic_rewriter": symbolic_rewriter,
    }
    context = functools.partial(
        rewriter_context, source, target, cfg, **{name: own for name, own in registries.items() if own is not None}
    )
    captured = capture(source, target, context, apply_marks=apply_marks)
    exported = _with_rewrites(captured.exported, source, captured.log, context)
    with reference(exported, source, context) as against:
        return settle(exported, against, tolerance or TOLERANCES["fp32"])


def rewriter_context(source: Source, target: Target, cfg: Any = None, **options: Any) -> RewriterContext:
    """Return the context in which a model is exported for a target; not entered yet.

    Args:
        source: The model.
        target: Whose rewriters apply.
        cfg: What rewriters see as ``ctx.cfg``.
        **options: ``check`` and the registries, as for ``RewriterContext``.
    """
    import torchferry.rewrite.rules  # noqa: F401 - registers the rules of our own
    from torchferry.rewrite import RewriterContext

    return RewriterContext(cfg, ir="onnx", target=target, model=source.model, **options)


def _model(context: RewriterContext) -> torch.nn.Module:
    assert context.model is not None  # it is entered, and was given a model
    return context.model


def _with_rewrites(
    exported: Exported, source: Source, log: RewriteLog, context: Callable[..., RewriterContext]
) -> Exported:
    """Add to an exported graph what became of the rewriters, those that acted checked against the originals."""
    trouble: tuple[Finding, ...] = ()
    if any(row.kind != "symbolic" for row in log.applied()):
        checked, trouble = _checked(source, context(check=True))
        log = log.with_checks(checked)
    shown = {row.name: str(row) for row in log.rows if row.status != "declined" and not row.is_idle_rule}
    report = exported.report.with_findings((*log.findings(), *trouble))
    return exported.replace(
        report=report.with_facts("rewriters", shown) if shown else report,
        rewrites={row.name: row.calls for row in log.applied()},
        outputs_changed_by=tuple(row.name for row in log.applied() if row.changes_outputs),
    )


def _checked(source: Source, context: RewriterContext) -> tuple[RewriteLog, tuple[Finding, ...]]:
    """Run the rewritten model in eager mode on its example, every call of a rewriter beside the original."""
    from torchferry.exporter.capture import evaluation_mode
    from torchferry.verification.sizes import first_line, run_torch

    with context:
        rewritten = source.with_model(_model(context))
        try:
            with evaluation_mode(rewritten.model):
                run_torch(rewritten, rewritten.names.tensors(rewritten.call))
        except Exception as exc:  # noqa: BLE001 - whatever a rewriter raises outside an export
            finding = Finding(
                "rewrites-not-compared",
                "warning",
                f"the rewriters could not be compared with the originals: in eager mode they raise {first_line(exc)}",
                hint="make the rewriters work outside an export too, so that they can be checked",
            )
            return context.log, (finding,)
    return context.log, ()


@contextmanager
def reference(exported: Exported, source: Source, context: Callable[..., RewriterContext]) -> Iterator[Source]:
    """Give the model that the graph must agree with.

    That is the user's own, unless a rewriter that acted changes outputs on purpose; then it is the rewritten one, and
    its rewriters act inside the block.
    """
    if not exported.outputs_changed_by:
        yield source
        return
    with context() as rewriting:
        yield source.with_model(_model(rewriting))
