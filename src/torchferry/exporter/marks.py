"""Marks: named boundaries of functions and tensors in the graph, as nodes that change nothing.

A Mark is a node ``torchferry.mark::Mark`` with one input and one output, and an ONNX function of that name, an
Identity, beside the graph, so that a marked model runs everywhere. Its attributes:

=========  =============================================================================
func       what is marked, as given to ``mark`` or ``mark_tensors``
func_id    which of its calls, counted from 0 in every export
type       ``input`` or ``output``
name       the tensor's name: ``input``, ``feats.0``, ``aux.k``
id         the tensor's number among those of this boundary
dtype      ONNX's number of its type
shape      its sizes, -1 for one that is dynamic
=========  =============================================================================
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnxscript import evaluator

from torchferry.core.errors import ConfigError
from torchferry.graph.marks import MARK_DOMAIN, MARK_OPERATOR, is_mark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])

_ATTRIBUTES = ("func", "func_id", "type", "name", "id", "dtype", "shape")

_LIBRARY: Any = torch.library.Library("torchferry", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("mark(Tensor x, int number) -> Tensor")
MARK = torch.ops.torchferry.mark.default


@torch.library.impl(_LIBRARY, "mark", "CompositeExplicitAutograd")
def _real(x: torch.Tensor, number: int) -> torch.Tensor:  # noqa: ARG001 - the graph's business
    return x.clone()


@torch.library.register_fake("torchferry::mark", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(x: torch.Tensor, number: int) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(x)


class Marks:
    """The marks of one export."""

    def __init__(self) -> None:
        self._table: list[dict[str, Any]] = []
        self._calls: Counter[str] = Counter()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Mark what runs inside the block, in this thread."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def restart(self) -> None:
        """Forget what was marked: the model is traced again."""
        self._table.clear()
        self._calls.clear()

    def begin(self, func: str) -> int:
        """Return the number of a call that begins."""
        self._calls[func] += 1
        return self._calls[func] - 1

    def boundary(self, func: str, call: int, kind: str, attributes: dict[str, Any]) -> Callable[[str, Any], Any]:
        """Return what marks all tensors of a value, in a structure of the same kind."""
        numbers = itertools.count()

        def marked(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                self._table.append(
                    {"func": func, "func_id": call, "type": kind, "name": name, "id": next(numbers), **attributes}
                )
                return MARK(value, len(self._table) - 1)
            return _map_parts(value, lambda part, inner: marked(f"{name}.{part}", inner))

        return marked

    def boundaries(self) -> list[tuple[str, int, str, int]]:
        """Return function, call, side and number of every tensor that was marked, by its number in all."""
        return [(row["func"], row["func_id"], row["type"], row["id"]) for row in self._table]

    def translation(self, x: ir.Value, number: int) -> ir.Value:
        """Put a Mark into the graph that torch.onnx is making."""
        attributes = ir.convenience.convert_attributes(self._table[number])
        node = ir.Node(MARK_DOMAIN, MARK_OPERATOR, [x], attributes, num_outputs=1, version=1)
        recorder: Any = evaluator.default()  # torch.onnx's own, while it translates a node
        recorder.nodes.append(node)
        return node.outputs[0]


def complete_marks(model: ir.Model) -> None:
    """Note dtype and shape on every Mark, and add the function that they are."""
    marks = [node for graph in model.graphs() for node in graph if is_mark(node)]
    for node in marks:
        value = node.inputs[0]
        assert value is not None  # a Mark is of a tensor
        shape = [size if isinstance(size, int) else -1 for size in value.shape or ()]
        node.attributes.add(ir.AttrInt64("dtype", int(value.dtype or 0)))
        node.attributes.add(ir.AttrInt64s("shape", shape))
    if marks:
        function = _identity(model.opset_imports[""])
        model.functions[function.identifier()] = function
        model.opset_imports[MARK_DOMAIN] = 1


def _identity(opset: int) -> ir.Function:
    x = ir.Value(name="x")
    body = ir.node("Identity", [x])
    body.outputs[0].name = "y"
    graph = ir.Graph([x], body.outputs, nodes=[body], opset_imports={"": opset})
    # Those that every Mark has; onnx's evaluator asks a node for all that are declared.
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in _ATTRIBUTES]
    return ir.Function(MARK_DOMAIN, MARK_OPERATOR, graph=graph, attributes=declared)


_ACTIVE: ContextVar[Marks | None] = ContextVar("marks", default=None)


def mark(
    func_name: str, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None, **attributes: Any
) -> Callable[[Function], Function]:
    """Mark the inputs and outputs of the decorated function, in exports with ``apply_marks=True``.

    In every other call the function is called as it is.

    Args:
        func_name: What the boundary is called: ``detector_forward``.
        inputs: Names of the arguments that hold tensors, in order; the parameters' names if None. The tensors of a
            list, tuple, dict or dataclass are called ``feats.0``, ``aux.k``.
        outputs: Names of what it returns: one name, or one for each part; ``output``, and the parts ``output.0``, if
            None.
        **attributes: Further attributes of the marks: numbers, text, or lists of these.

    Raises:
        ConfigError: When it is called: if there are too few names, or two are the same.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            marks = _ACTIVE.get()
            if marks is None:
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            call = marks.begin(func_name)
            holding = {name: value for name, value in bound.arguments.items() if _holds_tensors(value)}
            names = _checked(func_name, "input", inputs, len(holding)) or list(holding)
            enter = marks.boundary(func_name, call, "input", attributes)
            for parameter, name in zip(holding, names, strict=False):
                bound.arguments[parameter] = enter(name, holding[parameter])
            returned = function(*bound.args, **bound.kwargs)
            leave = marks.boundary(func_name, call, "output", attributes)
            parts = _parts(returned)
            if outputs is None or len(outputs) == 1 or isinstance(returned, torch.Tensor):
                return leave(_checked(func_name, "output", outputs, 1)[0] if outputs else "output", returned)
            chosen = _checked(func_name, "output", outputs, sum(map(_holds_tensors, parts.values())))
            names_of = dict(zip((part for part, value in parts.items() if _holds_tensors(value)), chosen, strict=False))
            return _map_parts(returned, lambda part, value: leave(names_of.get(part, str(part)), value))

        return marked  # type: ignore[return-value]

    return decorate


