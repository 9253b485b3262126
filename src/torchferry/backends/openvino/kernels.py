"""Kernels in Python for OpenVINO.

OpenVINO takes operators in Python only where it reads ONNX: in its own format their attributes are lost. So an engine
with kernels keeps the ONNX file, whose nodes say what sizes the kernels give.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.backends.openvino.library import COMPUTED_IN, limits, openvino
from torchferry.core.errors import BackendError
from torchferry.core.kernels import Kernel, kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import onnx_ir as ir

    from torchferry.core.engine import Array

SHAPES = "torchferry_shapes"  # an attribute: what _shapes returns, as JSON, with -1 for sizes that are not known
_UNKNOWN = -1
# What the CPU hands to a kernel for the types that it does not compute in itself.
_HANDED_OVER = {**COMPUTED_IN, "bool": "uint8", "float16": "float32", "int16": "int32"}
_TYPES = {
    "bool": "boolean", "uint8": "u8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "float16": "f16", "float32": "f32", "float64": "f64",
}  # fmt: skip
_numbers = itertools.count()


def kernel_nodes(model: ir.Model) -> list[tuple[ir.Node, Kernel]]:
    """Return the nodes of a graph that a kernel of this process computes, those in subgraphs and functions too."""
    known = {kernel.name: kernel for kernel in kernels()}
    functions = {(function.domain, function.name) for function in model.functions.values()}
    return [
        (node, known[f"{node.domain}::{node.op_type}"])
        for graph in [*model.graphs(), *(function.graph for function in model.functions.values())]
        for node in graph
        if f"{node.domain}::{node.op_type}" in known and (node.domain, node.op_type) not in functions
    ]


@contextmanager
def with_shapes(nodes: Sequence[tuple[ir.Node, Kernel]]) -> Iterator[None]:
    """Let nodes say what shapes they give, for as long as it takes to save their graph.

    Raises:
        BackendError: If the number of an output's axes is not known, without which OpenVINO takes no operator.
    """
    import onnx_ir as ir

    shapes = [json.dumps(_shapes(node, kernel)) for node, kernel in nodes]
    try:
        for (node, _), text in zip(nodes, shapes, strict=True):
            node.attributes[SHAPES] = ir.AttrString(SHAPES, text)
        yield
    finally:
        for node, _ in nodes:
            node.attributes.pop(SHAPES, None)


def _shapes(node: ir.Node, kernel: Kernel) -> list[list[int] | None]:
    """Return the shape of each output; None for one that nothing uses."""
    shapes: list[list[int] | None] = []
    for value in node.outputs:
        if not value.uses() and not value.is_graph_output():
            shapes.append(None)
        elif value.shape is None:
            raise BackendError(
                f"OpenVINO wants to know how many axes '{value.name}' has, which the kernel of '{kernel.name}' gives",
                hint="give it a shape in the graph (value_info), or use another backend",
            )
        else:
            shapes.append([size if isinstance(size, int) else _UNKNOWN for size in value.shape])
    return shapes + [None] * (len(kernel.outputs) - len(shapes))


class KernelOperators:
    """The operators in Python of one model, held for as long as the model is.

    OpenVINO holds what an operator is in C++ and forgets what it is in Python. So the ones that it makes before the
    model is compiled are held here. It makes more at every run with new sizes, only to ask for their shapes: these
    are not held, and go at once.
    """

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._is_compiled = False

    def add_to(self, core: Any) -> None:
        """Let an ``openvino.Core`` read the kernels of this process in ONNX files."""
        registered = kernels()
        if not registered:
            return
        frontend = importlib.import_module("openvino.frontend.onnx")

        for kernel in registered:
            domain, _, name = kernel.name.partition("::")
            core.add_extension(frontend.ConversionExtension(name, domain, self._conversion(kernel)))

    def hold(self, operator: Any) -> None:
        """Keep an operator alive, unless it comes too late to be part of the model."""
        if not self._is_compiled:
            self._held.append(operator)

    def settle(self) -> None:
        """Hold no more: the model is compiled."""
        self._is_compiled = True

    def release(self) -> None:
        """Let go of all; the model must be gone."""
        self._held.clear()

    def _conversion(self, kernel: Kernel) -> Callable[[Any], Any]:
        def convert(node: Any) -> Any:
            shapes = json.loads(node.get_attribute(SHAPES))
            given = [node.get_input(place) for place in range(node.get_input_size())]
            _check_node(kernel, given, shapes)
            attributes = {name: node.get_attribute(name) for name in kernel.attributes if node.has_attribute(name)}
            operator = _operator_class()(
                [_converted(output, _handed_over(dtype)) for output, dtype in zip(given, kernel.inputs, strict=True)],
                _Call(self, kernel, attributes, shapes),
            )
            return [_converted(out, dtype) for out, dtype in zip(operator.outputs(), kernel.outputs, strict=True)]

        return convert


@dataclass(frozen=True, eq=False)
class _Call:
    """What a node computes, and what all copies of its operator share."""

    owner: KernelOperators
    kernel: Kernel
    attributes: dict[str, Any]
    shapes: list[list[int] | None]

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Compute it.

        Raises:
            BackendError: If the kernel fails, or gives what the graph does not expect.
        """
        arrays = [np.asarray(array, dtype) for array, dtype in zip(inputs, self.kernel.inputs, strict=True)]
        try:
            results = self.kernel(*arrays, **self.attributes)
        except Exception as exc:
            raise BackendError(f"the kernel of '{self.kernel.name}' fails: {type(exc).__name__}: {exc}") from exc
        for place, (array, sizes) in enumerate(zip(results, self.shapes, strict=True)):
            if sizes is not None:
                _check_shape(self.kernel, place, array, sizes)
                _check_numbers(self.kernel, place, array)
        return results


