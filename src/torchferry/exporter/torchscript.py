"""Running a symbolic function on a real TorchScript graph, and reading what it built as ONNX.

Symbolic functions were written for torch's TorchScript-based exporter, and call its helpers: ``parse_args``,
``symbolic_helper``, the functions of ``symbolic_opset11`` and its kin. These work on TorchScript's own graph and
values, so that is what a symbolic function gets here: a graph of nothing but the one call.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import _C
from torch.onnx import symbolic_helper
from torch.onnx._internal.torchscript_exporter._globals import GLOBALS
from torch.onnx._internal.torchscript_exporter.jit_utils import GraphContext
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from torchferry.core.errors import OperatorError
from torchferry.graph.validity import make_valid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torchferry.rewrite import Symbolic

_ONNX = _C._onnx.OperatorExportTypes.ONNX
_STANDARD = ("", "ai.onnx")
# Not the attribute of torch.onnx, which is another module.
_SYMBOLIC_OPSET9 = importlib.import_module("torch.onnx.symbolic_opset9")
_CASTS = {
    "Byte": torch.onnx.TensorProtoDataType.UINT8,
    "Char": torch.onnx.TensorProtoDataType.INT8,
    "Double": torch.onnx.TensorProtoDataType.DOUBLE,
    "Float": torch.onnx.TensorProtoDataType.FLOAT,
    "Half": torch.onnx.TensorProtoDataType.FLOAT16,
    "Int": torch.onnx.TensorProtoDataType.INT32,
    "Long": torch.onnx.TensorProtoDataType.INT64,
    "Short": torch.onnx.TensorProtoDataType.INT16,
    "Bool": torch.onnx.TensorProtoDataType.BOOL,
}


@dataclass(frozen=True)
class Slot:
    """Stands among a call's arguments for one of its inputs in the graph.

    Attributes:
        index: Which of the inputs.
    """

    index: int


@dataclass(frozen=True)
class ValueType:
    """What is known of a value.

    Attributes:
        dtype: None if unknown.
        shape: Sizes, or names where they are dynamic; None if the rank is unknown.
    """

    dtype: torch.dtype | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Fragment:
    """What a symbolic function built.

    Attributes:
        model: A valid graph whose inputs are the call's, in order; typed as far as ONNX can tell.
        is_tuple: Whether the function returned several values rather than one.
        is_given: For each value that it returned, whether it is an output; else it was None.
    """

    model: onnx.ModelProto
    is_tuple: bool
    is_given: tuple[bool, ...]


class _Context(GraphContext):
    """What a symbolic function gets as ``g``."""

    def op(self, opname: str, *raw_args: Any, outputs: int = 1, **kwargs: Any) -> Any:
        """Add a node."""
        try:
            return super().op(opname, *raw_args, outputs=outputs, **kwargs)
        except RuntimeError:
            # TorchScript may fail to infer the sizes that a node of another opset gives; it need not.
            GLOBALS.onnx_shape_inference = False
            try:
                return super().op(opname, *raw_args, outputs=outputs, **kwargs)
            finally:
                GLOBALS.onnx_shape_inference = True


def run_symbolic(
    symbolic: Symbolic,
    args: Sequence[Any],
    inputs: Sequence[ValueType],
    opset: int,
    graph_opset: int,
    *,
    constants_as_values: bool,
    optional: int = 0,
) -> Fragment:
    """Run a symbolic function.

    Args:
        symbolic: The function.
        args: The call's arguments, a ``Slot`` in the place of each tensor and each size known only while running.
        inputs: The types of these, in order of their slots.
        opset: What the function is told.
        graph_opset: That of the graph, for which the nodes are made valid.
        constants_as_values: Hand constants over as values of the graph, as for an operator; an ``autograd.Function``'s
            symbolic gets them as they are.
        optional: How many of the last arguments may be left out if the function does not take them.

    Raises:
        OperatorError: If the function fails, or gives something that is no ONNX.
    """
    # What torch noted of the values of an earlier graph, by their names, would be taken for ours; this forgets it.
    _C._jit_pass_onnx_graph_shape_type_inference(_C.Graph(), {}, opset)
    graph = _C.Graph()
    values = [_add_input(graph, f"input_{index}", given) for index, given in enumerate(inputs)]
    context = _Context(
        graph=graph,
        block=graph.block(),
        opset=opset,
        original_node=graph.return_node(),
        params_dict={},
        env={},
        values_in_env=set(),
    )
    place = _place(symbolic.function)
    with _exporting(opset):
        prepare = functools.partial(_as_value, context) if constants_as_values else _keep
        filled = [_fill(arg, values, prepare) for arg in args]
        try:
            returned = _parsed(symbolic)(context, *filled[: _accepted(symbolic, len(filled), optional)])
        except OperatorError:
            raise
        except Exception as exc:
            raise OperatorError(
                f"the symbolic of '{symbolic.name}' fails: {type(exc).__name__}: {exc}", hint=f"it stands at {place}"
            ) from exc
        returned, is_tuple, is_given = _returned(context, returned, symbolic, place)
        for value in returned:
            graph.registerOutput(value)
        model = _as_onnx(graph, opset, symbolic, place)
    for value, known in zip(model.graph.input, inputs, strict=True):
        _name_sizes(value, known)
    _forget_types(model.graph)
    valid = make_valid(model, graph_opset)
    return Fragment(onnx.shape_inference.infer_shapes(valid, data_prop=True), is_tuple, is_given)


def _as_onnx(graph: Any, opset: int, symbolic: Symbolic, place: str) -> onnx.ModelProto:
    """Finish a graph as the old exporter did, and write it as ONNX."""
    try:
        _C._jit_pass_onnx_scalar_type_analysis(graph, True, opset)
        _C._jit_pass_onnx_peephole(graph, opset, False)
        _C._jit_pass_dce_allow_deleting_nodes_with_side_effects(graph)
        proto = graph._export_onnx({}, opset, {}, False, _ONNX, True, True, {}, True, "", {})[0]
    except Exception as exc:
        reason = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
        raise OperatorError(
            f"the symbolic of '{symbolic.name}' gives something that is not ONNX: {reason}",
            hint=f"it stands at {place}",
        ) from exc
    return onnx.load_from_string(proto)


@contextmanager
def _exporting(opset: int) -> Iterator[None]:
    """Let torch's helpers believe that its TorchScript-based exporter is at work."""
    before = GLOBALS.export_onnx_opset_version, GLOBALS.in_onnx_export, GLOBALS.operator_export_type
    GLOBALS.export_onnx_opset_version, GLOBALS.in_onnx_export, GLOBALS.operator_export_type = opset, True, _ONNX
    try:
        with (
            _disable_current_modes(),
            _C.DisableTorchFunction(),
            _old_names(),
        ):  # it makes real tensors, even while torch.export traces
            yield
    finally:
        GLOBALS.export_onnx_opset_version, GLOBALS.in_onnx_export, GLOBALS.operator_export_type = before


