"""Calls of ``autograd.Function``s that have a symbolic, put into the traced graph whole.

The class's ``forward`` is not traced: one operator of our own stands for the call. What it gives has the dtype and
sizes that ``forward`` gives on fake tensors; where that fails, those that ONNX infers from what the symbolic builds;
where that knows nothing, those that ``forward`` has when it runs for real at several sizes; else dynamic sizes, of the
rank and dtype that the model has on its example.
"""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import trace_rules
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.sym_node import SymNode
from torch.utils import _pytree as pytree

from torchferry.core.errors import OperatorError
from torchferry.exporter.measured import measured_sizes
from torchferry.exporter.torchscript import Slot, ValueType, run_symbolic
from torchferry.rewrite import Symbolic
from torchferry.rewrite.patching import function_patch
from torchferry.rewrite.state import CALLS, STATE, quietly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import onnx

    from torchferry.rewrite.symbolic import SymbolicTarget

_APPLY = function_patch(torch.autograd.Function.apply.__func__)  # type: ignore[attr-defined]
_CALLS: dict[int, FunctionCall] = {}
_numbers = itertools.count()

_LIBRARY: Any = torch.library.Library("torchferry", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("function(Tensor?[] tensors, SymInt[] sizes, int call) -> Tensor[]")
FUNCTION = torch.ops.torchferry.function.default


@dataclass(frozen=True)
class Seen:
    """One call of an ``autograd.Function`` in the model's run on its example.

    Attributes:
        tensors: Its tensor arguments.
        types: What it gave.
    """

    tensors: list[torch.Tensor]
    types: list[ValueType]


@dataclass
class FunctionCall:
    """One call of an ``autograd.Function`` in the traced graph.

    Attributes:
        run: Calls the class's forward; or what computes an operator.
        symbolic: What it becomes.
        args: The arguments, each tensor and each dynamic size replaced by a ``Slot``.
        opsets: What the symbolic is told, and that of the graph.
        seen: The same call in the model's run on its example; None if that was not watched.
        can_be_seen: Whether the model may be run on its example to learn what it cannot be learnt otherwise.
        source: Where the results' dtype and sizes come from, in words; empty until they were asked for.
        is_measured: Whether some of the sizes are only what was seen.
        structure: How the results were returned.
    """

    run: Callable[..., Any]
    symbolic: Symbolic
    args: tuple[Any, ...]
    opsets: tuple[int, int]
    seen: Seen | None = None
    can_be_seen: bool = True
    source: str = ""
    is_measured: bool = False
    structure: Any = field(default=None, repr=False)
    _before: tuple[list[list[Any]], list[torch.dtype | None]] | None = field(default=None, repr=False)

    def forward(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Run it."""
        result = self.run(*fill(self.args, inputs))
        leaves, spec = pytree.tree_flatten(result, is_leaf=lambda leaf: leaf is None)
        self.structure = spec, [isinstance(leaf, torch.Tensor) for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def arranged(self, outputs: Sequence[torch.Tensor]) -> Any:
        """Return the results as forward would."""
        spec, is_tensor = self.structure
        remaining = iter(outputs)
        return pytree.tree_unflatten([next(remaining) if tensor else None for tensor in is_tensor], spec)

    def fake_outputs(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Return fake results for fake inputs."""
        try:
            return self._by_forward(inputs)
        except Exception as exc:  # noqa: BLE001 - forward may do anything that fake tensors cannot
            if self._before is not None:  # torch.export has traced, now torch.onnx decomposes
                return _empty(*self._before, inputs)
            reason = str(exc).strip().splitlines()
            refused = f"forward does not run on fake tensors: {reason[0] if reason else type(exc).__name__}"
        types_in = [_value_type(value) for value in inputs]
        fragment = run_symbolic(self.symbolic, self.args, types_in, *self.opsets, constants_as_values=False)
        types = [_inferred_type(value) for value in fragment.model.graph.output]
        self.source = f"ONNX shape inference, for {refused}"
        leaves = [0] * len(types)
        self.structure = pytree.tree_flatten(tuple(leaves) if fragment.is_tuple else 0)[1], [True] * len(types)
        known = {str(size): size for value in inputs for size in _sizes(value) if not isinstance(size, int)}
        shapes = [
            None if t.shape is None else [n if isinstance(n, int) else known.get(str(n)) for n in t.shape]
            for t in types
        ]
        dtypes = [t.dtype for t in types]
        is_ranked = None not in dtypes and None not in shapes
        is_complete = is_ranked and not any(None in (shape or ()) for shape in shapes)
        if not is_complete and self.seen is None and (self.can_be_seen or not is_ranked):
            raise UnseenError(self.symbolic.name)
        if not is_complete and self.seen is not None:
            dtypes = [dtype or seen.dtype for dtype, seen in zip(dtypes, self.seen.types, strict=False)]
            sizes = measured_sizes(self.forward, inputs, self.seen.tensors)
            if sizes is None:
                sizes = [[None] * len(seen.shape or ()) for seen in self.seen.types]
                self.source = f"unknown sizes of the rank and dtype that the example has, for {refused}"
            else:
                self.source = f"forward run for real at several sizes, for {refused}"
                self.is_measured = True
            shapes = [_completed(shape, own) for shape, own in zip(shapes, sizes, strict=False)]
        self._before = [shape or [] for shape in shapes], dtypes
        return _empty(*self._before, inputs)

    def _by_forward(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
        with _numbers_read(mode), _sizes_read_refused():
            outputs, again = quietly(self.forward)(inputs), quietly(self.forward)(inputs)
        self.source = "forward on fake tensors"
        known: set[Any] = set()
        for value in inputs:
            known.update(*(size.node.expr.free_symbols for size in _sizes(value) if not isinstance(size, int)))
        sizes = [
            [n if _is_known(n, other, known) else None for n, other in zip(output.shape, second.shape, strict=True)]
            for output, second in zip(outputs, again, strict=True)
        ]
        self._before = sizes, [output.dtype for output in outputs]
        return _empty(*self._before, inputs)


@contextmanager
def _numbers_read(mode: FakeTensorMode | None) -> Iterator[None]:
    """Let the code inside read numbers out of fake tensors, such as by ``tolist``; they are unknown symbols."""
    if mode is None or mode.shape_env is None:
        yield
        return
    before, mode.allow_scalar_outputs = mode.allow_scalar_outputs, True
    try:
        with mode.shape_env.ignore_fresh_unbacked_symbols():
            yield
    finally:
        mode.allow_scalar_outputs = before


@contextmanager
def _sizes_read_refused() -> Iterator[None]:
    """Let ``int(size)`` fail inside the block where it would fix a dynamic size to the example's."""
    before = SymNode.guard_int

    def guard_int(self: Any, file: str, line: int) -> int:
        if self.expr.free_symbols and self.hint is not None:
            raise TypeError("it reads a dynamic size as a number")
        return before(self, file, line)

    SymNode.guard_int = guard_int  # type: ignore[method-assign]
    try:
        yield
    finally:
        SymNode.guard_int = before  # type: ignore[method-assign]


class UnseenError(Exception):
    """What a Function returns can be known only by running the model on its example."""


class Functions:
    """Puts the calls of ``autograd.Function``s into the graph that is being traced, in this thread.

    Args:
        chosen: The symbolic functions that are registered.
        opsets: What they are told, and that of the graph.

    Attributes:
        calls: Those that stand in the graph, by number.
        is_unseen: Whether tracing failed for want of ``watching``.
    """

    def __init__(self, chosen: Mapping[SymbolicTarget, Symbolic], opsets: tuple[int, int]) -> None:
        self.calls: dict[int, FunctionCall] = {}
        self.is_unseen = False
        self._registered = {cls: symbolic for cls, symbolic in chosen.items() if isinstance(cls, type)}
        self._opsets = opsets
        self._symbolics: dict[type, Symbolic | None] = {}
        self._seen: dict[type, list[Seen]] | None = None
        self._count: dict[type, int] = {}

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the calls inside the block, which stands in a ``RewriterContext``."""
        key = f"functions {next(_numbers)}"
        active = STATE.active
        assert active is not None  # a context is entered
        allowed = [cls for cls in _subclasses(torch.autograd.Function) if self.symbolic(cls) is not None]
        own = [cls for cls in allowed if not trace_rules.is_callable_allowed(cls)]
        CALLS[key] = self._apply
        active.take(_APPLY.key, key)
        self._count.clear()
        try:
            for cls in own:
                trace_rules._allowed_callable_ids.add(id(cls))  # Dynamo, which traces branches, calls it then
            _APPLY.hold(self)
            yield
        finally:
            _APPLY.release(self)
            for cls in own:
                trace_rules._allowed_callable_ids.remove(id(cls))
            CALLS.pop(key)

    def close(self) -> None:
        """Forget the calls; the graph that they stand in can then be translated no more."""
        for number in self.calls:
            _CALLS.pop(number, None)
        self.calls.clear()

    def symbolic(self, cls: type) -> Symbolic | None:
        """Return what a class of Function becomes; None if it is to be traced."""
        if cls not in self._symbolics:
            name = f"{cls.__module__}.{cls.__qualname__}"
            registered = next((self._registered[base] for base in cls.__mro__ if base in self._registered), None)
            own = getattr(cls, "symbolic", None)
            self._symbolics[cls] = registered or (Symbolic(name, own) if callable(own) else None)
        return self._symbolics[cls]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what the Functions give that are called inside the block, for real."""
        self._seen, self.is_unseen = {}, False
        with self.taken():
            yield

    def _apply(self, cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        symbolic = self.symbolic(cls)
        if symbolic is None or kwargs or STATE.quiet:
            return _APPLY.origin()(cls, *args, **kwargs)
        if not torch.compiler.is_exporting():
            result = _APPLY.origin()(cls, *args)
            if self._seen is not None:
                given, gave = (
                    [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
                    for tree in (args, result)
                )
                self._seen.setdefault(cls, []).append(Seen(given, [_value_type(tensor) for tensor in gave]))
            return result
        return self._recorded(cls, symbolic, args)

    def _recorded(self, cls: type[torch.autograd.Function], symbolic: Symbolic, args: tuple[Any, ...]) -> Any:
        inputs, slotted = slots(args)
        if any(isinstance(leaf, torch.SymFloat | torch.SymBool) for leaf in pytree.tree_leaves(slotted)):
            raise OperatorError(
                f"'{symbolic.name}' is called with a number known only while running",
                hint="hand it over as a tensor",
            )
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        ordinal = self._count.get(cls, 0)
        self._count[cls] = ordinal + 1
        call = FunctionCall(functools.partial(_APPLY.origin(), cls), symbolic, slotted, self._opsets)
        if self._seen is not None and ordinal < len(self._seen.get(cls, ())):
            call.seen = self._seen[cls][ordinal]
        number_ = next(_numbers)
        self.calls[number_] = _CALLS[number_] = call
        try:
            outputs = FUNCTION(tensors, inputs[len(tensors) :], number_)
        except UnseenError:
            self.is_unseen = True
            raise
        return call.arranged(outputs)


def slots(args: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...]]:
    """Return the tensors among a call's arguments, then the dynamic sizes; and the arguments with slots for these."""
    leaves, spec = pytree.tree_flatten(args, is_leaf=lambda leaf: leaf is None)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
    tensor_slots, size_slots = map(Slot, itertools.count()), map(Slot, itertools.count(len(tensors)))
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[index] = next(tensor_slots)
        elif isinstance(leaf, torch.SymInt):
            leaves[index] = next(size_slots)
    return [*tensors, *sizes], pytree.tree_unflatten(leaves, spec)


def fill(args: Any, inputs: Sequence[Any]) -> Any:
    """Put the inputs in the places of their slots."""
    return pytree.tree_map(lambda leaf: inputs[leaf.index] if isinstance(leaf, Slot) else leaf, args)


@torch.library.impl(_LIBRARY, "function", "CompositeExplicitAutograd")
def _real(tensors: Sequence[Any], sizes: Sequence[int], call: int) -> list[torch.Tensor]:
    return _CALLS[call].forward([*tensors, *sizes])


@torch.library.register_fake("torchferry::function", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(tensors: Sequence[Any], sizes: Sequence[Any], call: int) -> list[torch.Tensor]:
    return _CALLS[call].fake_outputs([*tensors, *sizes])


def _subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for sub in subclasses:
        yield sub
        yield from _subclasses(sub)


def _sizes(value: Any) -> Sequence[Any]:
    return value.shape if isinstance(value, torch.Tensor) else (value,)


def _is_known(size: Any, again: Any, known: set[Any]) -> bool:
    """Tell whether a size follows from the inputs' sizes, rather than from the data or from chance."""
    if isinstance(size, int):
        return isinstance(again, int) and size == again
    return bool(size.node.expr.free_symbols <= known)


def _empty(
    sizes: Sequence[Sequence[Any]], dtypes: Sequence[torch.dtype | None], inputs: Sequence[Any]
) -> list[torch.Tensor]:
    """Return fake tensors of some sizes, a new dynamic one for each that is None."""
    device = next((value.device for value in inputs if isinstance(value, torch.Tensor)), torch.device("cpu"))
    context = torch.library.get_ctx()
    return [
        torch.empty([context.new_dynamic_size() if n is None else n for n in shape], dtype=dtype, device=device)
        for shape, dtype in zip(sizes, dtypes, strict=True)
    ]


def _value_type(value: Any) -> ValueType:
    if not isinstance(value, torch.Tensor):
        return ValueType(torch.int64, ())
    return ValueType(value.dtype, tuple(size if isinstance(size, int) else str(size) for size in value.shape))


def _inferred_type(value: onnx.ValueInfoProto) -> ValueType:
    tensor = value.type.tensor_type
    dtype = torch.onnx.ops._dtype_mappings.ONNX_DTYPE_TO_TORCH_DTYPE.get(tensor.elem_type)
    if not tensor.HasField("shape"):
        return ValueType(dtype, None)
    sizes = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return ValueType(dtype, tuple(sizes))


def _completed(inferred: list[Any] | None, measured: list[Any]) -> list[Any]:
    """Complete the sizes that ONNX infers by those that were measured."""
    if inferred is None or len(inferred) != len(measured):
        return measured
    return [own if size is None else size for size, own in zip(inferred, measured, strict=True)]
