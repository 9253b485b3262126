"""A module as a graph whose constants are its parameters, with nothing folded, and the ATen calls behind it."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental import _config

from torchferry.core.target import Target
from torchferry.exporter.dimensions import torch_dynamic_shapes, traceable
from torchferry.exporter.failures import export_error
from torchferry.exporter.quiet import quiet
from torchferry.exporter.translations import TRANSLATIONS
from torchferry.graph import Exported
from torchferry.graph.provenance import record_provenance
from torchferry.graph.reading import signature_of
from torchferry.precision.modules.expansions import expand, numbers_as_floats
from torchferry.rewrite import RewriterContext

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_ir as ir

    from torchferry.exporter.dimensions import Dynamic
    from torchferry.exporter.inputs import Call
    from torchferry.exporter.source import Source

_CALL_KEY = "pkg.torch.onnx.fx_node"  # where torch's exporter notes which call a node comes from
_CALL = re.compile(r"%(\w+)")


@dataclass(frozen=True)
class Captured:
    """A module as a graph.

    Attributes:
        exported: The graph.
        parameters: Names of the constants that are in the module, by the names that they have there.
        program: The calls that the graph was translated from.
        inputs: The graph's inputs by the program's names for them.
        units: For each node of the graph the call that it comes from.
    """

    exported: Exported
    parameters: frozenset[str]
    program: torch.export.ExportedProgram
    inputs: Mapping[str, str]
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> dict[str, torch.fx.Node]:
        """The calls by name."""
        return {node.name: node for node in self.program.graph.nodes if node.op == "call_function"}


def capture_plainly(source: Source, free: Dynamic | None = None, *, expanded: Collection[Any] = ()) -> Captured:
    """Export a module with nothing folded, so that its parameters are constants of the graph.

    Args:
        source: The module and its example.
        free: Sizes that may be others than the example's, if torch can do that.
        expanded: ATen's operators that are written out; see ``expansions``.

    Raises:
        ModelError: If the module fails on its own example.
        ExportError: If it cannot be exported.
    """
    tensors = source.names.tensors(source.call)
    freedoms: tuple[Dynamic, ...] = (free, {}) if free else ()
    for doubled in freedoms:  # torch takes a size of 1 for fixed, unless it is doubled
        call = source.names.replace(source.call, traceable(tensors, doubled))
        shapes = torch_dynamic_shapes(source.model, call, source.names, free or {})
        with suppress(Exception):  # torch raises anything; what is really wrong shows at fixed sizes
            return _captured(source, *_translated(source, call, shapes, expanded))
    try:
        return _captured(source, *_translated(source, source.call, None, expanded))
    except Exception as exc:
        raise export_error(exc, source) from exc


def _translated(
    source: Source, call: Call, dynamic_shapes: Any, expanded: Collection[Any]
) -> tuple[ir.Model, torch.export.ExportedProgram]:
    import torchferry.rewrite.rules  # noqa: F401 - registers the rules of our own

    args, kwargs = call
    with (
        RewriterContext(ir="onnx", target=Target()),  # of functions, as in every export
        quiet(),
        torch.no_grad(),
        torch.backends.nnpack.flags(enabled=False),
        _config.patch(backed_size_oblivious=dynamic_shapes is not None),  # type: ignore[attr-defined]
    ):
        program = torch.export.export(source.model, args, kwargs or None, dynamic_shapes=dynamic_shapes, strict=False)
        numbers_as_floats(program)
        onnx_program = torch.onnx.export(
            expand(program, expanded),
            dynamo=True,
            optimize=False,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert onnx_program is not None
    assert onnx_program.exported_program is not None
    return onnx_program.model, onnx_program.exported_program


def _captured(source: Source, model: ir.Model, program: torch.export.ExportedProgram) -> Captured:
    placeholders = [value.name or "" for value in model.graph.inputs]
    for value, name in zip(model.graph.inputs, source.names.names, strict=True):
        value.name = name
    units = {}
    for number, node in enumerate(model.graph):
        node.name = f"n{number}_{node.op_type}"  # torch.onnx names some alike
        call = _CALL.search(node.metadata_props.get(_CALL_KEY, ""))
        if call:
            units[node.name] = call[1]
    record_provenance(model)
    own = {**source.model.state_dict(), **program.constants}
    parameters = frozenset(name for name, value in own.items() if isinstance(value, torch.Tensor))
    return Captured(
        Exported(model, signature_of(model), Target()),
        parameters & model.graph.initializers.keys(),
        program,
        dict(zip(placeholders, source.names.names, strict=True)),
        units,
    )