@contextmanager
def _old_names() -> Iterator[None]:
    """Put back inside the block what old symbolic functions use and torch has dropped."""
    old: list[tuple[Any, str, Any]] = [(_C.Node, "__getitem__", symbolic_helper._node_get)]
    old += [(_SYMBOLIC_OPSET9, f"_cast_{name}", functools.partial(_cast, to)) for name, to in _CASTS.items()]
    added = [(owner, name, value) for owner, name, value in old if not hasattr(owner, name)]
    try:
        for owner, name, value in added:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, _ in added:
            delattr(owner, name)


def _cast(to: torch.onnx.TensorProtoDataType, g: Any, value: Any, non_blocking: Any = None) -> Any:  # noqa: ARG001
    return g.op("Cast", value, to_i=to)


def _add_input(graph: Any, name: str, given: ValueType) -> Any:
    value = graph.addInput(name)
    kind: Any = _C.TensorType.get()
    if given.shape is not None and given.dtype is not None:
        kind = _C.TensorType.create_from_tensor(torch.empty([1] * len(given.shape), dtype=given.dtype))
        kind = kind.with_sizes([size if isinstance(size, int) else None for size in given.shape])
    elif given.dtype is not None:
        kind = kind.with_dtype(given.dtype)
    value.setType(kind)
    return value


def _name_sizes(value: onnx.ValueInfoProto, given: ValueType) -> None:
    """Give dynamic sizes the names that they have in the graph, in place of TorchScript's."""
    if given.shape is None:
        return
    for dim, size in zip(value.type.tensor_type.shape.dim, given.shape, strict=True):
        if isinstance(size, str):
            dim.dim_param = size
        elif size is None:
            dim.Clear()


def _forget_types(graph: onnx.GraphProto) -> None:
    """Drop the types that TorchScript inferred, for its sizes may be wrong; keep those of others' operators.

    The author gives the latter, by ``setType``, and nothing else could.
    """
    given = {name for node in graph.node if node.domain not in _STANDARD for name in node.output}
    for value in graph.output:
        if value.name not in given:
            value.ClearField("type")
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    kept = [value for value in graph.value_info if value.name in given]
    graph.ClearField("value_info")
    graph.value_info.extend(kept)


def _fill(arg: Any, values: Sequence[Any], constant: Callable[[Any], Any]) -> Any:
    """Put values in the place of slots, and constants in the form that the function expects."""
    if isinstance(arg, Slot):
        return values[arg.index]
    if not pytree.tree_any(lambda leaf: isinstance(leaf, Slot), arg):
        return constant(arg)
    if isinstance(arg, list | tuple):
        return constant([_fill(item, values, constant) for item in arg])
    return pytree.tree_map(lambda leaf: _fill(leaf, values, constant), arg)


