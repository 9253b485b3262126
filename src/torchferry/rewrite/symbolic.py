"""Registering symbolic functions: what an operator or an ``autograd.Function`` becomes in the graph.

A symbolic function is written as for torch's TorchScript-based exporter: it gets ``g`` and the call's values, and
returns what ``g.op(...)`` gave. The exporter runs it where the traced graph has the call.
"""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.onnx._internal.torchscript_exporter import registration

from torchferry.core.errors import ConfigError
from torchferry.rewrite.checkers import as_checkers
from torchferry.rewrite.names import Missing, find
from torchferry.rewrite.registry import DEFAULT, Record, Registry
from torchferry.rewrite.state import STATE, Call, FunctionContext, current_context
from torchferry.rewrite.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
    from typing import TypeVar

    from torchferry.rewrite.checkers import Checker

    Function = TypeVar("Function", bound=Callable[..., Any])

SymbolicTarget = OpOverload | OpOverloadPacket | type[torch.autograd.Function]

DESCRIPTORS = ("v", "i", "is", "f", "fs", "b", "s", "t", "none")
"""What ``arg_descriptors`` may hold: a value; integer, float, or lists of them; bool; text; tensor; left as it is."""


@dataclass(frozen=True, eq=False)
class SymbolicRecord(Record):
    """One registered symbolic function.

    Attributes:
        is_pytorch: The name is that of an ATen operator.
        arg_descriptors: What each argument is turned into before the function is called; None to leave them.
        opset: The earliest opset of the graph that it is valid for; None for any.
        onnx_function: ``domain::Operator`` of the ONNX function that what it builds is put into; None to put it into
            the graph.
    """

    is_pytorch: bool = False
    arg_descriptors: tuple[str, ...] | None = None
    opset: int | None = None
    onnx_function: str | None = None

    @property
    def rank(self) -> tuple[bool | int, ...]:
        """How specific it is; of two for the same target, the one for the later opset."""
        return (*super().rank, self.opset or 0)

    def objection(self, env: Mapping[str, Any]) -> str | None:
        """Return why it does not apply to a target, or None if it does."""
        opset = env.get("opset")
        if self.opset is not None and opset is not None and opset < self.opset:
            return f"for opset {self.opset} and later, not {opset}"
        return super().objection(env)

    def replaces(self, other: Record) -> bool:
        """Tell whether this is the other one registered again."""
        return isinstance(other, SymbolicRecord) and self.opset == other.opset and super().replaces(other)


class SymbolicRewriter(Registry):
    """A registry of symbolic functions.

    >>> symbolics = SymbolicRewriter()
    >>> @symbolics.register_symbolic("asinh", is_pytorch=True)
    ... def asinh(g, x):
    ...     return g.op("Asinh", x)
    >>> symbolics.records()[0].name
    'asinh'
    """

    def register_symbolic(
        self,
        func_name: str,
        backend: str = DEFAULT,
        is_pytorch: bool = False,
        arg_descriptors: Sequence[str] | None = None,
        opset: int | None = None,
        *,
        ir: str = DEFAULT,
        extra_checkers: Checker | Iterable[Checker] | None = None,
        **kwargs: Any,
    ) -> Callable[[Function], Function]:
        """Register the decorated function as the symbolic of an operator; it stays as it is.

        It takes ``g``, then the operator's arguments in the order of its schema; of an ``autograd.Function``, those of
        ``forward`` without its ``ctx``. If its own first parameter is named ``ctx``, the context comes before ``g``.

        Args:
            func_name: An ATen operator (``squeeze`` for all overloads, ``squeeze.dim`` for one), an operator of a
                library (``torchvision::deform_conv2d``), or the dotted name of an ``autograd.Function``.
            backend: The backend that it is for.
            is_pytorch: The name is that of an ATen operator, which a name without dots is in any case.
            arg_descriptors: One of ``DESCRIPTORS`` for each argument after ``g``.
            opset: The earliest opset of the graph for which it is valid.
            ir: The intermediate representation that it is for.
            extra_checkers: Conditions, such as ``LibVersionChecker``; all must hold.
            **kwargs: Further attributes of the context.

        Raises:
            ConfigError: If the name is not text, a descriptor is unknown, the decorated is not callable, or a checker
                is none.
        """
        checkers = as_checkers(extra_checkers)
        descriptors = None if arg_descriptors is None else tuple(arg_descriptors)
        unknown = [d for d in descriptors or () if d not in DESCRIPTORS]
        if unknown:
            raise ConfigError(
                f"the symbolic of '{func_name}' has the unknown argument descriptor '{unknown[0]}'",
                hint=f"use one of {', '.join(DESCRIPTORS)}",
            )

        def register(function: Function) -> Function:
            if not callable(function):
                raise ConfigError(f"the symbolic of '{func_name}' is a {type(function).__name__}, not a function")
            self.add(
                SymbolicRecord(
                    func_name,
                    function,
                    backend,
                    ir,
                    checkers,
                    kwargs=kwargs,
                    is_pytorch=is_pytorch,
                    arg_descriptors=descriptors,
                    opset=opset,
                )
            )
            return function

        return register

    def get_context(self, key: str | None = None) -> FunctionContext:  # noqa: ARG002 - old code gives it
        """Return what the symbolic function is told from which this is called.

        Args:
            key: Not needed: the symbolic function that is running is known.

        Raises:
            ConfigError: If none is running.
        """
        return current_context()


