"""One specification of an operator, from which torch, the graph and the engines all learn it."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch.onnx import symbolic_helper

from torchferry.core.errors import ConfigError, OperatorError
from torchferry.core.kernels import AttributeType, Kernel, register_kernel
from torchferry.exporter.functions import FunctionCall, UnseenError, slots
from torchferry.rewrite import SYMBOLIC_REWRITER, Symbolic
from torchferry.rewrite.symbolic import SymbolicRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DESCRIPTORS = {"int": "i", "SymInt": "i", "float": "f", "number": "f", "bool": "b", "str": "s"}
_LISTS = {"int": "is", "SymInt": "is", "float": "fs"}
_KINDS: dict[str, AttributeType] = {"i": "int", "b": "int", "f": "float", "s": "string"}
_ONNX_ATTRIBUTES = {
    "i": onnx.defs.OpSchema.AttrType.INT,
    "b": onnx.defs.OpSchema.AttrType.INT,
    "f": onnx.defs.OpSchema.AttrType.FLOAT,
    "s": onnx.defs.OpSchema.AttrType.STRING,
    "is": onnx.defs.OpSchema.AttrType.INTS,
    "fs": onnx.defs.OpSchema.AttrType.FLOATS,
}
_SUFFIXES = {"i": "i", "b": "i", "f": "f", "s": "s", "is": "i", "fs": "f"}  # of attributes, in g.op
_TENSOR_TYPES = sorted(onnx.defs.get_schema("Shape").type_constraints[0].allowed_type_strs)  # of any tensor
_OPSETS = (18, 18)  # for what a symbolic's result has for sizes, which does not depend on it


class CustomOp:
    """An operator of one's own; calling it calls torch's.

    Attributes:
        name: ``namespace::operator``, as torch has it.
        node: ``domain::Operator``, as the graph has it where the operator has no nodes of ONNX.
        overload: torch's operator.
        schema: The node's schema in ONNX, for those who write an engine's kernel. It is not registered with onnx, whose
            type inference would lose the types of an operator that it cannot infer.
    """

    def __init__(self, name: str, node: str, definition: Any, schema: onnx.defs.OpSchema) -> None:
        self.name = name
        self.node = node
        self.schema = schema
        self._definition = definition
        self.overload: torch._ops.OpOverload = definition._opoverload
        functools.update_wrapper(self, definition._init_fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator."""
        return self._definition(*args, **kwargs)

    def __repr__(self) -> str:
        return f"CustomOp({self.overload._schema}, node {self.node})"

    def opcheck(self, *args: Any, **kwargs: Any) -> None:
        """Let torch check the operator on a call: schema, fake results, tracing.

        Raises:
            torch.testing._internal.optests.generate_tests.OpCheckError: If something is wrong with it.
        """
        # Gradients are no business of an export.
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(self.overload, args, kwargs, test_utils=tests)


@dataclass(frozen=True)
class _Argument:
    """One argument of the operator.

    Attributes:
        name: Its name.
        descriptor: As in ``arg_descriptors``; ``v`` for tensors.
        is_list: It is a list.
        is_optional: It may be None.
    """

    name: str
    descriptor: str
    is_list: bool = False
    is_optional: bool = False


def custom_op(
    name: str,
    *,
    symbolic: Callable[..., Any] | None = None,
    composition: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
    kernel_dtypes: tuple[Sequence[str], Sequence[str]] | None = None,
    domain: str | None = None,
    onnx_name: str | None = None,
) -> Callable[[Callable[..., Any]], CustomOp]:
    """Define an operator by the decorated function, which is what it computes in PyTorch.

    The function's annotations give its schema, as for ``torch.library.custom_op``; it may call a C++ extension. It must
    return new tensors and leave its arguments alone. In the graph a call becomes, by what is given:

    - ``symbolic``: the nodes that this symbolic function builds;
    - ``composition``: one node ``domain::Operator`` with an ONNX function of that name beside the graph, whose body is
      what this symbolic function builds in operators of ONNX; engines that do not know the operator put it in;
    - neither: one node ``domain::Operator`` with the tensors as inputs and all else as attributes, for an engine that
      knows it or finds ``kernel``.

    Args:
        name: ``namespace::operator``.
        symbolic: Takes ``g``, then the arguments: tensors as values, all else as Python has it.
        composition: Likewise.
        fake: What the operator gives for fake tensors, as for ``torch.library.register_fake``. If None, the function
            itself is run on them; where that fails, ONNX infers the sizes from what the symbolic function builds.
        kernel: Computes the operator with numpy, in an engine that can call Python: takes the tensors as arrays and
            all else as keywords. There may then be neither lists nor tensors that can be left out.
        kernel_dtypes: The dtypes of its inputs and of its outputs; all float32 if None.
        domain: Of the node; the namespace if None.
        onnx_name: Of the node; the operator's name in capitals if None: ``MyAdd`` for ``my_add``.

    Returns:
        A decorator that gives a ``CustomOp``.

    Raises:
        ConfigError: If the name has no namespace, both ``symbolic`` and ``composition`` are given, or the function's
            annotations make no schema.
    """
    namespace, _, operator = name.partition("::")
    if not namespace or not operator:
        raise ConfigError(f"the operator '{name}' has no namespace", hint="name it 'namespace::operator'")
    if symbolic is not None and composition is not None:
        raise ConfigError(f"the operator '{name}' has a symbolic and a composition", hint="give one of them")
    node = f"{domain or namespace}::{onnx_name or ''.join(map(str.capitalize, operator.split('_')))}"

    def define(function: Callable[..., Any]) -> CustomOp:
        try:
            definition = torch.library.custom_op(name, function, mutates_args=())
        except ValueError as exc:
            raise ConfigError(f"the operator '{name}' has no schema: {exc}", hint="annotate its arguments") from exc
        schema = definition._opoverload._schema
        arguments = [_argument(name, argument) for argument in schema.arguments]
        build = symbolic or composition or _as_node(node, arguments, len(schema.returns))
        SYMBOLIC_REWRITER.add(
            SymbolicRecord(
                name,
                build,
                arg_descriptors=tuple(argument.descriptor for argument in arguments),
                onnx_function=node if composition else None,
            )
        )
        definition.register_fake(fake or _derived_fake(function, Symbolic(name, build)))
        if kernel is not None:
            register_kernel(_kernel(node, kernel, kernel_dtypes, arguments, len(schema.returns)))
        doc = inspect.getdoc(function) or ""
        # A composition has the values of attributes in its body.
        shown = [argument for argument in arguments if argument.descriptor == "v" or not composition]
        return CustomOp(name, node, definition, _onnx_schema(node, shown, len(schema.returns), doc))

    return define


