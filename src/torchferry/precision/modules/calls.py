"""A module of the ATen calls that a module makes, with scales written into them.

What it is made of:

- Parameters and buffers have their names, and are those of the module / 2**k.
- A number among a call's arguments that absorbs a scale is divided likewise.
- Before a call that wants another scale stands a multiplication, and a clip where the call is flat.
- A call that stays FP32 gets FP32 operands in true units, whatever ``half()`` makes of the module.
- A dtype of FP32 that the module's code names becomes the module's own, so that ``half()`` reaches it.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.fx.node import map_arg

from torchferry.precision.apply import CLIP_AT, SMALLEST
from torchferry.precision.degrees import is_float
from torchferry.precision.modules.weights import write_weights
from torchferry.precision.prepare import values

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.fx import Node

    from torchferry.precision.modules.capture import Captured
    from torchferry.precision.modules.numbers import Number
    from torchferry.precision.planning import Plan

_DTYPE = "fp16_dtype"
_ADDS = ("add", "clamp", "clamp_min", "maximum")  # calls that keep a divisor above zero
aten = torch.ops.aten
Form = tuple[Literal["own", "fp32"], int]
"""How a tensor is stored: in the module's own dtype or in FP32, and its k."""


class RepairedModule(torch.fx.GraphModule):
    """A module of ATen calls, with the parameters of the module that it was made of."""

    def __deepcopy__(self, memo: Any) -> Any:
        with warnings.catch_warnings():  # torch tells of its own use of what it is about to remove
            warnings.simplefilter("ignore", FutureWarning)
            return super().__deepcopy__(memo)


def with_calls(captured: Captured, numbers: Collection[Number], found: Plan, state: Collection[str]) -> RepairedModule:
    """Return a module in FP32 that does what the captured one does, whose ``half()`` is safe.

    Args:
        captured: The module.
        numbers: Arguments of its calls that may absorb a scale.
        found: The scales.
        state: Names of the module's ``state_dict``; the result has the same.
    """
    unlifted = captured.program.module(check_guards=True)
    dtypes = {node.name: node.meta["val"].dtype for node in captured.program.graph.nodes if _is_tensor(node)}
    module = RepairedModule(unlifted, unlifted.graph)
    for node in module.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "stack_trace"}
    module.meta = {}
    module = copy.deepcopy(module)  # the graph's constants are the parameters that it was captured with
    for name, buffer in list(module.named_buffers()):
        if name not in state:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path).register_buffer(leaf, buffer, persistent=False)
    write_weights(module, captured.parameters, found)
    module.register_buffer(_DTYPE, torch.empty(0), persistent=False)
    _Writer(module.graph, captured, found, dtypes).write(numbers)
    module.graph.lint()
    module.recompile()
    return module


def keep_numbers_above_zero(module: RepairedModule) -> None:
    """Raise what a call adds, and FP16 would hold as 0; a norm of torch's adds its eps in FP32."""
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "").partition(".")[0] in _ADDS:
            node.args, node.kwargs = (
                _mapped(each, lambda x: SMALLEST if type(x) is float and 0 < x < SMALLEST else x)
                for each in (node.args, node.kwargs)
            )
    module.recompile()


