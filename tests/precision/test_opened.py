"""Opening: the sums inside become tensors, the values stay, and nodes remember where they came from."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import torchferry as ferry
from torchferry.core.target import Target
from torchferry.graph import as_exported
from torchferry.precision.opened import EXACT, ROLE_KEY, open_sums

PRIMITIVE = {
    *("Abs", "Add", "AveragePool", "Cast", "Div", "Equal", "Erf", "Exp", "Gather", "HardSigmoid", "Log", "Mul", "Neg"),
    *(
        "Reciprocal",
        "ReduceMax",
        "ReduceProd",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Size",
        "Sqrt",
        "Sub",
        "Tanh",
    ),
    "Where",
}
rng = np.random.default_rng(0)
X = rng.standard_normal((2, 4, 5, 6)).astype(np.float32) * 3
C = rng.random((4, 4)).astype(np.float32) + 0.5
F = rng.random((2, 6)).astype(np.float32) + 0.5
AXES = {"axes": np.array([2, 3])}
CASES = [
    ("ReduceMean", 18, {}, {}),
    ("ReduceMean", 18, {"keepdims": 0}, AXES),
    ("ReduceMean", 13, {"axes": [-1]}, {}),
    ("ReduceMean", 11, {"axes": [0, 2]}, {}),
    ("ReduceL1", 18, {}, AXES),
    ("ReduceL2", 18, {}, AXES),
    ("ReduceL2", 11, {"axes": [1], "keepdims": 0}, {}),
    ("ReduceSumSquare", 18, {}, AXES),
    ("ReduceLogSumExp", 18, {"keepdims": 0}, AXES),
    ("ReduceLogSumExp", 18, {}, {}),
    ("GlobalAveragePool", 18, {}, {}),
    ("AveragePool", 19, {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 2]}, {}),
    ("AveragePool", 19, {"kernel_shape": [2, 2], "count_include_pad": 1, "ceil_mode": 1}, {}),
    ("LayerNormalization", 18, {"epsilon": 1e-3}, {"scale": F[0], "bias": F[1]}),
    ("LayerNormalization", 18, {"axis": 2}, {"scale": np.tile(F[0], (5, 1))}),
    ("RMSNormalization", 23, {}, {"scale": F[0]}),
    ("InstanceNormalization", 18, {}, {"scale": C[0], "bias": C[1]}),
    ("GroupNormalization", 18, {"num_groups": 2}, {"scale": C[0, :2], "bias": C[1, :2]}),
    ("GroupNormalization", 21, {"num_groups": 2}, {"scale": C[0], "bias": C[1]}),
    ("MeanVarianceNormalization", 18, {}, {}),
    ("BatchNormalization", 18, {}, dict(zip("sbmv", C, strict=True))),
    ("LpNormalization", 18, {"axis": 1}, {}),
    ("LpNormalization", 18, {"p": 1}, {}),
    ("Softmax", 18, {}, {}),
    ("Softmax", 13, {"axis": 1}, {}),
    ("LogSoftmax", 18, {"axis": 2}, {}),
    ("Gelu", 20, {}, {}),
    ("Gelu", 20, {"approximate": "tanh"}, {}),
    ("HardSwish", 18, {}, {}),
    ("Softplus", 18, {}, {}),
    ("Mish", 18, {}, {}),
]


def model_of(op_type, opset, attributes, constants, *, shape=X.shape, dtype=TensorProto.FLOAT, outputs=("y",)):
    weights = [
        helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a) for n, a in constants.items()
    ]
    node = helper.make_node(op_type, ["x", *constants], list(outputs), **attributes)
    node.metadata_props.add(key="torchferry.module", value="neck.norm")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        weights,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


def run(model, feeds, tmp_path):
    return list(ferry.compile(model, Target(), tmp_path / "engine", overwrite=True).open().run(feeds).values())


@pytest.mark.parametrize("shape", [X.shape, ("n", 4, "h", 6)], ids=["fixed", "dynamic"])
@pytest.mark.parametrize(("op_type", "opset", "attributes", "constants"), CASES, ids=lambda v: str(v)[:24])
def test_values_stay_and_only_primitives_remain(op_type, opset, attributes, constants, shape, tmp_path):
    model = model_of(op_type, opset, attributes, constants, shape=shape)
    expected = run(model, {"x": X}, tmp_path)
    assert open_sums(model) == ()
    assert {node.op_type for node in model.graph} <= PRIMITIVE
    assert {node.metadata_props["torchferry.module"] for node in model.graph} == {"neck.norm"}
    assert [value.name for value in model.graph.outputs] == ["y"]
    for want, got in zip(expected, run(model, {"x": X}, tmp_path), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("op_type", ["Swish"])
def test_operators_that_the_engine_lacks(op_type):
    model = model_of(op_type, 24, {"alpha": 1.5}, {})
    assert open_sums(model) == ()
    assert [node.op_type for node in model.graph] == ["Mul", "Sigmoid", "Mul"]


def test_all_outputs_of_a_norm(tmp_path):
    model = model_of("LayerNormalization", 18, {}, {"scale": F[0]}, outputs=("y", "mean", "inverse"))
    expected = run(model, {"x": X}, tmp_path)
    open_sums(model)
    for want, got in zip(expected, run(model, {"x": X}, tmp_path), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_vectors_of_zeros_stay_zeros(tmp_path):
    model = model_of("LpNormalization", 18, {}, {})
    open_sums(model)
    assert not run(model, {"x": np.zeros_like(X)}, tmp_path)[0].any()


@pytest.mark.parametrize(
    ("op_type", "opset", "attributes", "shape"),
    [
        ("Softmax", 11, {}, X.shape),
        ("GlobalAveragePool", 18, {}, None),
        ("LRN", 18, {"size": 3}, X.shape),
        ("ReduceMean", 18, {"noop_with_empty_axes": 1}, X.shape),
    ],
)
def test_what_cannot_be_opened_is_returned_and_left_as_it_was(op_type, opset, attributes, shape, tmp_path):
    model = model_of(op_type, opset, attributes, {}, shape=shape)
    node = model.graph[0]
    assert open_sums(model) == (node,)
    assert [*model.graph] == [node]
    assert not model.graph.initializers
    assert np.isfinite(run(model, {"x": X}, tmp_path)[0]).all()


def test_integers_have_no_fp16():
    model = model_of("ReduceMean", 18, {}, {}, dtype=TensorProto.INT64)
    assert open_sums(model) == ()
    assert [node.op_type for node in model.graph] == ["ReduceMean"]


def test_counts_are_marked_as_no_tensor_of_the_engine():
    model = model_of("ReduceMean", 18, {}, {}, shape=("n", "c"))
    open_sums(model)
    assert [n.op_type for n in model.graph if n.metadata_props.get(ROLE_KEY) == EXACT] == ["Cast"]


def test_branches_and_local_functions(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            x = ferry.mark_tensors("here", self.norm(x))
            return torch.cond(x.sum() > 0, lambda x: x.softmax(-1) + 1, lambda x: -x.mean(-1, keepdim=True) + x, (x,))

    exported = ferry.export(Net().eval(), torch.from_numpy(X), apply_marks=True)
    expected = run(exported, {"x": X}, tmp_path)
    model = exported.model.clone()
    assert open_sums(model) == ()
    assert not {"LayerNormalization", "Softmax", "ReduceMean"} & {n.op_type for g in model.graphs() for n in g}
    assert not model.functions
    np.testing.assert_allclose(run(as_exported(model), {"x": X}, tmp_path)[0], expected[0], rtol=2e-5, atol=2e-6)
    assert {"norm"} <= {n.metadata_props["torchferry.module"] for n in model.graph}
