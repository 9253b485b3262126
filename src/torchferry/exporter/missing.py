"""Naming every operator of a program that has no translation, where it is used, and what can be done about it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload
from torch.onnx._internal.exporter._errors import ConversionError, DispatchError

from torchferry.core.errors import OperatorError
from torchferry.exporter.operators import nearest_onnx, short_name, wording_of_parts
from torchferry.exporter.skeletons import skeletons
from torchferry.exporter.table import make_registry, translated_calls, untranslated_as_traced
from torchferry.graph.provenance import is_library, user_line

if TYPE_CHECKING:
    from torchferry.exporter.table import Registry, Translations

_FUNCTIONALIZED = "auto_functionalized"
_TIMES = {1: "once", 2: "twice"}


@dataclass(frozen=True)
class Place:
    """Where an operator is called.

    Attributes:
        module: The module's path; empty for the root.
        line: The user's line; empty if unknown.
        branch_of: The higher-order operator in one of whose branches it is called; empty outside of branches.
    """

    module: str
    line: str
    branch_of: str = ""

    def __str__(self) -> str:
        parts = [f"in module '{self.module}'"] if self.module else []
        parts += [f"in a branch of '{self.branch_of}'"] if self.branch_of else []
        return ", ".join(parts)


@dataclass
class Missing:
    """An operator of the user's model that cannot be translated.

    Attributes:
        op: The operator as the model calls it; a higher-order one is no ``OpOverload``.
        place: The first call whose place torch knows; in a branch it knows that of the whole.
        calls: The calls, by their names in the traced graphs.
        lacking: What it is decomposed into and has no translation; the operator itself if it is not decomposed.
        is_real_only: There is a translation, which does not take complex numbers.
    """

    op: Any
    place: Place
    calls: set[Any] = field(default_factory=set)
    lacking: dict[Any, None] = field(default_factory=dict)
    is_real_only: bool = False

    @property
    def name(self) -> str:
        """The operator's name with its overload, as ``aten::squeeze.dim``."""
        return _full_name(self.op)

    @property
    def writes(self) -> bool:
        """True if it writes into its arguments."""
        return isinstance(self.op, OpOverload) and self.op._schema.is_mutable

    @property
    def is_translatable(self) -> bool:
        """True if a symbolic function can help."""
        return isinstance(self.op, OpOverload) and not self.is_real_only and not self.writes

    def used(self) -> str:
        """Word how often and where it is used."""
        count = len(self.calls)
        place = f"{', first' if count > 1 else ''} {self.place}" if str(self.place) else ""
        return f"used {_TIMES.get(count, f'{count} times')}{place}"

    def tried(self) -> str:
        """Word what there is in place of a translation."""
        if self.writes:
            return "it writes into its arguments, which no node of a graph can do"
        table = "for real numbers only, these are complex" if self.is_real_only else "no"
        parts = list(map(short_name, self.lacking))
        decomposition = "none" if list(self.lacking) == [self.op] else f"into {wording_of_parts(parts, parts)}"
        near = "; ".join(map(str, nearest_onnx(self.name.partition(".")[0]))) or "none"
        return f"torch.onnx's table: {table}; decomposition: {decomposition}; ONNX operators of a similar name: {near}"


def is_operator_missing(exc: BaseException) -> bool:
    """Tell whether torch.onnx stopped at an operator that it has no translation for."""
    return isinstance(exc, DispatchError) or (isinstance(exc, ConversionError) and _FUNCTIONALIZED in str(exc))


def operator_error(
    program: torch.export.ExportedProgram, model: str, opset: int | None, translations: Translations | None
) -> OperatorError | None:
    """Word which operators of a program have no translation, most used first.

    Args:
        program: As torch.export gave it.
        model: The name of the module's class.
        opset: The opset that was asked for.
        translations: What goes before torch.onnx's own translations.

    Returns:
        The error, whose hint holds a symbolic function to complete for each of them; None if all are translated.
    """
    found = missing_operators(program, make_registry(opset, translations))
    if not found:
        return None
    first = found[0]
    if len(found) == 1:
        lines = [f"operator '{first.name}' of {model} has no translation to ONNX; {first.used()}", f"  {first.tried()}"]
    else:
        lines = [f"{len(found)} operators of {model} have no translation to ONNX"]
        for missing in found:
            lines += [
                f"  '{missing.name}', {missing.used()}" + (f", at {missing.place.line}" if missing.place.line else "")
            ]
            lines += [f"    {missing.tried()}"]
    return OperatorError("\n".join(lines), where=first.place.line or None, hint=_hint(found))


def _hint(found: list[Missing]) -> str:
    """Say what to do: complete symbolic functions, where one can help."""
    ops = [missing.op for missing in found if missing.is_translatable]
    if ops:
        return f"complete this and run it before the export:\n\n{skeletons(ops)}"
    if all(missing.is_real_only for missing in found):
        return "ONNX has no complex numbers here: compute with the two parts that torch.view_as_real gives"
    if all(missing.writes for missing in found):
        return "let it return new tensors, with mutates_args=()"
    return "keep it out of what is exported"


def missing_operators(program: torch.export.ExportedProgram, registry: Registry) -> list[Missing]:
    """Return the operators without translation, as the model calls them, most used first."""
    found: dict[str, Missing] = {}
    try:
        calls = list(translated_calls(program, registry))
    except Exception:  # noqa: BLE001 - whatever decomposing raises; what was traced is left to look at
        calls = list(untranslated_as_traced(program, registry))
    for node, outer, translation in calls:
        if translation is not None:
            continue
        op, call = _origin(node)
        place = _place(node, outer)
        missing = found.setdefault(_full_name(op), Missing(op, place))
        if missing.place.branch_of and not place.branch_of:
            missing.place = place
        missing.calls.add((node.graph, call))
        missing.lacking[node.target] = None
        missing.is_real_only |= bool(registry.get_decomps(node.target))  # type: ignore[arg-type]
    return sorted(found.values(), key=lambda missing: -len(missing.calls))


def _full_name(op: Any) -> str:
    return f"{op._schema.name}.{op._schema.overload_name or 'default'}" if isinstance(op, OpOverload) else str(op)


def _origin(node: torch.fx.Node) -> tuple[Any, str]:
    """Return the operator that the model itself calls, and the name of its node, of a node that decomposing made."""
    op, call = node.target, node.name
    if _FUNCTIONALIZED in str(op):  # what torch makes of an operator that writes into its arguments
        return node.args[0], call
    sources = node.meta.get("from_node")
    while sources:
        source = sources[-1]
        traced = _by_dotted_name(str(source.target))
        if isinstance(traced, OpOverload):
            op, call = traced, source.name
        sources = source.from_node
    return op, call


def _by_dotted_name(name: str) -> Any:
    """Return an overload by the name that a node's target has, such as ``aten.squeeze.dim``; None if it is none."""
    parts = name.split(".")
    if len(parts) != len(("namespace", "operator", "overload")) or not all(map(str.isidentifier, parts)):
        return None
    try:
        return functools.reduce(getattr, parts, torch.ops)
    except AttributeError:
        return None


def _place(node: torch.fx.Node, outer: torch.fx.Node) -> Place:
    branch_of = "" if outer is node else str(outer.target)
    return Place(_module(node) or _module(outer), _line(node) or _line(outer), branch_of)


def _module(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _line(node: torch.fx.Node) -> str:
    line = user_line(node.meta.get("stack_trace") or "")
    return "" if is_library(line) else line