class _Writer:
    def __init__(self, graph: torch.fx.Graph, captured: Captured, found: Plan, dtypes: dict[str, torch.dtype]) -> None:
        assert found.solution is not None  # the caller looked
        self._graph, self._found, self._solution, self._dtypes = graph, found, found.solution, dtypes
        self._inputs = captured.inputs
        self._floats = {v.name or "" for v in values(found.prepared.model.graph) if is_float(v)}
        self._clips = {(e.tensor, e.reader) for e in found.problem.edges if e.kind == "clip"}
        self._logs = {(e.tensor, e.reader) for e in found.problem.edges if e.kind == "log"}
        self._calls = [node for node in graph.nodes if node.op == "call_function"]
        self._start = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
        self._converted: dict[tuple[Node, Form, bool], Node] = {}
        with graph.inserting_before(self._start):
            self._dtype = graph.call_function(getattr, (graph.get_attr(_DTYPE), "dtype"))

    def write(self, numbers: Collection[Number]) -> None:
        output = self._graph.output_node()
        self._forms = {node: self._form(node) for node in self._graph.nodes if self._tensor(node) in self._floats}
        for node in self._calls:
            self._follow_dtype(node)
            changed = {each.value: each.scaled(self._found) for each in numbers if each.owner == node.name}
            if changed and not self._is_island(node):
                node.args, node.kwargs = (_with_numbers(each, changed) for each in (node.args, node.kwargs))
        for node in self._calls:
            for operand in node.all_input_nodes:
                if operand in self._forms and node.target is not getattr:
                    node.replace_input_with(operand, self._as_wanted(operand, node))
        output.args = map_arg(output.args, self._returned)
        for node in self._calls:
            self._shift_logarithm(node)

    def _tensor(self, node: Node) -> str:
        """Return the graph's name for what a node gives."""
        if node.op == "placeholder":
            return self._inputs.get(node.name, "")
        return str(node.target) if node.op == "get_attr" else node.name

    def _is_island(self, node: Node) -> bool:
        source = node.args[0] if node.args else None
        if str(node.target) == "<built-in function getitem>" and isinstance(source, torch.fx.Node):
            return self._is_island(source)
        return node.op == "call_function" and node.name in self._solution.islands

    def _form(self, node: Node) -> Form:
        tensor = self._tensor(node)
        if self._is_island(node):
            return ("fp32", 0)
        if node.op == "placeholder":
            return ("fp32" if tensor in self._found.problem.outside else "own", 0)
        return ("own", self._solution.scales.get(tensor, 0))

    def _as_wanted(self, operand: Node, reader: Node) -> Node:
        if self._is_island(reader):
            return self._convert(operand, ("fp32", 0))
        edge = (self._tensor(operand), reader.name)
        shift = 0 if edge in self._logs else self._solution.shifts.get(edge, 0)
        k = self._solution.scales.get(edge[0], 0) - shift
        return self._convert(operand, ("own", k), clip=edge in self._clips)

    def _returned(self, node: Node) -> Node:
        if node not in self._forms:
            return node
        is_outside = self._tensor(node) in self._found.problem.outside
        return self._convert(node, ("fp32" if is_outside else "own", 0))

    def _convert(self, node: Node, wanted: Form, *, clip: bool = False) -> Node:
        """Return a tensor in another form, with as few calls as it takes."""
        dtype, k = self._forms[node]
        if (dtype, k) == wanted and not clip:
            return node
        key = (node, wanted, clip)
        if key not in self._converted:
            current = node
            with self._after(node):
                if clip:
                    bound = CLIP_AT / 2.0**k
                    current = self._graph.call_function(aten.clamp.default, (current, -bound, bound))
                if wanted[0] == "fp32" != dtype:
                    current = self._cast(current, torch.float32)
                if wanted[1] != k:
                    current = self._graph.call_function(aten.mul.Tensor, (current, 2.0 ** (k - wanted[1])))
                if wanted[0] == "own" != dtype:
                    current = self._cast(current, self._dtype)
            self._converted[key] = current
        return self._converted[key]

    def _after(self, node: Node) -> Any:
        if node.op != "call_function":
            return self._graph.inserting_before(self._start)
        return self._graph.inserting_before(node.next)

    def _cast(self, node: Node, dtype: Any) -> Node:
        return self._graph.call_function(aten.to.dtype, (node, dtype))

    def _shift_logarithm(self, node: Node) -> None:
        """Add the logarithm of a scale to that of what is stored: log(t) = log(t / 2**k) + k ln 2."""
        bits = sum(bits for edge, bits in self._solution.shifts.items() if edge in self._logs and edge[1] == node.name)
        if bits:
            users = list(node.users)
            with self._graph.inserting_before(node.next):
                shifted = self._graph.call_function(aten.add.Tensor, (node, bits * math.log(2)))
            for user in users:
                user.replace_input_with(node, shifted)

    def _follow_dtype(self, node: Node) -> None:
        """Let a call that names FP32, or makes a tensor of it by default, follow the module's dtype."""
        if self._is_island(node):
            return
        node.args, node.kwargs = (_with_dtype(each, self._dtype) for each in (node.args, node.kwargs))
        schema = getattr(node.target, "_schema", None)
        makes = self._dtypes.get(node.name) == torch.float32 and not any(
            self._dtypes.get(operand.name) == torch.float32 for operand in node.all_input_nodes
        )
        if makes and schema is not None and any(a.name == "dtype" and a.kwarg_only for a in schema.arguments):
            node.kwargs = {**node.kwargs, "dtype": self._dtype}


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _with_numbers(argument: Any, changed: dict[float, float]) -> Any:
    return _mapped(argument, lambda each: changed.get(each, each) if type(each) is float else each)


def _with_dtype(argument: Any, dtype: Node) -> Any:
    return _mapped(argument, lambda each: dtype if each is torch.float32 else each)


def _mapped(argument: Any, change: Any) -> Any:
    if isinstance(argument, tuple | list):
        return type(argument)(_mapped(each, change) for each in argument)
    if isinstance(argument, dict):
        return {key: _mapped(each, change) for key, each in argument.items()}
    return change(argument)
