"""Which graphs pnnx and ncnn take, as far as that can be told before they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.backends.refusing import refusal
from torchferry.core.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx_ir as ir

    from torchferry.core.signature import Signature

# Those whose numbers were seen to be right, each in a graph of its own, besides what is folded into constants. Not all
# of their attributes are taken, and pnnx says so then. Left out because they were seen to be wrong: LRN, SpaceToDepth.
OPERATORS = frozenset((
    "Abs", "Acos", "Acosh", "Add", "Asin", "Asinh", "Atan", "Atanh", "AveragePool", "BatchNormalization", "Ceil",
    "Celu", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "DepthToSpace",
    "Div", "Dropout", "Einsum", "Elu", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "Gelu", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "GridSample", "GroupNormalization", "HardSigmoid", "HardSwish",
    "Identity", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "MatMul", "Max",
    "MaxPool", "Min", "Mish", "Mod", "Mul", "Neg", "PRelu", "Pad", "Pow", "RMSNormalization", "Reciprocal",
    "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize",
    "Round", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Slice", "Softmax", "Softplus", "Split",
    "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh", "Transpose", "Unsqueeze",
))  # fmt: skip
MOST_AXES = 4  # besides the batch


def check_operators(model: ir.Model, whole: ir.Model) -> None:
    """Check that ncnn has every operator of a graph without local functions.

    Args:
        model: The graph.
        whole: The user's own, of which it was made.

    Raises:
        UnsupportedError: If it lacks some; names all, with modules and lines.
    """
    lacking = [node for graph in model.graphs() for node in graph if node.domain or node.op_type not in OPERATORS]
    if lacking:
        raise refusal("ncnn has no operator", lacking, model, whole)


def check_tensors(signature: Signature) -> None:
    """Check that ncnn takes the inputs and outputs.

    Raises:
        UnsupportedError: If one is not float32, or has a size or rank without a name.
    """
    for spec in (*signature.inputs, *signature.outputs):
        if spec.dtype != "float32":
            raise UnsupportedError(
                f"ncnn takes and gives float32 alone, '{spec.name}' is {spec.dtype}",
                hint="convert it inside the model, or use another backend",
            )
    for spec in signature.inputs:
        if not spec.shape or None in spec.shape or 0 in spec.shape:
            raise UnsupportedError(
                f"ncnn wants inputs of one axis at least, each fixed or with a name, and none empty, got {spec}",
                hint="name its axes, or use another backend",
            )


def nodes_like(model: ir.Model, layer: str) -> list[ir.Node]:
    """Return the nodes that a layer may have come from, by pnnx's word for it, such as ``torch.tile``."""
    word = layer.rpartition(".")[2].replace("_", "").lower()
    return [node for graph in model.graphs() for node in graph if node.op_type.lower() == word]


def first_with_many_axes(model: ir.Model) -> ir.Node | None:
    """Return the first node that gives more axes than ncnn has, of which one may yet be the batch."""
    return next(
        (
            node
            for graph in model.graphs()
            for node in graph
            if any(len(value.shape or ()) > MOST_AXES for value in node.outputs)
        ),
        None,
    )