def _keep(arg: Any) -> Any:
    return arg


def _as_value(context: GraphContext, arg: Any) -> Any:
    """Return a constant of an operator's call as TorchScript has it."""
    if isinstance(arg, _C.Value):
        return arg
    if arg is None:
        node = context.graph.insertNode(context.graph.create("prim::Constant", [], 1))
        node.output().setType(_C.NoneType.get())
        return node.output()
    if isinstance(arg, list | tuple):
        if all(isinstance(item, bool | int | float) for item in arg):  # TorchScript folds these into one constant
            dtype = torch.float64 if any(isinstance(item, float) for item in arg) else None
            return context.op("Constant", value_t=torch.tensor(arg, dtype=dtype if arg else torch.int64))
        items = [_as_value(context, item) for item in arg]
        node = context.graph.insertNode(context.graph.create("prim::ListConstruct", items, 1))
        scalar: Any = _C.IntType.get()
        if items and isinstance(arg[0], _C.Value) and _rank(arg[0]) != 0:
            scalar = _C.TensorType.get()
        elif items and isinstance(arg[0], float):
            scalar = _C.FloatType.get()
        node.output().setType(_C.ListType(scalar))
        return node.output()
    if isinstance(arg, str):
        return context.op("Constant", value_s=arg)
    if isinstance(arg, torch.dtype):
        arg = symbolic_helper._type_utils.JitScalarType.from_dtype(arg).value  # type: ignore[attr-defined]
    if isinstance(arg, torch.layout | torch.memory_format | torch.device | torch.Generator):
        return _as_value(context, None)  # TorchScript has them as numbers that no symbolic function reads
    return context.op("Constant", value_t=torch.as_tensor(arg, dtype=torch.float64 if isinstance(arg, float) else None))


def _rank(value: Any) -> int | None:
    rank: int | None = value.type().dim()
    return rank


def _parsed(symbolic: Symbolic) -> Callable[..., Any]:
    """Return the function, its arguments parsed as its descriptors say."""
    if symbolic.arg_descriptors is None:
        return symbolic

    def call(g: Any, *args: Any, **kwargs: Any) -> Any:
        return symbolic(g, *args, **kwargs)

    functools.update_wrapper(call, symbolic.function)
    # parse_args takes as many arguments as it finds names for.
    names = [f"argument_{index}" for index in range(len(symbolic.arg_descriptors))]
    named = [n for n, p in _parameters(symbolic).items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    names[: len(named)] = named[: len(names)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("g", *names)])  # type: ignore[attr-defined]
    parse: Any = symbolic_helper.parse_args
    parsed: Callable[..., Any] = parse(*symbolic.arg_descriptors)(call)
    return parsed


def _parameters(symbolic: Symbolic) -> dict[str, inspect.Parameter]:
    """Return the parameters from ``g`` on."""
    try:
        parameters = dict(inspect.signature(symbolic.function).parameters)
    except (TypeError, ValueError):  # written in C
        return {}
    if symbolic.takes_context:
        parameters.pop("ctx")
    return parameters


def _accepted(symbolic: Symbolic, given: int, optional: int) -> int:
    """Return how many of the arguments to hand over: the last may be ones that the author did not know of."""
    parameters = _parameters(symbolic).values()
    limits = [given]
    if parameters and all(p.kind is not p.VAR_POSITIONAL for p in parameters):
        limits.append(sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) - 1)
    if symbolic.arg_descriptors is not None:
        limits.append(len(symbolic.arg_descriptors))
    return max(min(limits), given - optional)


def _returned(
    context: GraphContext, returned: Any, symbolic: Symbolic, place: str
) -> tuple[list[Any], bool, tuple[bool, ...]]:
    is_tuple = isinstance(returned, list | tuple)
    values = list(returned) if is_tuple else [returned]
    if is_tuple is False and isinstance(returned, _C.Value) and returned.node().kind() == "prim::ListConstruct":
        values, is_tuple = list(returned.node().inputs()), True
    is_given = tuple(value is not None or not is_tuple for value in values)
    values = [value for value, given in zip(values, is_given, strict=True) if given]
    for value in values:
        if not isinstance(value, _C.Value):
            raise OperatorError(
                f"the symbolic of '{symbolic.name}' returns {type(value).__name__}, not what g.op(...) gives",
                hint=f"it stands at {place}",
            )
    # An input that is returned as it is, or a value that is returned twice, needs a node of its own.
    seen: set[Any] = set(context.graph.inputs())
    for index, value in enumerate(values):
        if value in seen:
            values[index] = context.op("Identity", value)
        seen.add(value)
    return values, is_tuple, is_given


def _place(function: Any) -> str:
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else str(getattr(function, "__module__", "?"))