def _check_node(kernel: Kernel, given: Sequence[Any], shapes: Sequence[Any]) -> None:
    if (len(given), len(shapes)) != (len(kernel.inputs), len(kernel.outputs)):
        raise BackendError(
            f"the kernel of '{kernel.name}' has {len(kernel.inputs)} inputs and {len(kernel.outputs)} outputs, "
            f"its node {len(given)} and {len(shapes)}"
        )
    for place, (output, dtype) in enumerate(zip(given, kernel.inputs, strict=True)):
        if output.get_element_type() not in (_type(dtype), openvino().Type.dynamic):
            raise BackendError(
                f"the kernel of '{kernel.name}' takes {dtype} as input {place}, "
                f"its node has {output.get_element_type().to_string()}"
            )


def _handed_over(dtype: str) -> str:
    return _HANDED_OVER.get(dtype, dtype)


def _type(dtype: str) -> Any:
    return getattr(openvino().Type, _TYPES[dtype])


def _converted(output: Any, dtype: str) -> Any:
    wanted = _type(dtype)
    if output.get_element_type() == wanted:
        return output
    return openvino().opset15.convert(output, wanted.to_string()).output(0)


@functools.cache
def _operator_class() -> Any:
    """Return the class of operators that call a kernel; it cannot be made before OpenVINO is imported."""
    library = openvino()

    class KernelOperator(library.Op):  # type: ignore[misc, name-defined]
        def __init__(self, inputs: Any, call: _Call) -> None:
            self._call = call
            # A type for each node, since OpenVINO makes one of several nodes of a type that have the same inputs.
            self._info = library.DiscreteTypeInfo(call.kernel.name, f"torchferry{next(_numbers)}")
            super().__init__(None)  # with itself, as is usual, it would live for ever
            call.owner.hold(self)
            self.set_arguments(inputs)
            self.constructor_validate_and_infer_types()

        def get_type_info(self) -> Any:
            return self._info

        def validate_and_infer_types(self) -> None:
            for place, (dtype, sizes) in enumerate(zip(self._call.kernel.outputs, self._call.shapes, strict=True)):
                shape = [0] if sizes is None else sizes
                self.set_output_type(place, _type(_handed_over(dtype)), library.PartialShape(shape))

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return KernelOperator(inputs, self._call)

        def visit_attributes(self, visitor: Any) -> bool:  # noqa: ARG002 - OpenVINO's own format is not written
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            results = self._call([tensor.data for tensor in inputs])
            for tensor, array, sizes in zip(outputs, results, self._call.shapes, strict=True):
                if sizes is not None:
                    tensor.shape = array.shape
                    tensor.data[...] = array
            return True

    return KernelOperator


def _check_shape(kernel: Kernel, place: int, array: Array, sizes: list[int]) -> None:
    fits = array.ndim == len(sizes) and all(
        want in (_UNKNOWN, got) for want, got in zip(sizes, array.shape, strict=True)
    )
    if not fits:
        wanted = ["?" if size == _UNKNOWN else size for size in sizes]
        raise BackendError(
            f"the kernel of '{kernel.name}' gave output {place} the shape {list(array.shape)}, "
            f"expected [{', '.join(map(str, wanted))}]"
        )


def _check_numbers(kernel: Kernel, place: int, array: Array) -> None:
    limit = limits(array.dtype.name)
    if limit is None:
        return
    outside = array[(array < limit[0]) | (array > limit[1])]
    outside = outside[np.isfinite(outside)]
    if outside.size:
        raise BackendError(
            f"the kernel of '{kernel.name}' gave {outside[0]} in output {place}, "
            f"but OpenVINO computes {array.dtype.name} in {COMPUTED_IN[array.dtype.name]}"
        )
