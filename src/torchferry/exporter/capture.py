"""Capturing a module as a graph: torch.export, then torch.onnx's translation, then our names, ranges and provenance."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.experimental._config as symbolic_shapes_config

from torchferry.core.errors import ExportError, FrozenDimensionError, TorchferryError
from torchferry.core.report import Finding, Report
from torchferry.core.signature import Signature
from torchferry.core.target import Target
from torchferry.exporter import shapes
from torchferry.exporter.failures import export_error
from torchferry.exporter.inputs import Call, InputNames
from torchferry.exporter.translations import TRANSLATIONS
from torchferry.graph import Exported
from torchferry.graph.provenance import record_provenance
from torchferry.graph.reading import tensor_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from torchferry.exporter.source import Source


def capture(source: Source, target: Target) -> Exported:
    """Export a module; its parameters are shared with the result, not copied.

    Sizes 0 and 1 of every dynamic dimension stay outside the ranges; ``verification.settle`` runs them and lets them in.

    Args:
        source: The module with its example and dynamic dimensions.
        target: For the opset; the rest is recorded.

    Raises:
        ModelError: If the module fails on its own example in PyTorch.
        ExportError: If torch.export or torch.onnx cannot take it; names the user's line.
        FrozenDimensionError: If a dimension declared dynamic became constant; names the line that fixed it.
        ConfigError: If the declared dimensions do not fit the example.
    """
    names = source.names
    tensors = names.tensors(source.call)
    declared = shapes.declared_dimensions(source.dynamic_shapes, names, tensors)
    with evaluation_mode(source.model) as was_training:
        program, dimensions = _trace(source, declared)
        model = _translate(program, source, target)
    _name_values(model, names, source.output_names)
    shapes.rename_symbols(model, dimensions.symbols)
    record_provenance(model)
    findings = list(dimensions.findings)
    if was_training:
        findings.append(
            Finding("training-mode", "warning", "the model was in training mode; exported as in eval()", hint="call model.eval()")
        )
    signature = Signature(
        tuple(tensor_spec(v) for v in model.graph.inputs),
        tuple(tensor_spec(v) for v in model.graph.outputs),
        dimensions.ranges,
        dimensions.relations,
    )
    report = Report(f"export of {type(source.model).__name__}", tuple(findings))
    return Exported(model, signature, target, report)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[bool]:
    """Put a module and everything in it into eval mode, and leave every flag as it was; yield whether any was training."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield any(training for _, training in flags)
    finally:
        for module, training in flags:
            module.training = training


def _trace(source: Source, declared: shapes.Dynamic) -> tuple[torch.export.ExportedProgram, shapes.Dimensions]:
    """Trace until one way works: sizes of 1 doubled and torch oblivious to 0 and 1, then specialised, then as given."""
    names = source.names
    tensors = names.tensors(source.call)
    grown = shapes.doubled(tensors, declared)
    as_given = source.call
    doubled = names.replace(as_given, grown)
    attempts = [(doubled, True)]
    if declared:
        attempts.append((doubled, False))
    if any(grown[name] is not tensors[name] for name in tensors):
        attempts.append((as_given, True))

    failure: Exception | None = None
    for call, oblivious in attempts:
        try:
            program = _torch_export(source.model, call, shapes.torch_dynamic_shapes(call, names, declared), oblivious)
            return program, shapes.read_dimensions(program, names, declared)
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as exc:  # noqa: BLE001 - torch raises anything, the user's forward too
            # A frozen dimension is the more telling answer, whichever attempt found it.
            if failure is None or (isinstance(exc, FrozenDimensionError) and not isinstance(failure, TorchferryError)):
                failure = exc
    assert failure is not None
    if isinstance(failure, TorchferryError):
        raise failure
    raise export_error(failure, source) from failure


def _torch_export(model: torch.nn.Module, call: Call, dynamic_shapes: Any, oblivious: bool) -> torch.export.ExportedProgram:
    with (
        _quiet(),
        redirect_stderr(_WithoutPartialGraph(sys.stderr)),  # type: ignore[type-var]
        torch.no_grad(),
        shapes.user_lines(__file__),
        symbolic_shapes_config.patch(backed_size_oblivious=oblivious),
    ):
        return torch.export.export(model, call[0], call[1] or None, dynamic_shapes=dynamic_shapes, strict=False)


def _translate(program: torch.export.ExportedProgram, source: Source, target: Target) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=target.opset,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as exc:
        raise export_error(exc, source) from exc
    assert onnx_program is not None
    return onnx_program.model


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own log lines and its libraries' deprecation warnings from the user's terminal."""
    with ExitStack() as stack:
        for name in ("torch.onnx", "torch.export", "torch._export", "torch._guards", "torch.fx"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


class _WithoutPartialGraph:
    """Standard error without the half-built graph that torch.export prints there when it fails."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if "def forward(self, arg" in text:
            return len(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
