"""What torch.export made of the declared dimensions, and for which sizes the graph may be trusted.

torch.export traces with one example. Where the model looks at a size, it follows one branch and writes down a guard;
the ONNX file forgets it. Here the guards are read back: a dimension that became constant is refused with the line that
fixed it, a bounded one keeps its bounds, and conditions between dimensions become relations of the signature.
"""

from __future__ import annotations

import dataclasses
import linecache
import re
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from torchferry.core.errors import FormatError, FrozenDimensionError
from torchferry.core.expressions import Expression
from torchferry.core.report import Finding
from torchferry.core.signature import DimRange, Relation
from torchferry.graph.provenance import is_library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from torchferry.core.dimension import Dimension
    from torchferry.exporter.dimensions import Dynamic
    from torchferry.exporter.inputs import InputNames

_BOUNDED_HINT = "other sizes are refused at run time; export with an example on the other side if you need them"
_SPECIAL = (0, 1)  # torch treats these sizes as special cases; verification.settle runs them


@contextmanager
def user_lines(entry_file: str) -> Iterator[None]:
    """While inside, torch's guards remember the innermost line of the user's code, not only torch's own.

    Args:
        entry_file: Frames at and outside this file are the caller's script, not the model.
    """
    original: Callable[..., Any] = ShapeEnv._get_sloc

    def with_user_line(self: ShapeEnv, framework_loc: str | None = None) -> Any:
        sloc = original(self, framework_loc)
        asking = framework_loc if framework_loc is not None else _asking_frame()
        return dataclasses.replace(sloc, framework_loc=asking, maybe_user_loc=_innermost_user_line(entry_file))

    ShapeEnv._get_sloc = with_user_line  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShapeEnv._get_sloc = original  # type: ignore[method-assign]


def _asking_frame() -> traceback.FrameSummary | None:
    """Return the innermost frame that is neither torch's symbolic machinery nor ours."""
    machinery = {*uninteresting_files(), __file__}
    frame = sys._getframe(2)
    while frame.f_code.co_filename in machinery:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return traceback.FrameSummary(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _innermost_user_line(entry_file: str) -> str | None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != entry_file:
        file = frame.f_code.co_filename
        if not is_library(file):
            code = linecache.getline(file, frame.f_lineno).strip()
            return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}: {code}"
        frame = frame.f_back
    return None


@dataclass(frozen=True)
class Dimensions:
    """What torch.export made of the declared dimensions.

    Attributes:
        symbols: torch's symbol names to the user's dimension names.
        ranges: By dimension name.
        relations: Conditions between dimensions.
        findings: What the user should know: bounds, bindings, conditions that cannot be kept.
    """

    symbols: Mapping[str, str]
    ranges: Mapping[str, DimRange]
    relations: tuple[Relation, ...]
    findings: tuple[Finding, ...]


def read_dimensions(program: torch.export.ExportedProgram, names: InputNames, declared: Dynamic) -> Dimensions:
    """Read ranges and relations off an exported program.

    Raises:
        FrozenDimensionError: If a declared dimension became constant; names the line that fixed it.
    """
    shapes = _traced_shapes(program, names)
    env = _shape_env(program)
    _refuse_frozen(shapes, declared, env, names)

    if env is None:
        return Dimensions({}, {}, (), ())
    symbols: dict[str, str] = {}
    owners: dict[str, Any] = {}
    bounds: dict[str, Dimension] = {}
    findings: list[Finding] = []
    derived: list[tuple[str, int, Dimension, Any]] = []
    for name, axes in declared.items():
        for axis, want in axes.items():
            expr = shapes[name][axis].node.expr
            if not expr.is_Symbol:
                derived.append((name, axis, want, expr))
                continue
            if symbols.setdefault(str(expr), want.name) != want.name:
                findings.append(_bound(name, axis, want.name, symbols[str(expr)]))
            owners.setdefault(symbols[str(expr)], expr)
            bounds.setdefault(symbols[str(expr)], want)
    findings += [_bound(name, axis, want.name, _rename(_python(expr), symbols)) for name, axis, want, expr in derived]

    ranges: dict[str, DimRange] = {}
    for dim, symbol in owners.items():
        ranges[dim], more = _range(dim, symbol, env, bounds[dim])
        findings += more
    relations, more = _relations(env, symbols)
    return Dimensions(symbols, ranges, relations, (*findings, *more))


