"""Symbolic functions at work: their operators stay whole while the graph is made, then each is replaced by its nodes.

torch.onnx translates the calls to one placeholder node each. Only when its own work is done are the symbolic functions
run, on the types that the placeholders' inputs then have, and what they built takes the placeholders' places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnxscript import evaluator
from torch._ops import OpOverload, OpOverloadPacket
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx.ops._dtype_mappings import ONNX_DTYPE_TO_TORCH_DTYPE
from torch.utils import _pytree as pytree

from torchferry.core.errors import OperatorError
from torchferry.core.report import Finding
from torchferry.exporter.functions import FUNCTION, Functions
from torchferry.exporter.torchscript import Slot, ValueType, run_symbolic
from torchferry.graph.provenance import node_line
from torchferry.rewrite.sites import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torchferry.rewrite import Symbolic
    from torchferry.rewrite.symbolic import SymbolicTarget

_DOMAIN = "torchferry.symbolic"


@dataclass(frozen=True)
class _Translation:
    """What a placeholder stands for.

    Attributes:
        symbolic: What to run.
        args: Its arguments, with a ``Slot`` for each of the placeholder's inputs.
        optional: How many of the last arguments have their default values.
        is_operator: It is an operator's call, not one of an ``autograd.Function``.
        returns_list: The operator returns a list.
    """

    symbolic: Symbolic
    args: tuple[Any, ...]
    optional: int = 0
    is_operator: bool = True
    returns_list: bool = False


class Symbolics:
    """The symbolic functions of one export.

    Args:
        chosen: Those that are registered.
        opset: What they are told.

    Attributes:
        functions: Takes the calls of ``autograd.Function``s while the model is traced.
    """

    def __init__(self, chosen: Mapping[SymbolicTarget, Symbolic], opset: int) -> None:
        self._opset = opset
        self.functions = Functions(chosen, (opset, max(opset, TORCHLIB_OPSET)))
        self._operators = {overload: symbolic for target, symbolic in chosen.items() for overload in _overloads(target)}
        # What is registered for one overload goes before what is registered for all of an operator.
        self._operators |= {target: symbolic for target, symbolic in chosen.items() if isinstance(target, OpOverload)}
        self._translations: list[_Translation] = []
        self._bodies: dict[tuple[str, bytes], int] = {}
        self._onnx_functions: dict[tuple[str, str, str], ir.Function] = {}

    def translations(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """Return what makes the placeholders, in the form of torch.onnx's ``custom_translation_table``."""
        table: dict[Callable[..., Any], Callable[..., Any]] = {FUNCTION: self._function}
        return table | {overload: self._operator(overload, symbolic) for overload, symbolic in self._operators.items()}

    def expand(self, model: ir.Model) -> None:
        """Put what the symbolic functions build in the place of the placeholders.

        Raises:
            OperatorError: If one fails or builds what is not valid; names the user's line.
        """
        opset = model.opset_imports[""]
        graphs: list[Any] = [*model.graphs(), *model.functions.values()]
        for graph in graphs:
            for node in list(graph):
                if node.domain == _DOMAIN:
                    self._expand(node, model, graph, opset)
        for holder in (model, *graphs):
            holder.opset_imports.pop(_DOMAIN, None)

    def add_functions(self, model: ir.Model) -> None:
        """Add the ONNX functions that the graph calls; torch.onnx's optimiser would have put their bodies in."""
        model.functions.update(self._onnx_functions)

    def findings(self) -> tuple[Finding, ...]:
        """Return where the sizes come from of what each Function gives."""
        calls = self.functions.calls.values()
        sources = {(c.symbolic.name, c.source, c.is_measured) for c in calls if c.source}
        return tuple(_sizes_finding(*source) for source in sorted(sources))

    def _operator(self, overload: OpOverload, symbolic: Symbolic) -> Callable[..., Any]:
        schema = overload._schema
        returns_list = len(schema.returns) == 1 and isinstance(schema.returns[0].type, torch.ListType)

        def translate(*args: Any, **kwargs: Any) -> Any:
            given: list[Any] = []
            optional = 0
            for index, argument in enumerate(schema.arguments):
                if index < len(args) or argument.name in kwargs:
                    value = args[index] if index < len(args) else kwargs[argument.name]
                else:
                    value = argument.default_value if argument.has_default_value() else None
                is_default = argument.has_default_value() and _is_constant(value) and value == argument.default_value
                optional = optional + 1 if is_default else 0
                given.append(value)
            returned = None if returns_list else len(schema.returns)
            return self._placeholder(symbolic, given, returned, optional=optional, returns_list=returns_list)

        return translate

    def _function(self, tensors: Sequence[Any], sizes: Sequence[Any], call: int) -> Any:
        recorded = self.functions.calls[call]
        inputs = [*tensors, *sizes]
        args = pytree.tree_map(lambda leaf: inputs[leaf.index] if isinstance(leaf, Slot) else leaf, recorded.args)
        outputs = self._placeholder(recorded.symbolic, args, sum(recorded.structure[1]), is_operator=False)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def _placeholder(self, symbolic: Symbolic, args: Any, outputs: int | None, **about: Any) -> Any:
        """Put one node into the graph that torch.onnx is making; return its outputs."""
        inputs: list[ir.Value] = []

        def slot(leaf: Any) -> Any:
            if not isinstance(leaf, ir.Value):
                return leaf
            inputs.append(leaf)
            return Slot(len(inputs) - 1)

        filled = tuple(pytree.tree_map(slot, list(args)))
        number = len(self._translations)
        self._translations.append(_Translation(symbolic, filled, **about))
        node = ir.Node(
            _DOMAIN,
            "Call",
            inputs,
            [ir.AttrInt64("call", number)],
            num_outputs=1 if outputs is None else outputs,
            version=1,
        )
        recorder: Any = evaluator.default()  # torch.onnx's own, while it translates a node
        recorder.nodes.append(node)
        return node.outputs[0] if len(node.outputs) == 1 else tuple(node.outputs)

    def _expand(self, node: ir.Node, model: ir.Model, graph: ir.Graph | ir.Function, opset: int) -> None:
        translation = self._translations[node.attributes["call"].as_int()]
        symbolic, where = translation.symbolic, node_line(node)
        symbolic.tally.count(Site(where))
        inputs = [value for value in node.inputs if value is not None]
        args: Any = translation.args
        if translation.is_operator:
            args, inputs = _with_numbers(args, inputs)
        try:
            fragment = run_symbolic(
                symbolic,
                args,
                [_value_type(value) for value in inputs],
                self._opset,
                opset,
                constants_as_values=translation.is_operator,
                optional=translation.optional,
            )
            built = ir.from_proto(fragment.model)
            replaced = list(node.outputs)
            if translation.returns_list and fragment.is_tuple:
                _join_outputs(built.graph)
            else:
                replaced = _replaced(symbolic.name, node, fragment.is_given)
                _check_outputs(symbolic.name, built.graph.outputs, replaced)
        except OperatorError as exc:
            raise OperatorError(exc.message, where=exc.where or where, hint=exc.hint) from exc
        if symbolic.onnx_function is not None:
            built = self._called(symbolic.onnx_function, built)
        for value, actual in zip(built.graph.inputs, inputs, strict=True):
            value.replace_all_uses_with(actual)
        new = list(built.graph)
        built.graph.remove(new)
        outputs = list(built.graph.outputs)
        built.graph.outputs.clear()
        known = {size for value in inputs for size in value.shape or () if not isinstance(size, int)}
        for inner in _all_nodes(new):
            for value in inner.outputs:
                # A size without a type cannot be written.
                value.shape = None if value.type is None else _renamed(value.shape, known)
            inner.metadata_props.update(node.metadata_props)
            inner.name = f"{node.name}/{inner.name}"
            for value in inner.outputs:
                value.name = f"{node.name}/{value.name}"
        for domain, version in built.opset_imports.items():
            if domain:
                model.opset_imports.setdefault(domain, version)
                if isinstance(graph, ir.Function):
                    graph.opset_imports.setdefault(domain, version)
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, replaced, outputs)

    def _called(self, name: str, built: ir.Model) -> ir.Model:
        """Make an ONNX function of what was built; return a graph that calls it."""
        domain, _, operator = name.partition("::")
        graph = built.graph
        body = ir.to_proto(graph).SerializeToString()
        # Calls with other constants or types have bodies of their own.
        overload = self._bodies.setdefault((name, body), sum(known == name for known, _ in self._bodies))
        unique = f"{operator}_{overload}" if overload else operator
        inputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in graph.inputs]
        outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in graph.outputs]
        graph.opset_imports.update(built.opset_imports)
        self._onnx_functions[domain, unique, ""] = ir.Function(domain, unique, graph=graph, attributes=[])
        call = ir.Node(domain, unique, inputs, outputs=outputs, version=1)
        return ir.Model(ir.Graph(inputs, outputs, nodes=[call], opset_imports={domain: 1}), ir_version=built.ir_version)


