"""torch.onnx's table of translations, and what it leaves of a program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload
from torch.onnx._internal.exporter import _constants, _core, _dispatching, _registration

from torchferry.exporter.quiet import quiet
from torchferry.exporter.translations import TRANSLATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

Translations = Mapping[Callable[..., Any], Callable[..., Any]]
Registry = _registration.ONNXRegistry

DEFAULT_OPSET: int = torch.onnx._constants.ONNX_DEFAULT_OPSET


def make_registry(opset: int | None = None, translations: Translations | None = None) -> Registry:
    """Return torch.onnx's table of translations, as an export for an opset uses it.

    Args:
        opset: The opset; torch's default if None.
        translations: What goes before torch's own; ``TRANSLATIONS`` if None.
    """
    with quiet():
        registry = Registry.from_torchlib(max(opset or DEFAULT_OPSET, _constants.TORCHLIB_OPSET))
        for target, function in (TRANSLATIONS if translations is None else translations).items():
            registry.register_op(target, function)
    return registry


def translated_calls(
    program: torch.export.ExportedProgram, registry: Registry
) -> Iterator[tuple[torch.fx.Node, torch.fx.Node, Callable[..., Any] | None]]:
    """Give every call, in branches too, that is left once torch.onnx has decomposed a program.

    Args:
        program: As torch.export gave it; not changed.
        registry: See ``make_registry``.

    Yields:
        The node; the node of the outermost graph that it is in or is; and its translation, None if there is none.
    """
    with quiet(), torch.no_grad():
        prepared = _core._prepare_exported_program_for_export(program, registry=registry)
    yield from _translated(prepared, registry)


def untranslated_as_traced(
    program: torch.export.ExportedProgram, registry: Registry
) -> Iterator[tuple[torch.fx.Node, torch.fx.Node, None]]:
    """Give the calls that can have no translation, of a program that torch cannot decompose a second time.

    It cannot where an operator gives sizes that are known only while running. What it would decompose is left out, and
    so are assertions.

    Args:
        program: As torch.export gave it.
        registry: See ``make_registry``.

    Yields:
        As ``translated_calls``.
    """
    table = torch.export.default_decompositions()
    for node, outer, translation in _translated(program, registry):
        is_assertion = isinstance(node.target, OpOverload) and not node.target._schema.returns
        if translation is None and node.target not in table and not is_assertion:
            yield node, outer, None


def _translated(
    program: torch.export.ExportedProgram, registry: Registry
) -> Iterator[tuple[torch.fx.Node, torch.fx.Node, Callable[..., Any] | None]]:
    for node, outer in _calls(program.graph_module, None):
        if not _core._is_onnx_op(node.target):
            yield node, outer, _dispatching.dispatch(node, registry)[0]


def _calls(module: torch.nn.Module, outer: torch.fx.Node | None) -> Iterator[tuple[torch.fx.Node, torch.fx.Node]]:
    if not isinstance(module, torch.fx.GraphModule):
        return
    for node in module.graph.nodes:
        if node.op == "call_function":
            yield node, outer or node
        elif node.op == "get_attr":
            branch = functools.reduce(getattr, str(node.target).split("."), module)
            yield from _calls(branch, outer or next(iter(node.users), node))
