"""Capturing a module as a graph: torch.export, then torch.onnx's translation, then our names, ranges and provenance."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx.experimental import _config
from torch.onnx._constants import ONNX_DEFAULT_OPSET, ONNX_MAX_OPSET
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._flags import set_onnx_exporting_flag

from torchferry.core.errors import ConfigError, ExportError, FrozenDimensionError, OperatorError, TorchferryError
from torchferry.core.report import Finding, Report
from torchferry.core.signature import Signature
from torchferry.exporter import dimensions, guards
from torchferry.exporter.failures import export_error
from torchferry.exporter.lost import lost_inputs
from torchferry.exporter.mark_sizes import take_sizes_from_marks
from torchferry.exporter.marks import MARK, Marks, complete_marks
from torchferry.exporter.quiet import quiet
from torchferry.exporter.symbolics import Symbolics
from torchferry.exporter.translations import TRANSLATIONS
from torchferry.graph import Exported
from torchferry.graph.opset import convert_opset
from torchferry.graph.provenance import record_provenance
from torchferry.graph.reading import tensor_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx_ir as ir

    from torchferry.core.target import Target
    from torchferry.exporter.inputs import Call, InputNames
    from torchferry.exporter.source import Source
    from torchferry.rewrite import RewriteLog, RewriterContext


# Modules that compute something else while training.
_MODAL = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU)


class Captured(NamedTuple):
    """What capturing a module gives.

    Attributes:
        exported: The graph.
        log: What became of the rewriters.
        program: What torch.onnx translated, an operator at a time; most values of the graph have its nodes' names.
    """

    exported: Exported
    log: RewriteLog
    program: torch.export.ExportedProgram


def capture(
    source: Source, target: Target, rewriting: Callable[[], RewriterContext], *, apply_marks: bool = False
) -> Captured:
    """Export a module; its parameters are shared with the result, not copied.

    Sizes 0 and 1 of every dynamic dimension stay outside the ranges; ``verification.settle`` runs them.

    Args:
        source: The module with its example and dynamic dimensions.
        target: For the opset; the rest is recorded.
        rewriting: Makes the context in which the module is traced, a fresh one for each attempt.
        apply_marks: Put what ``mark`` and ``mark_tensors`` name into the graph.

    Raises:
        ModelError: If the module fails on its own example in PyTorch.
        ExportError: If torch.export or torch.onnx cannot take it; names the user's line.
        FrozenDimensionError: If a dimension declared dynamic became constant; names the line that fixed it.
        ConfigError: If the declared dimensions do not fit the example.
    """
    names = source.names
    tensors = names.tensors(source.call)
    declared = dimensions.declared_dimensions(source.dynamic_shapes, names, tensors)
    with evaluation_mode(source.model) as was_training:
        marks = Marks()
        with marks.applied() if apply_marks else nullcontext():
            program, context, symbolics = _trace(source, declared, target, rewriting, marks)
        try:
            model, translated = _translate(program, source, target, symbolics, marks)
            function_findings = symbolics.findings()
        finally:
            symbolics.functions.close()
        _name_values(model, names, source.output_names)
        lost = lost_inputs(model, source)
    traced = guards.read_dimensions(program, names, declared)  # only now: the translation may add guards
    guards.rename_symbols(model, traced.symbols)
    record_provenance(model)
    if target.opset is not None:
        model = convert_opset(model, target.opset)
    findings = [*traced.findings, *function_findings, *lost]
    if was_training:
        findings.append(
            Finding(
                "training-mode",
                "warning" if was_training == "matters" else "info",
                "the model was in training mode; exported as in eval()",
                hint="call model.eval()",
            )
        )
    signature = Signature(
        tuple(tensor_spec(v) for v in model.graph.inputs),
        tuple(tensor_spec(v) for v in model.graph.outputs),
        traced.ranges,
        traced.relations,
    )
    report = Report(f"export of {type(source.model).__name__}", tuple(findings))
    return Captured(Exported(model, signature, target, report), context.log, translated)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[str]:
    """Put a module and all in it into eval mode, then leave every flag as it was.

    Yields:
        Empty if none was training, ``matters`` if one was that then computes something else, else ``harmless``.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        training = [module for module, flag in flags if flag]
        yield "matters" if any(isinstance(m, _MODAL) for m in training) else "harmless" if training else ""
    finally:
        for module, flag in flags:
            module.training = flag


def _trace(
    source: Source,
    declared: dimensions.Dynamic,
    target: Target,
    rewriting: Callable[[], RewriterContext],
    marks: Marks,
) -> tuple[torch.export.ExportedProgram, RewriterContext, Symbolics]:
    """Trace until one way works: sizes of 1 doubled and torch oblivious to 0 and 1, then specialised, then as given."""
    names = source.names
    tensors = names.tensors(source.call)
    prepared = dimensions.traceable(tensors, declared)
    call = names.replace(source.call, prepared)
    attempts = [(call, True)]
    if declared:
        attempts.append((call, False))
    if any(prepared[name] is not tensors[name] for name in tensors):
        attempts.append((source.call, True))

    failure: Exception | None = None
    for call, oblivious in attempts:
        marks.restart()
        try:
            return _attempt(source, declared, target, rewriting, marks, call, oblivious)
        except (KeyboardInterrupt, MemoryError, ConfigError):
            raise
        except Exception as exc:  # noqa: BLE001 - torch raises anything, the user's forward too
            # A frozen dimension is the more telling answer, whichever attempt found it.
            if failure is None or (isinstance(exc, FrozenDimensionError) and not isinstance(failure, TorchferryError)):
                failure = exc
    assert failure is not None
    if isinstance(failure, TorchferryError):
        raise failure
    raise export_error(failure, source) from failure