def _traced_shapes(program: torch.export.ExportedProgram, names: InputNames) -> dict[str, tuple[Any, ...]]:
    user_inputs = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user_inputs]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return {name: tuple(value.shape) for name, value in zip(names.names, tensors, strict=True)}


def _shape_env(program: torch.export.ExportedProgram) -> ShapeEnv | None:
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            env: ShapeEnv | None = getattr(getattr(node.meta["val"], "fake_mode", None), "shape_env", None)
            return env
    return None


def _refuse_frozen(
    shapes: Mapping[str, tuple[Any, ...]], declared: Dynamic, env: ShapeEnv | None, names: InputNames
) -> None:
    """Refuse dimensions that were declared dynamic and became a number, with the line that made them one."""
    frozen = [
        (name, axis, want.name, size)
        for name, axes in declared.items()
        for axis, want in axes.items()
        if not isinstance(size := shapes[name][axis], torch.SymInt) or size.node.expr.is_number
    ]
    if not frozen:
        return
    said = "; ".join(f"'{dim}' (axis {axis} of '{name}') to {size}" for name, axis, dim, size in frozen)
    lines = (_frozen_line(env, names.sources[name], axis) for name, axis, _, _ in frozen) if env else ()
    raise FrozenDimensionError(
        f"declared dynamic, but the model fixes {said}",
        where=next((line for line in lines if line), None),
        hint="take the condition on this size out of the model, or leave the axis out of the dynamic dimensions",
    )


def _frozen_line(env: ShapeEnv, source: str, axis: int) -> str | None:
    symbol = env.source_to_var.get(f"{source}.size()[{axis}]")
    if symbol is None:
        return None
    guards = [g.sloc for g in env.guards if symbol in g.expr.free_symbols]
    slocs = [env.replacements_slocs.get(symbol), *guards]
    return next((line for line in map(_line, slocs) if line), None)


def _line(sloc: Any) -> str | None:
    """Return the user's line of a guard, or torch's own where the model has none."""
    if sloc is None:
        return None
    if isinstance(sloc.maybe_user_loc, str):
        return sloc.maybe_user_loc
    frame = sloc.framework_loc
    return None if frame is None or isinstance(frame, str) else f"{frame.filename}:{frame.lineno} in {frame.name}"


def _is_users(sloc: Any) -> bool:
    """Tell whether the user's own code, not a library's, looked at the size."""
    frame = getattr(sloc, "framework_loc", None)
    return frame is not None and not isinstance(frame, str) and not is_library(frame.filename)


def _bound(name: str, axis: int, dim: str, to: str) -> Finding:
    return Finding(
        "dimension-bound", "info", f"the model ties '{dim}' (axis {axis} of '{name}') to {to}; it is written as that"
    )


def _range(dim: str, symbol: Any, env: ShapeEnv, want: Dimension) -> tuple[DimRange, list[Finding]]:
    """Read one dimension's bounds. Sizes 0 and 1 stay out until they have been run, unless the model rules on them."""
    traced = env.var_to_range[symbol]
    slocs = env.var_to_range_sloc.get(symbol)
    lower = int(traced.lower)
    upper = int(traced.upper) if traced.upper.is_Integer else None
    where = None
    excluded: dict[int, str] = {}
    if slocs is not None and lower > 0 and _is_models(slocs.lower):
        where = _line(slocs.lower)
        excluded = {size: f"the model was traced with {dim} >= {lower}" for size in _SPECIAL if size < lower}
    if slocs is not None and upper is not None:
        where = where or _line(slocs.upper)
    findings = []
    if upper is not None or (where is not None and lower > max(_SPECIAL)):
        findings.append(
            Finding(
                "dimension-bounded",
                "warning",
                f"the graph is right for {dim} in {DimRange(lower, upper)} only: the model looks at this size",
                where=where,
                hint=_BOUNDED_HINT,
            )
        )
    if want.min is not None:
        excluded |= {size: f"declared with min={want.min}" for size in _SPECIAL if size < want.min}
        lower = max(lower, want.min)
    if want.max is not None:
        upper = want.max if upper is None else min(upper, want.max)
    if upper is None or upper > max(_SPECIAL):
        lower = max(lower, max(_SPECIAL) + 1)
    return DimRange(lower, upper, excluded, where, want.opt), findings