def mark_tensors(name: str, value: Any) -> Any:
    """Mark a tensor, or every tensor of a structure, and return it; as it is outside an export with marks.

    Args:
        name: Selectors find it as ``name:output``.
        value: A tensor, or lists, tuples, dicts and dataclasses of tensors.
    """
    marks = _ACTIVE.get()
    if marks is None:
        return value
    return marks.boundary(name, marks.begin(name), "output", {})(name, value)


def _checked(func: str, kind: str, names: Sequence[str] | None, wanted: int) -> list[str]:
    chosen = list(names or ())
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"the mark '{func}' has two {kind}s of the same name: {', '.join(chosen)}")
    if names is not None and len(chosen) < wanted:
        raise ConfigError(
            f"the mark '{func}' has {len(chosen)} {kind} names ({', '.join(chosen)}), the call has {wanted} {kind}s",
            hint=f"name all, or leave {kind}s= out",
        )
    return chosen


def _parts(value: Any) -> dict[Any, Any]:
    """Return the parts of a structure by name or number; a structure without parts has none."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def _map_parts(value: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Return a structure of the same kind with other parts; anything that is no structure as it is."""
    if not _holds_tensors(value):
        return value
    parts = {part: function(part, inner) for part, inner in _parts(value).items()}
    if isinstance(value, dict):
        changed = value.copy()
        changed.update(parts)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(**parts)
    if isinstance(value, tuple | list):
        return type(value)(parts.values())
    return dataclasses.replace(value, **parts)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or any(map(_holds_tensors, _parts(value).values()))
