"""Types: TensorRT computes in those that the graph has, and would change some without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.core.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx_ir as ir

    from torchferry.core.signature import Signature
    from torchferry.core.target import Precision

_DTYPES = ("bool", "int32", "int64", "uint8", "float16", "float32")
_ELEMENTS: dict[Precision, str] = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
# Where nearly all of the arithmetic is. What a network has besides may stay in fp32 for the sake of its range.
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Attention", "LSTM", "GRU", "RNN", "Einsum")


def check_types(model: ir.Model, signature: Signature) -> None:
    """Check that TensorRT keeps the type of every input, output and tensor.

    Raises:
        UnsupportedError: If it does not; names the tensor.
    """
    for spec in (*signature.inputs, *signature.outputs):
        if spec.dtype not in _DTYPES:
            raise UnsupportedError(
                f"TensorRT takes and gives {', '.join(_DTYPES)}, '{spec.name}' is {spec.dtype}",
                hint="convert it inside the model, or use another backend",
            )
    for graph in model.graphs():
        for value in (*graph.initializers.values(), *(output for node in graph for output in node.outputs)):
            if _element(value) == "DOUBLE":
                raise UnsupportedError(
                    f"TensorRT would compute in float32 what is float64 in the graph, such as '{value.name}'",
                    hint="convert the model to float32 and verify it there, or use another backend",
                )


def check_precision(model: ir.Model, precision: Precision) -> None:
    """Check that a graph's products have the types of a precision, or its quantisers those that TensorRT has.

    Raises:
        UnsupportedError: If one has another type in a graph for fp32, or none has the type in one for fp16 or bf16, or
            a quantiser in one for int8 is not symmetric.
    """
    if precision == "int8":
        _check_quantizers(model)
        return
    wanted = _ELEMENTS[precision]
    products = [(node, _types(node)) for graph in model.graphs() for node in graph if node.op_type in _PRODUCTS]
    found = set[str]().union(*(types for _, types in products))
    if not products:
        found = {_element(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    if precision == "fp32":
        strangers = [(node, types) for node, types in products if types & {"FLOAT16", "BFLOAT16"}]
        if strangers:
            node, types = strangers[0]
            raise UnsupportedError(
                f"TensorRT computes in the types of the graph, and '{node.name}' ({node.op_type}) is "
                f"{', '.join(sorted(types))}, not fp32",
                hint="choose the precision that the graph is typed in",
            )
    elif wanted not in found:
        raise UnsupportedError(
            f"TensorRT computes in the types of the graph, of which none is {wanted} for {precision}, but "
            f"{', '.join(sorted(found)) or 'unknown'}",
            hint="make an fp16 graph with ferry.fp16.fix first"
            if precision == "fp16"
            else "type the graph in bfloat16",
        )


def _check_quantizers(model: ir.Model) -> None:
    import onnx_ir as ir

    for node in (node for graph in model.graphs() for node in graph if node.op_type == "QuantizeLinear"):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        value = None if zero is None else ir.convenience.get_const_tensor(zero)
        if value is None or value.dtype != ir.DataType.INT8 or value.numpy().any():
            raise UnsupportedError(
                f"TensorRT quantises to int8 with 0 for zero, and '{node.name}' does not",
                hint="quantise with ferry.quantize(…, symmetric=True)",
            )


def _types(node: ir.Node) -> set[str]:
    """Return the floating-point types of a node's inputs, as far as they are known."""
    return {_element(value) for value in node.inputs if value is not None} & set(_ELEMENTS.values())


def _element(value: ir.Value) -> str:
    return value.dtype.name if value.dtype is not None else ""
