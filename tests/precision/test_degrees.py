"""Every rule of the table holds, to the bit: an operator on scaled operands gives the scaled result."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchferry.core.signature import Signature
from torchferry.precision import degrees
from torchferry.precision.apply import attribute_scales
from torchferry.precision.degrees import RULES, relations_of, table
from torchferry.precision.ranges import run

X = "float[2,4,6,6] x"
# For each operator graphs in ONNX text: inputs, constants as initial values, and one node.
UNARY = (
    "Identity Relu Abs Neg LeakyRelu Sqrt Reciprocal Sign Shape Size NonZero IsNaN Exp Log Sigmoid Tanh Erf "
    "HardSwish Softplus Softsign Elu Selu Celu Sin Cos Tan Atan Sinh Cosh Asinh Round Floor Ceil Softmax "
    "LogSoftmax Hardmax GlobalAveragePool GlobalMaxPool GlobalLpPool MeanVarianceNormalization Flatten Squeeze "
    "ReduceMax ReduceMin ReduceMean ReduceSum ReduceL1 ReduceL2 ReduceProd ReduceLogSum ReduceLogSumExp "
    "ReduceSumSquare LpNormalization ArgMax ArgMin Dropout EyeLike Gelu Mish RandomNormalLike RandomUniformLike "
    "Trilu"
)
BINARY = "Add Sub Mul Div Max Min Sum Mean Equal Less LessOrEqual Greater GreaterOrEqual CastLike"
SAMPLES: dict[str, list[str]] = {
    **{name: [f"({X}) => y = {name} (x)"] for name in UNARY.split()},
    **{name: [f"(float[2,3] x, float[2,3] z) => y = {name} (x, z)"] for name in BINARY.split()},
}
SAMPLES |= {
    "Transpose": [f"({X}) => y = Transpose <perm=[0,2,3,1]> (x)"],
    "Reshape": [f"({X}, int64[2] s={{8,36}}) => y = Reshape (x, s)"],
    "Unsqueeze": [f"({X}, int64[1] s={{0}}) => y = Unsqueeze (x, s)"],
    "Slice": [f"({X}, int64[1] a={{1}}, int64[1] b={{3}}) => y = Slice (x, a, b)"],
    "Split": [f"({X}) => y, y2 = Split <num_outputs=2, axis=1> (x)"],
    "Expand": ["(float[1,4] x, int64[2] s={3,4}) => y = Expand (x, s)"],
    "Tile": ["(float[1,4] x, int64[2] s={3,2}) => y = Tile (x, s)"],
    "Concat": ["(float[1,4] x, float[1,4] z) => y = Concat <axis=0> (x, z)"],
    "Gather": ["(float[3,4] x, int64[2] i={2,0}) => y = Gather (x, i)"],
    "GatherElements": ["(float[3,4] x, int64[1,2] i={2,0}) => y = GatherElements (x, i)"],
    "GatherND": ["(float[3,4] x, int64[1,2] i={2,0}) => y = GatherND (x, i)"],
    "SpaceToDepth": [f"({X}) => y = SpaceToDepth <blocksize=2> (x)"],
    "DepthToSpace": [f"({X}) => y = DepthToSpace <blocksize=2> (x)"],
    "ReverseSequence": ["(float[3,4] x, int64[4] s={1,2,3,1}) => y = ReverseSequence (x, s)"],
    "Compress": ["(float[3,4] x, bool[3] c={1,0,1}) => y = Compress <axis=0> (x, c)"],
    "CenterCropPad": ["(float[3,4] x, int64[2] s={5,2}) => y = CenterCropPad (x, s)"],
    "Col2Im": ["(float[1,5,5] x, int64[2] s={5,5}, int64[2] b={1,5}) => y = Col2Im (x, s, b)"],
    "Unique": ["(float[6] x) => y = Unique (x)"],
    "PRelu": [f"({X}, float[4,1,1] s={{0.1,0.2,0.3,2}}) => y = PRelu (x, s)"],
    "Mod": ["(float[2,3] x, float[2,3] z) => y = Mod <fmod=1> (x, z)"],
    "Where": ["(bool[3] c={1,0,1}, float[3] x, float[3] z) => y = Where (c, x, z)"],
    "Clip": [f"({X}, float lo={{-0.5}}, float hi={{0.75}}) => y = Clip (x, lo, hi)"],
    "Pad": ["(float[3,4] x, int64[4] p={1,0,0,2}, float v={0.7}) => y = Pad (x, p, v)"],
    "ConstantOfShape": ["(int64[2] s={2,3}) => y = ConstantOfShape <value=float[1] {0.3}> (s)"],
    "OneHot": ["(int64[3] i={0,2,1}, int64 d={3}, float[2] x) => y = OneHot (i, d, x)"],
    "ScatterND": ["(float[4] x, int64[2,1] i={1,3}, float[2] z) => y = ScatterND <reduction='add'> (x, i, z)"],
    "ScatterElements": ["(float[4] x, int64[2] i={1,3}, float[2] z) => y = ScatterElements <reduction='max'> (x, i, z)",
                        "(float[4] x, int64[2] i={1,3}, float[2] z) => y = ScatterElements <reduction='mul'>(x, i, z)"],
    "CumSum": ["(float[4] x, int64 a={0}) => y = CumSum (x, a)"],
    "TopK": ["(float[4] x, int64[1] k={2}) => y, i = TopK (x, k)"],
    "MaxPool": [f"({X}) => y = MaxPool <kernel_shape=[2,2]> (x)"],
    "AveragePool": [f"({X}) => y = AveragePool <kernel_shape=[2,2]> (x)"],
    "LpPool": [f"({X}) => y = LpPool <kernel_shape=[2,2]> (x)"],
    "Resize": [f"({X}, float[0] r, float[4] s={{1,1,2,2}}) => y = Resize <mode='linear'> (x, r, s)"],
    "GridSample": [f"({X}, float[2,3,3,2] g) => y = GridSample (x, g)"],
    "RoiAlign": [f"({X}, float[1,4] r, int64[1] b={{0}}) => y = RoiAlign <output_height=2, output_width=2> (x, r, b)"],
    "MaxRoiPool": [f"({X}, float[1,5] r={{0,0,0,3,3}}) => y = MaxRoiPool <pooled_shape=[2,2]> (x, r)"],
    "MatMul": ["(float[3,4] x, float[4,5] z) => y = MatMul (x, z)"],
    "Einsum": ["(float[3,4] x, float[4,5] z) => y = Einsum <equation='ij,jk->ki'> (x, z)",
               "(float[3,4] x) => y = Einsum <equation='ij->j'> (x)"],
    "Conv": [f"({X}, float[3,4,3,3] w, float[3] b) => y = Conv (x, w, b)",
             f"({X}, float[3,4,3,3] w) => y = Conv (x, w)"],
    "ConvTranspose": [f"({X}, float[4,3,3,3] w, float[3] b) => y = ConvTranspose (x, w, b)"],
    "Gemm": ["(float[3,4] x, float[4,5] w, float[5] b) => y = Gemm <alpha=0.7, beta=0.3> (x, w, b)",
             "(float[3,4] x, float[4,5] w) => y = Gemm (x, w)"],
    "Pow": [f"({X}, float p={{2}}) => y = Pow (x, p)", f"({X}, float p={{0.5}}) => y = Pow (x, p)",
            f"({X}, float p={{3}}) => y = Pow (x, p)", f"({X}, float p={{0.3}}) => y = Pow (x, p)",
            "(float[3] x, float[3] z) => y = Pow (x, z)"],
    "LayerNormalization": ["(float[3,8] x, float[8] w, float[8] b) => y = LayerNormalization <epsilon=0.01> (x, w, b)"],
    "InstanceNormalization": [f"({X}, float[4] w, float[4] b) => y = InstanceNormalization <epsilon=0.01> (x, w, b)"],
    "GroupNormalization": [
        f"({X}, float[2] w, float[2] b) => y = GroupNormalization <epsilon=0.01, num_groups=2> (x, w, b)"],
    "BatchNormalization": [
        f"({X}, float[4] w, float[4] b, float[4] m, float[4] v) => y = BatchNormalization<epsilon=0.1>(x, w, b, m, v)"],
    "Cast": [f"({X}) => y = Cast <to=1> (x)", f"({X}) => y = Cast <to=7> (x)", f"({X}) => y = Cast <to=9> (x)",
             "(int64[3] x={1,2,3}) => y = Cast <to=1> (x)"],
    "HardSigmoid": [f"({X}) => y = HardSigmoid <alpha=0.3, beta=0.4> (x)", f"({X}) => y = HardSigmoid (x)"],
    "ThresholdedRelu": [f"({X}) => y = ThresholdedRelu <alpha=0.3> (x)", f"({X}) => y = ThresholdedRelu (x)"],
    "Shrink": [f"({X}) => y = Shrink <lambd=0.3, bias=0.1> (x)", f"({X}) => y = Shrink (x)"],
    "IsInf": [f"({X}) => y = IsInf (x)"],
}  # fmt: skip
# Not in ONNX Runtime for the CPU, or of an opset that these graphs are not written in, or without a number to compare.
NOT_RUN = {
    "DeformConv", "RMSNormalization", "Swish", "Attention", "MaxUnpool", "Upsample", "Scatter", "Asin", "Acos", "Acosh",
    "Atanh", "LRN", "Det", "Range", "AffineGrid", "NonMaxSuppression", "LSTM", "GRU", "RNN", "RandomNormal",
    "RandomUniform", "BlackmanWindow", "HannWindow", "HammingWindow", "If", "Loop", "Scan", "EyeLike",
    "RandomNormalLike", "RandomUniformLike",
}  # fmt: skip
# All that is drawn for these is positive.
POSITIVE = {"Sqrt", "Log", "Pow", "ReduceLogSum", "BatchNormalization"}


def graph_of(name: str, sample: str) -> tuple[ir.Model, list[ir.Value], dict[str, Any]]:
    """Return the one-node graph, its float operands, and arrays for all that are not constants."""
    left, right = sample.split(" => ")
    operands = [part.strip() for part in left.strip("()").split(", ")] if left != "()" else []
    inputs = [each.split("=")[0] for each in operands]
    outputs = ", ".join(f"y{'' if i == 0 else i}" for i in range(1))
    text = f'<ir_version: 9, opset_import: ["" : 20]> g ({", ".join(inputs)}) => ({outputs}) {{ {right} }}'
    text = text.replace("'", '"')
    model = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value, declared in zip(list(model.graph.inputs), operands, strict=True):
        shape = [int(size) for size in value.shape]
        if "={" in declared:
            numbers = [float(n) for n in declared.split("={")[1].strip("{}").split(",")]
            array = np.array(numbers).astype(value.dtype.numpy()).reshape(shape)
            value.const_value = ir.Tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
            feeds[value.name] = array
            continue
        array = generator.uniform(0.5 if name in POSITIVE else -2, 2, shape).astype(np.float32)
        feeds[value.name] = array
    return model, [v for v in (*model.graph.inputs, *model.graph.initializers.values()) if degrees.is_float(v)], feeds


def infer(model: ir.Model) -> None:
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)


def solve_for(node: ir.Node, chosen: list[int]) -> dict[Any, int] | None:
    """Give integers to all slots that satisfy the node's relations, some of them as chosen; None if none are."""
    relations = relations_of(node)
    slots = sorted({slot for relation in relations for slot in relation} | set(degrees.float_slots(node)), key=str)
    inputs = [slot for slot in slots if slot[0] in ("in", "aux")]
    for draw in range(2 ** len(inputs)):
        known = {slot: chosen[i % len(chosen)] for i, slot in enumerate(inputs) if not draw >> i & 1}
        follow(relations, known, len(slots))
        for slot in [*inputs, *slots]:  # what is still open after all that follows is 0
            known.setdefault(slot, 0)
            follow(relations, known, len(slots))
        if all(sum(c * known[s] for s, c in relation.items()) == 0 for relation in relations):
            return known
    return None