def _sizes_finding(name: str, source: str, is_measured: bool) -> Finding:
    message = f"'{name}' is exported by its symbolic; what it returns has the dtype and sizes of {source}"
    if not is_measured:
        return Finding("function-shape", "info", message)
    hint = "let forward run on fake tensors, or say the sizes by setType in the symbolic"
    return Finding("function-shape-measured", "warning", message, hint=hint)


def _overloads(target: SymbolicTarget) -> Iterator[OpOverload]:
    if isinstance(target, OpOverloadPacket):
        overloads: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        yield from (getattr(target, name) for name in overloads)


def _is_constant(value: Any) -> bool:
    return not pytree.tree_any(lambda leaf: isinstance(leaf, ir.Value), value)


def _with_numbers(args: Any, inputs: Sequence[ir.Value]) -> tuple[Any, list[ir.Value]]:
    """Put numbers in the place of the inputs that torch.onnx made of numbers; return the remaining inputs too."""
    remaining: list[ir.Value] = []

    def number_or_slot(leaf: Any) -> Any:
        if not isinstance(leaf, Slot):
            return leaf
        number = _number(inputs[leaf.index])
        if number is not None:
            return number
        remaining.append(inputs[leaf.index])
        return Slot(len(remaining) - 1)

    return pytree.tree_map(number_or_slot, args), remaining


