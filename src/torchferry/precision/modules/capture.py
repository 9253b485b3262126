"""A module as a graph whose constants are its parameters, with nothing folded, and the ATen calls behind it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental import _config

from torchferry.core.signature import Signature
from torchferry.core.target import Target
from torchferry.exporter.dimensions import torch_dynamic_shapes
from torchferry.exporter.failures import export_error
from torchferry.exporter.quiet import quiet
from torchferry.exporter.translations import TRANSLATIONS
from torchferry.graph import Exported
from torchferry.graph.provenance import record_provenance
from torchferry.graph.reading import signature_of, tensor_spec
from torchferry.precision.modules.expansions import expand, numbers_as_floats

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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


def capture_plainly(source: Source, *, free_sizes: bool = False, expanded: Collection[str] = ()) -> Captured:
    """Export a module with nothing folded, so that its parameters are constants of the graph.

    Args:
        source: The module and its example.
        free_sizes: Let every size of an input be another than the example's wherever the module does.
        expanded: Names of ATen's operators that are written out; see ``expansions``.

    Raises:
        ModelError: If the module fails on its own example.
        ExportError: If it cannot be exported.
    """
    program = None
    try:
        with quiet(), torch.no_grad(), torch.backends.nnpack.flags(enabled=False):
            program = _program(source, free_sizes)
            numbers_as_floats(program)
            program = expand(program, expanded)
            onnx_program = torch.onnx.export(
                program, dynamo=True, optimize=False, custom_translation_table=TRANSLATIONS, verbose=False
            )
    except Exception as exc:
        raise export_error(exc, source, program) from exc
    assert onnx_program is not None
    assert onnx_program.exported_program is not None
    model = onnx_program.model
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
    if free_sizes:
        signature = signature_of(model)
    else:
        signature = Signature(
            tuple(tensor_spec(v) for v in model.graph.inputs), tuple(tensor_spec(v) for v in model.graph.outputs)
        )
    own = {**source.model.state_dict(), **onnx_program.exported_program.constants}
    parameters = frozenset(name for name, value in own.items() if isinstance(value, torch.Tensor))
    return Captured(
        Exported(model, signature, Target()),
        parameters & model.graph.initializers.keys(),
        onnx_program.exported_program,
        dict(zip(placeholders, source.names.names, strict=True)),
        units,
    )


def _program(source: Source, free_sizes: bool) -> torch.export.ExportedProgram:
    """Run torch.export, with sizes as free as they can be, if that is asked for."""
    args, kwargs = source.call
    ranks = {name: tensor.dim() for name, tensor in source.names.tensors(source.call).items()}
    free: dict[str, dict[int, Any]] = {name: dict.fromkeys(range(rank)) for name, rank in ranks.items()}
    for declared, oblivious in ((free, True), (free, False)) if free_sizes else ():
        shapes = torch_dynamic_shapes(source.model, source.call, source.names, declared)
        with _config.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
            try:
                return torch.export.export(source.model, args, kwargs or None, dynamic_shapes=shapes, strict=False)
            except Exception:  # noqa: BLE001, S112 - torch raises anything; what is really wrong shows at fixed sizes
                continue
    return torch.export.export(source.model, args, kwargs or None, strict=False)