def _is_models(sloc: Any) -> bool:
    """Tell a bound that the model asked for from torch's own assumption about sizes 0 and 1."""
    frame = sloc.framework_loc
    return frame is not None and not isinstance(frame, str) and "_export" not in frame.filename


def _relations(env: ShapeEnv, symbols: Mapping[str, str]) -> tuple[tuple[Relation, ...], list[Finding]]:
    relations: dict[str, Relation] = {}
    findings = []
    for guard in env.guards:
        expr = env.replace(guard.expr)
        free = {str(symbol) for symbol in expr.free_symbols}
        if not free or _is_plain_bound(expr) or not free <= set(symbols):
            continue  # always true, or already in a range, or about a value that is known only while running
        if not _is_users(guard.sloc) and _holds_from_two_up(expr):
            continue  # torch's own caution about sizes 0 and 1, which are settled by running them
        text = _rename(_python(expr), symbols)
        try:
            Expression(text)
        except FormatError:
            findings.append(
                Finding(
                    "condition-not-kept", "warning", f"cannot enforce the condition {text}", where=_line(guard.sloc)
                )
            )
            continue
        if text not in relations:
            relations[text] = Relation(text, where=_line(guard.sloc))
            findings.append(_related(relations[text]))
    return tuple(relations.values()), findings


def _related(relation: Relation) -> Finding:
    return Finding(
        "dimensions-related",
        "warning",
        f"the graph is right where {relation.expression} only: the model looks at these sizes",
        where=relation.where,
        hint=_BOUNDED_HINT,
    )


def _is_plain_bound(expr: Any) -> bool:
    """Tell whether the condition compares one symbol with one number, which the range holds already."""
    if not expr.is_Relational or expr.rel_op not in ("<", "<=", ">", ">="):
        return False
    left, right = expr.args
    return bool((left.is_Symbol and right.is_Integer) or (right.is_Symbol and left.is_Integer))


def _holds_from_two_up(expr: Any) -> bool:
    """Tell whether a condition holds whenever every size in it is at least 2, by interval arithmetic."""
    sizes = ValueRanges(max(_SPECIAL) + 1, int_oo)
    truth = bound_sympy(expr, dict.fromkeys(expr.free_symbols, sizes))
    return truth.is_singleton() and bool(truth.lower)


def _python(expr: Any) -> str:
    """Print a sympy expression in the syntax of ``Expression``."""
    text = PythonPrinter().doprint(expr)
    text = re.sub(r"\b(?:math\.|torch\._?sym_)", "", text)
    return re.sub(r"\b(\d+\.\d+?)0{6,}\b", r"\1", text)  # sympy prints 3.0 with all its digits


def _rename(text: str, symbols: Mapping[str, str]) -> str:
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda match: symbols.get(match[0], match[0]), text)


def rename_symbols(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Write the user's dimension names into every shape of the graph, in place of torch's symbols."""
    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is None or value.shape.is_static():
                continue
            value.shape = ir.Shape(
                [size if isinstance(size, int) else _renamed(size.value, symbols) for size in value.shape]
            )


def _renamed(text: str | None, symbols: Mapping[str, str]) -> str | None:
    return None if text is None else _rename(_printable(text), symbols)


def _printable(text: str) -> str:
    """Turn sympy's own function names, which torch writes into shapes, into those of ``Expression``."""
    for theirs, ours in (
        ("TruncToInt", "trunc"),
        ("ToFloat", "float"),
        ("CeilToInt", "ceil"),
        ("FloorToInt", "floor"),
        ("RoundToInt", "round"),
        ("Max", "max"),
        ("Min", "min"),
    ):
        text = re.sub(rf"\b{theirs}\b", ours, text)
    # What torch writes for interpolate(scale_factor=3.0); a size is far below the 2**53 at which they would differ.
    return re.sub(r"\btrunc\((\d+)\.0\*float\((\w+)\)\)", r"\1*\2", text)