def _derived_fake(function: Callable[..., Any], symbolic: Symbolic) -> Callable[..., Any]:
    signature = inspect.signature(function)

    def fake(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs, slotted = slots(tuple(bound.arguments.values()))

        def run(*values: Any) -> Any:
            return function(**dict(zip(bound.arguments, values, strict=True)))

        call = FunctionCall(run, symbolic, slotted, _OPSETS, can_be_seen=False)
        try:
            outputs = call.fake_outputs(inputs)
        except UnseenError as exc:
            raise OperatorError(
                f"what '{symbolic.name}' gives is not known before it is run: {exc}", hint="give custom_op a fake="
            ) from exc
        return call.arranged(outputs)

    return fake


def _kernel(
    node: str,
    function: Callable[..., Any],
    dtypes: tuple[Sequence[str], Sequence[str]] | None,
    arguments: Sequence[_Argument],
    returns: int,
) -> Kernel:
    tensors = [argument for argument in arguments if argument.descriptor == "v"]
    attributes: dict[str, AttributeType] = {}
    for argument in arguments:
        if argument.is_list or (argument.is_optional and argument.descriptor == "v"):
            what = "a list" if argument.is_list else "a tensor that may be left out"
            raise ConfigError(
                f"the kernel of '{node}' cannot take '{argument.name}', {what}: no engine has such kernels"
            )
        if argument.descriptor != "v":
            attributes[argument.name] = _KINDS[argument.descriptor]
    inputs, outputs = dtypes or (["float32"] * len(tensors), ["float32"] * returns)
    if (len(inputs), len(outputs)) != (len(tensors), returns):
        raise ConfigError(
            f"the kernel of '{node}' has dtypes for {len(inputs)} inputs and {len(outputs)} outputs, "
            f"the operator has {len(tensors)} and {returns}"
        )
    return Kernel(node, function, tuple(inputs), tuple(outputs), attributes)


def _onnx_schema(node: str, arguments: Sequence[_Argument], returns: int, doc: str) -> onnx.defs.OpSchema:
    """Return what the node looks like."""
    domain, _, operator = node.partition("::")
    parameter, option = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption
    inputs, constraints = [], []
    for argument in (a for a in arguments if a.descriptor == "v"):
        kind = option.Variadic if argument.is_list else option.Optional if argument.is_optional else option.Single
        inputs.append(parameter(argument.name, f"T_{argument.name}", param_option=kind))
        constraints.append((f"T_{argument.name}", _TENSOR_TYPES, ""))
    outputs = [parameter(f"output_{index}", f"T_output_{index}") for index in range(returns)]
    constraints += [(output.type_str, _TENSOR_TYPES, "") for output in outputs]
    attributes = [
        onnx.defs.OpSchema.Attribute(a.name, _ONNX_ATTRIBUTES[a.descriptor], "", required=not a.is_optional)
        for a in arguments
        if a.descriptor != "v"
    ]
    return onnx.defs.OpSchema(
        operator, domain, 1, doc, inputs=inputs, outputs=outputs, type_constraints=constraints, attributes=attributes
    )


def _argument(name: str, argument: Any) -> _Argument:
    kind = argument.type
    is_optional = isinstance(kind, torch.OptionalType)
    if is_optional:
        kind = kind.getElementType()
    is_list = isinstance(kind, torch.ListType)
    element = str(kind.getElementType() if is_list else kind)
    if element == "Tensor":
        return _Argument(argument.name, "v", is_list, is_optional)
    descriptor = (_LISTS if is_list else _DESCRIPTORS).get(element)
    if descriptor is None:
        raise ConfigError(f"the argument '{argument.name}' of operator '{name}' is a {kind}, which no node can have")
    return _Argument(argument.name, descriptor, is_list, is_optional)


def _as_node(node: str, arguments: Sequence[_Argument], returns: int) -> Callable[..., Any]:
    """Return the symbolic function that builds the operator's own node."""

    def symbolic(g: Any, *values: Any) -> Any:
        inputs: list[Any] = []
        attributes: dict[str, Any] = {}
        for argument, value in zip(arguments, values, strict=True):
            if argument.descriptor != "v":
                attributes[f"{argument.name}_{_SUFFIXES[argument.descriptor]}"] = value
            elif argument.is_list:
                inputs += value if isinstance(value, list | tuple) else symbolic_helper._unpack_list(value)
            else:
                inputs.append(None if symbolic_helper._is_none(value) else value)
        while inputs and inputs[-1] is None:
            inputs.pop()
        return g.op(node, *inputs, outputs=returns, **attributes)

    return symbolic