SYMBOLIC_REWRITER = SymbolicRewriter()
"""The registry that is used where none is named."""


def register_op(name: str, fn: Callable[..., Any], domain: str, opset: int) -> None:
    """Register a symbolic function, as ``torch.onnx.symbolic_registry.register_op`` did.

    Args:
        name: The operator's name, such as ``asinh``.
        fn: The symbolic function.
        domain: The operator's namespace in torch; empty for ``aten``.
        opset: The earliest opset for which it is valid.

    Raises:
        ConfigError: If ``fn`` is not callable.
    """
    SYMBOLIC_REWRITER.register_symbolic(f"{domain or 'aten'}::{name}", opset=opset)(fn)


class Symbolic:
    """A symbolic function that an export uses.

    Args:
        name: What it is the symbolic of.
        function: What was registered or written.
        record: What was registered; None for an ``autograd.Function``'s own.
        context: What it is told.

    Attributes:
        tally: The calls that it translates.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        record: SymbolicRecord | None = None,
        context: FunctionContext | None = None,
    ) -> None:
        self.name = name
        self.function = function
        self.arg_descriptors = None if record is None else record.arg_descriptors
        self.takes_context = record is not None and record.takes_context
        self.onnx_function = None if record is None else record.onnx_function
        self.tally = Tally()
        self._context = context

    def __call__(self, g: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the function where ``get_context`` finds its context."""
        if self._context is None:
            return self.function(g, *args, **kwargs)
        first = (self._context,) if self.takes_context else ()
        depth = len(STATE.calls)
        STATE.calls.append(Call(self.name, self._context))
        try:
            return self.function(*first, g, *args, **kwargs)
        finally:
            del STATE.calls[depth:]


def make_symbolic(record: SymbolicRecord, target: SymbolicTarget, attributes: Mapping[str, Any]) -> Symbolic:
    """Return a registered symbolic function at work in a context.

    Args:
        record: What was registered.
        target: What its name leads to.
        attributes: What it is told.
    """
    told = {**record.kwargs, **attributes, "func": record.replacement}
    if isinstance(target, type) and hasattr(target, "symbolic"):
        told["origin_func"] = target.symbolic
    return Symbolic(record.name, record.replacement, record, FunctionContext(**told))


def symbolic_target(record: Record) -> tuple[Hashable, SymbolicTarget] | Missing:
    """Look up the operator or Function that a symbolic function is registered for."""
    assert isinstance(record, SymbolicRecord)
    name = record.name
    if "::" in name:
        namespace, _, operator = name.partition("::")
        return _operator(namespace or "aten", operator)
    if record.is_pytorch or "." not in name or _is_overload(name):
        return _operator("aten", name.removeprefix("aten."))
    found = find(name)
    if isinstance(found, Missing):
        return found
    value = found.value
    if isinstance(value, CustomOpDef):
        value = value._opoverload
    if isinstance(value, OpOverload | OpOverloadPacket):
        return value, value
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        return value, value
    return Missing("it is neither an operator nor a class of torch.autograd.Function")


def torch_records(opset: int) -> tuple[SymbolicRecord, ...]:
    """Return what was registered by ``torch.onnx.register_custom_op_symbolic``, as records of ours.

    Args:
        opset: The opset that the symbolic functions are told.
    """
    records = []
    for name in sorted(registration.registry.all_functions()):
        group: Any = registration.registry.get_function_group(name)
        overrides = group._functions._overrides
        versions = [version for version in overrides if version <= opset]
        if versions:
            records.append(SymbolicRecord(name, overrides[max(versions)]))
    return tuple(records)


def _is_overload(name: str) -> bool:
    """Tell ``squeeze.dim`` from the path of a Function."""
    top, _, rest = name.partition(".")
    return "." not in rest and hasattr(torch.ops.aten, top) and importlib.util.find_spec(top) is None


def _operator(namespace: str, name: str) -> tuple[Hashable, SymbolicTarget] | Missing:
    operator, _, overload = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if not isinstance(packet, OpOverloadPacket):
        names = [schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()]
        known = {known for space, _, known in names if space == namespace}
        if not known:
            return Missing(f"torch knows no operator of '{namespace}'; import its library before exporting")
        near = next(iter(difflib.get_close_matches(operator, known, n=1)), "")
        return Missing(f"'{namespace}' has no operator '{operator}'", suggestion=near)
    if not overload:
        return packet, packet
    overloads: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    if overload not in overloads:
        return Missing(f"'{operator}' has no overload '{overload}'; it has {', '.join(overloads)}", suggestion=operator)
    found = getattr(packet, overload)
    return found, found