def _attempt(
    source: Source,
    declared: dimensions.Dynamic,
    target: Target,
    rewriting: Callable[[], RewriterContext],
    marks: Marks,
    call: Call,
    oblivious: bool,
) -> tuple[torch.export.ExportedProgram, RewriterContext, Symbolics]:
    """Trace in one way; a second time if what a Function returns is known only from running the model."""
    with rewriting() as context:
        assert context.model is not None  # it was given one
        symbolics = Symbolics(context.symbolics, min(target.opset or ONNX_DEFAULT_OPSET, ONNX_MAX_OPSET))
        functions = symbolics.functions
        shapes = dimensions.torch_dynamic_shapes(context.model, call, source.names, declared)
        try:
            with functions.taken():
                program = _torch_export(context.model, call, shapes, oblivious)
        except Exception:
            functions.close()
            if not functions.is_unseen:
                raise
            with functions.watching(), torch.no_grad():
                context.model(*call[0], **call[1])
            marks.restart()
            with functions.taken():
                program = _torch_export(context.model, call, shapes, oblivious)
    guards.read_dimensions(program, source.names, declared)  # refuses frozen dimensions
    return program, context, symbolics


def _torch_export(
    model: torch.nn.Module, call: Call, dynamic_shapes: Any, oblivious: bool
) -> torch.export.ExportedProgram:
    with (
        quiet(),
        torch.no_grad(),
        torch.backends.nnpack.flags(enabled=False),  # as in _translate
        guards.user_lines(__file__),
        _config.patch(backed_size_oblivious=oblivious),  # type: ignore[attr-defined]
    ):
        # As torch.onnx does, for models that ask is_in_onnx_export().
        export = set_onnx_exporting_flag(torch.export.export)
        return export(model, call[0], call[1] or None, dynamic_shapes=dynamic_shapes, strict=False)


def _translate(
    program: torch.export.ExportedProgram, source: Source, target: Target, symbolics: Symbolics, marks: Marks
) -> tuple[ir.Model, torch.export.ExportedProgram]:
    translations: dict[Any, Callable[..., Any]] = {
        **TRANSLATIONS,
        **symbolics.translations(),
        MARK: marks.translation,
    }
    try:
        # torch.onnx runs the graph on fake tensors again; choosing NNPACK there would bound the batch to 15.
        with quiet(), torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_asked_of_torch(target),
                custom_translation_table=translations,
                optimize=False,
                verbose=False,
            )
            assert onnx_program is not None
            assert onnx_program.exported_program is not None
            take_sizes_from_marks(onnx_program.model, onnx_program.exported_program)
            symbolics.expand(onnx_program.model)
            onnx_program.optimize()
            symbolics.add_functions(onnx_program.model)
            complete_marks(onnx_program.model)
            _add_forgotten_constants(onnx_program.model)
    except (KeyboardInterrupt, MemoryError, OperatorError):
        raise
    except Exception as exc:
        raise export_error(exc, source, program, opset=target.opset, translations=translations) from exc
    return onnx_program.model, onnx_program.exported_program


def _asked_of_torch(target: Target) -> int | None:
    """Return the opset to ask torch.onnx for: of earlier ones it delivers some, drops metadata for others."""
    return None if target.opset is None else min(max(target.opset, TORCHLIB_OPSET), ONNX_MAX_OPSET)


def _add_forgotten_constants(model: ir.Model) -> None:
    """Add the constants that torch.onnx's optimiser made and did not add, such as a second pair of a Clip's bounds.

    Raises:
        ExportError: If a node takes a value that nothing gives.
    """
    for graph in model.graphs():
        for value in [value for node in graph for value in node.inputs if value is not None]:
            if value.producer() is not None or value.is_graph_input() or value.is_initializer():
                continue
            if value.const_value is None:
                raise ExportError(f"torch.onnx made a graph in which nothing gives '{value.name}'")
            while value.name in model.graph.initializers:
                value.name = f"{value.name}_"
            model.graph.register_initializer(value)


def _name_values(model: ir.Model, names: InputNames, output_names: tuple[str, ...]) -> None:
    """Give the graph's inputs and outputs their names, renaming whatever else has one of these."""
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    if len(inputs) != len(names.names):
        raise ExportError(
            f"the graph has {len(inputs)} inputs for {len(names.names)} tensors ({', '.join(names.names)})",
            hint="an input may have been frozen into the graph; give every tensor argument a use in forward",
        )
    if len(output_names) > len(outputs):
        raise ExportError(f"{len(output_names)} output names for {len(outputs)} outputs")
    wanted = dict(zip(inputs, names.names, strict=True)) | dict(zip(outputs, output_names, strict=False))
    taken = set(wanted.values())
    for graph in model.graphs():
        for value in [*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs)]:
            if value.name in taken and value not in wanted:
                value.name = f"{value.name}_inner"
    for value, name in wanted.items():
        value.name = name