def follow(relations: list[degrees.Relation], known: dict[Any, int], times: int) -> None:
    for _ in range(times):
        for relation in relations:
            unknown = [slot for slot in relation if slot not in known]
            if len(unknown) == 1:
                rest = sum(c * known[s] for s, c in relation.items() if s in known)
                if rest % relation[unknown[0]] == 0:
                    known[unknown[0]] = -rest // relation[unknown[0]]


CASES = [(name, sample) for name in RULES if name not in NOT_RUN for sample in SAMPLES[name]]


def computed(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    from torchferry.graph.reading import tensor_spec

    copy = model.clone()
    signature = Signature(tuple(tensor_spec(v) for v in copy.graph.inputs), ())
    outputs = [v for node in copy.graph for v in node.outputs]
    found = run(copy, signature, outputs, [{k: v for k, v in feeds.items() if k in signature.input_names}])[0]
    return [found[v.name] for v in outputs]


@pytest.mark.parametrize(("name", "sample"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(chosen=st.lists(st.integers(-5, 5).filter(bool), min_size=3, max_size=3))
def test_scaled_operands_give_the_scaled_result(name: str, sample: str, chosen: list[int]) -> None:
    model, floats, feeds = graph_of(name, sample)
    infer(model)
    node = next(iter(model.graph))
    ks = solve_for(node, [2 * k for k in chosen])
    assert ks is not None
    want = computed(model, feeds)

    for value in floats:
        k = ks.get(("in", list(node.inputs).index(value)), 0)
        feeds[value.name] = (feeds[value.name] / 2.0**k).astype(np.float32)
        if value.is_initializer():
            value.const_value = ir.Tensor(feeds[value.name], name=value.name)
    for attribute, k in attribute_scales(node, {s: v for s, v in ks.items() if s[0] in ("in", "out")}).items():
        found = node.attributes[attribute]
        if found.type == ir.AttributeType.FLOAT:
            node.attributes[attribute] = ir.AttrFloat32(attribute, found.as_float() / 2.0**k)
        else:
            array = (found.as_tensor().numpy() / 2.0**k).astype(np.float32)
            node.attributes[attribute] = ir.AttrTensor(attribute, ir.Tensor(array))
    got = computed(model, feeds)

    for index, (before, after) in enumerate(zip(want, got, strict=True)):
        if before.dtype != np.float32:
            assert np.array_equal(before, after)
            continue
        shifted = after * np.float32(2.0 ** ks.get(("out", index), 0))
        if RULES[name].is_exact:
            assert np.array_equal(before, shifted, equal_nan=True)
        else:
            np.testing.assert_allclose(shifted, before, rtol=1e-6)


def test_every_operator_of_the_table_is_tested_or_named_here() -> None:
    assert RULES.keys() == SAMPLES.keys() | NOT_RUN


@pytest.mark.parametrize("name", ["Relu", "Add", "Conv", "Pow", "Sqrt", "Div", "LayerNormalization", "HardSigmoid"])
def test_rules_leave_a_scale_to_choose(name: str) -> None:
    model, _, _ = graph_of(name, SAMPLES[name][0])
    infer(model)
    ks = solve_for(next(iter(model.graph)), [2, 4, 6])
    assert ks is not None
    assert any(ks.values())


def test_the_table_in_the_documentation_is_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "fp16.md").read_text()
    for operators, degree, proof in table():
        assert f"| {operators} | {degree} | {proof} |" in text