def _number(value: ir.Value) -> torch.Tensor | None:
    """Return the constant number that a value is, in the value's dtype; None if it is something else."""
    source, producer = value, value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        source = producer.inputs[0]
    dtype = _value_type(value).dtype
    constant = ir.convenience.get_const_tensor(source) if source.producer() is not None else None
    if dtype is None or constant is None or len(constant.shape):
        return None
    return torch.as_tensor(constant.numpy()).to(dtype)


def _value_type(value: ir.Value) -> ValueType:
    dtype = None if value.dtype is None else ONNX_DTYPE_TO_TORCH_DTYPE.get(int(value.dtype))
    if value.shape is None:
        return ValueType(dtype, None)
    return ValueType(dtype, tuple(size if isinstance(size, int) else size.value for size in value.shape))


def _join_outputs(graph: ir.Graph) -> None:
    """Make a list of the outputs, which torch.onnx takes apart again."""
    joined = ir.node("SequenceConstruct", list(graph.outputs))
    graph.append(joined)
    graph.outputs[:] = joined.outputs


def _replaced(name: str, node: ir.Node, is_given: Sequence[bool]) -> list[ir.Value]:
    """Return the placeholder's outputs that the symbolic gives; it may leave out those that nobody uses."""
    if sum(is_given) == len(node.outputs):  # an autograd.Function may itself give None
        return list(node.outputs)
    if len(is_given) != len(node.outputs):
        raise OperatorError(f"the symbolic of '{name}' gives {len(is_given)} outputs, PyTorch {len(node.outputs)}")
    for index, (value, given) in enumerate(zip(node.outputs, is_given, strict=True)):
        if not given and (value.uses() or value.is_graph_output()):
            raise OperatorError(f"the symbolic of '{name}' gives None for output {index}, which is used")
    return [value for value, given in zip(node.outputs, is_given, strict=True) if given]


def _check_outputs(name: str, built: Sequence[ir.Value], wanted: Sequence[ir.Value]) -> None:
    """Refuse a symbolic that gives something else than PyTorch, as far as types can tell."""
    for index, (value, known) in enumerate(zip(built, wanted, strict=True)):
        if None not in (value.dtype, known.dtype) and value.dtype != known.dtype:
            raise OperatorError(
                f"output {index} of the symbolic of '{name}' is {value.dtype}, PyTorch's is {known.dtype}",
                hint="""convert it with g.op("Cast", value, to_i=...)""",
            )
        if value.shape is None or known.shape is None:
            continue
        differs = len(value.shape) != len(known.shape) or any(
            isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(value.shape, known.shape, strict=True)
        )
        if differs:
            raise OperatorError(
                f"output {index} of the symbolic of '{name}' has shape {value.shape}, PyTorch's {known.shape}"
            )


def _renamed(shape: ir.Shape | None, known: Collection[Any]) -> ir.Shape | None:
    """Return a shape without the names that inference gave to unknown sizes: it gives them anew in every fragment."""
    return None if shape is None else ir.Shape([d if isinstance(d, int) or d in known else None for d in shape])


def _all_nodes(nodes: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """Yield nodes and those in their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _all_nodes(list(attribute.as_graph()))
