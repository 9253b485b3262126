"""Nodes in old forms do the same in the form of the graph's opset; what ONNX does not allow is refused by name."""

import contextlib
import doctest
import io
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from torchferry.core.errors import OperatorError
from torchferry.graph import validity
from torchferry.graph.validity import make_valid

OPSETS = (18, 20, 23)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
IMAGE = RNG.standard_normal((1, 2, 4, 6)).astype(np.float32)
PAIR = np.float32([1, 2])


def fragment(nodes, inputs, outputs, opset=20, typed=True, shaped=True, initializers=(), domains=()):
    """Make a fragment of nodes; ``inputs`` are arrays by name, whose types may be withheld."""
    infos = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(a.dtype), [f"{name}{i}" for i in range(a.ndim)] if shaped else None
        )
        if typed
        else onnx.ValueInfoProto(name=name)
        for name, a in inputs.items()
    ]
    graph = helper.make_graph(nodes, "g", infos, [onnx.ValueInfoProto(name=o) for o in outputs], list(initializers))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 9
    return model


def run(model, inputs):
    """Run a fragment in ONNX Runtime, which has kept the kernels of old opsets; its inputs get types."""
    typed = onnx.ModelProto.FromString(model.SerializeToString())
    for info in typed.graph.input:
        array = inputs[info.name]
        elem_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        info.CopyFrom(helper.make_tensor_value_info(info.name, elem_type, [None] * array.ndim))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(typed.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, inputs)


def node(operator, inputs, outputs=("y",), **attributes):
    return helper.make_node(operator, list(inputs), list(outputs), **attributes)


BN = {"x": IMAGE, "s": PAIR, "b": PAIR, "m": PAIR, "v": PAIR}
OLD = {  # the form, an opset at which it is valid and ONNX Runtime has it, its inputs
    "squeeze": (node("Squeeze", "x", axes=[0]), 11, {"x": IMAGE}),
    "unsqueeze": (node("Unsqueeze", "x", axes=[0, -1]), 11, {"x": X}),
    "upsample_by_attribute": (node("Upsample", "x", scales=[1.0, 1.0, 2.0, 3.0], mode="nearest"), 7, {"x": IMAGE}),
    "upsample_linear": (node("Upsample", "x", scales=[1.0, 1.0, 2.0, 1.5], mode="linear"), 7, {"x": IMAGE}),
    "upsample_by_input": (node("Upsample", "xs", mode="nearest"), 9, {"x": IMAGE, "s": np.float32([1, 1, 1.7, 2])}),
    "resize_nearest": (node("Resize", "xs"), 10, {"x": IMAGE, "s": np.float32([1, 1, 2.3, 0.6])}),
    "resize_smaller": (node("Resize", "xs"), 10, {"x": IMAGE, "s": np.float32([1, 1, 0.7, 0.4])}),
    "resize_linear": (node("Resize", "xs", mode="linear"), 10, {"x": IMAGE, "s": np.float32([1, 1, 2.3, 0.6])}),
    "clip": (node("Clip", "x", min=-0.5, max=0.25), 6, {"x": X}),
    "clip_min": (node("Clip", "x", min=-0.5), 6, {"x": X}),
    "clip_max": (node("Clip", "x", max=0.5), 6, {"x": X}),
    "clip_double": (node("Clip", "x", min=0.0, max=6.0), 7, {"x": X.astype(np.float64)}),
    "pad_reflect": (node("Pad", "x", pads=[0, 0, 1, 0, 1, 2], mode="reflect"), 2, {"x": X}),
    "pad_value": (node("Pad", "x", pads=[0, 1, 0, 0, 1, 0], value=2.0), 2, {"x": X}),
    "pad_double": (node("Pad", "x", pads=[0, 1, 0, 0, 1, 0], value=2.0), 7, {"x": X.astype(np.float64)}),
    "slice": (node("Slice", "x", axes=[1, 2], starts=[-2, 1], ends=[9, -1]), 1, {"x": X}),
    "slice_all_axes": (node("Slice", "x", starts=[0, 1], ends=[1, 3]), 1, {"x": X}),
    "reduce_sum": (node("ReduceSum", "x", axes=[1, -1], keepdims=0), 11, {"x": X}),
    "reduce_mean": (node("ReduceMean", "x", axes=[1], keepdims=1), 13, {"x": X}),
    "reduce_max": (node("ReduceMax", "x", axes=[-1], keepdims=0), 13, {"x": X}),
    "reduce_l2": (node("ReduceL2", "x", axes=[0, 2], keepdims=0), 13, {"x": X}),
    "reduce_log_sum_exp": (node("ReduceLogSumExp", "x", axes=[2]), 13, {"x": X}),
    "dropout": (node("Dropout", "x", ratio=0.5), 10, {"x": X}),
    "dropout_is_test": (node("Dropout", "x", ratio=0.5, is_test=1), 6, {"x": X}),
    "split_sizes": (node("Split", "x", ["y", "z"], axis=1, split=[1, 2]), 11, {"x": X}),
    "split_equal": (node("Split", "x", ["y", "z"], axis=-1), 11, {"x": X}),
    "topk": (node("TopK", "x", ["y", "z"], axis=1, k=2), 1, {"x": X}),
    "batch_norm_spatial": (node("BatchNormalization", BN, spatial=1, epsilon=0.1), 7, BN),
    "batch_norm_is_test": (node("BatchNormalization", BN, is_test=1, epsilon=0.1), 7, BN),
    "scatter": (
        node("Scatter", "xiu", axis=1),
        9,
        {"x": X[0], "i": np.int64([[2, 0], [1, 3]]), "u": np.float32([[7, 8], [9, 10]])},
    ),
    "grid_sample": (
        node("GridSample", "xg", mode="bicubic", align_corners=1),
        16,
        {"x": IMAGE, "g": RNG.uniform(-1, 1, (1, 3, 3, 2)).astype(np.float32)},
    ),
    "softmax_needs_nothing": (node("Softmax", "x", axis=1), 18, {"x": X}),
    "thresholded_relu": (node("ThresholdedRelu", "x", alpha=0.5), 10, {"x": X}),
    "gemm_broadcast": (
        node("Gemm", "abc", alpha=0.5, broadcast=1),
        7,
        {"a": X[0], "b": X[1].T.copy(), "c": X[0, :, :3]},
    ),
    "cast_by_name": (node("Cast", "x", to="INT64"), 1, {"x": X}),
    "add_at_axis": (node("Add", "xb", broadcast=1, axis=1), 6, {"x": X, "b": np.float32([1, 2, 3])}),
    "relu_in_place": (node("Relu", "x", consumed_inputs=[0]), 1, {"x": X}),
    "add_suffix": (node("Add", "ab", broadcast=1), 7, {"a": X, "b": X[0]}),
}
# Attributes that only confirm what is done anyway; forms too old for the engine are run without them.
CONFIRMING = {"is_test", "broadcast"}
# What no engine runs any more.
NEVER_RUN = {
    "clip_double": [np.clip(X.astype(np.float64), 0, 6)],
    "cast_by_name": [X.astype(np.int64)],
    "add_at_axis": [X + np.float32([1, 2, 3])[:, None]],
    "relu_in_place": [np.maximum(X, 0)],
}
TYPINGS = ("typed", "rankless", "unknown")


def oracle(case):
    if case in NEVER_RUN:
        return NEVER_RUN[case]
    old, opset, inputs = OLD[case]
    plain = onnx.NodeProto.FromString(old.SerializeToString())
    kept = [a for a in plain.attribute if a.name not in CONFIRMING]
    del plain.attribute[:]
    plain.attribute.extend(kept)
    return run(fragment([plain], inputs, old.output, max(opset, 7)), inputs)


class TestOldForms:
    @pytest.mark.parametrize(
        ("case", "typing"),
        [(case, typing) for case in OLD for typing in TYPINGS if case != "add_at_axis" or typing == "typed"],
    )
    def test_the_new_form_gives_what_the_old_one_did(self, case, typing):
        old, _, inputs = OLD[case]
        expected = oracle(case)
        for opset in OPSETS:
            given = fragment([old], inputs, old.output, typed=typing != "unknown", shaped=typing == "typed")
            valid = make_valid(given, opset)
            assert [i.version for i in valid.opset_import] == [opset]
            assert valid.graph.input == given.graph.input
            assert valid.graph.output == given.graph.output
            for got, wanted in zip(run(valid, inputs), expected, strict=True):
                assert got.dtype == wanted.dtype
                np.testing.assert_allclose(got, wanted, 1e-5, 1e-6)
            assert make_valid(valid, opset) == valid

    def test_an_axis_of_a_limited_broadcast_needs_the_ranks(self):
        old, _, inputs = OLD["add_at_axis"]
        with pytest.raises(OperatorError, match="'axis' needs the rank of 'x'"):
            make_valid(fragment([old], inputs, ["y"], typed=False), 18)

    def test_forms_of_several_opsets_in_one_fragment(self):
        nodes = [
            node("Unsqueeze", "x", "a", axes=[0]),
            node("Relu", "a", "b"),
            node("Clip", "b", "c", max=1.0),
            helper.make_node("Double", ["c"], ["d"], domain="my", factor=2),
            node("ReduceMean", ["c", "axes"], "y", keepdims=0),
        ]
        axes = numpy_helper.from_array(np.int64([0]), "axes")
        given = fragment(nodes, {"x": X}, ["y"], initializers=[axes])
        valid = make_valid(given, 18)
        assert {each.domain: each.version for each in valid.opset_import} == {"": 18, "my": 1}
        (kept,) = (each for each in valid.graph.node if each.domain == "my")
        assert kept == nodes[3]
        standard = fragment(nodes[:3] + nodes[4:], {"x": X}, ["y"], initializers=[axes])
        (got,) = run(make_valid(standard, 18), {"x": X})
        np.testing.assert_allclose(got, np.clip(X, 0, 1), 1e-6)

    def test_a_domain_keeps_the_version_that_it_has(self):
        given = fragment([helper.make_node("Double", ["x"], ["y"], domain="my")], {"x": X}, ["y"])
        given.opset_import.append(helper.make_opsetid("my", 7))
        assert {each.domain: each.version for each in make_valid(given, 18).opset_import} == {"": 18, "my": 7}

    def test_nodes_of_branches_and_loops(self):
        def graph(name, old):
            return helper.make_graph([old], name, [], [onnx.ValueInfoProto(name=old.output[0])])

        branches = node(
            "If",
            ["c"],
            then_branch=graph("then", node("Clip", ["x"], ["t"], min=0.0)),
            else_branch=graph("else", node("ReduceSum", ["x"], ["e"], axes=[1], keepdims=1)),
        )
        for typed in (True, False):
            given = fragment([branches], {"c": np.array(True), "x": X}, ["y"], typed=typed)
            valid = make_valid(given, 18)
            assert make_valid(valid, 18) == valid
            for flag, expected in ((True, np.maximum(X, 0)), (False, X.sum(1, keepdims=True))):
                (got,) = run(valid, {"c": np.array(flag), "x": X})
                np.testing.assert_allclose(got, expected, 1e-5, 1e-6)

    def test_nodes_of_a_loop(self):
        body = helper.make_graph(
            [
                node("ReduceSum", ["v"], ["s"], axes=[1], keepdims=1),
                node("Add", ["v", "s"], ["v_next"]),
                node("Identity", ["go"], ["go_on"]),
            ],
            "body",
            [helper.make_tensor_value_info(n, t, []) for n, t in (("i", TensorProto.INT64), ("go", TensorProto.BOOL))]
            + [onnx.ValueInfoProto(name="v")],
            [onnx.ValueInfoProto(name=name) for name in ("go_on", "v_next")],
        )
        inputs = {"times": np.array(2), "x": X}
        (got,) = run(make_valid(fragment([node("Loop", ["times", "", "x"], body=body)], inputs, ["y"]), 18), inputs)
        once = X + X.sum(1, keepdims=True)
        np.testing.assert_allclose(got, once + once.sum(1, keepdims=True), 1e-5, 1e-5)

    def test_both_names_of_the_standard_domain(self):
        old = node("Squeeze", "x", axes=[0], domain="ai.onnx")
        given = fragment([old], {"x": IMAGE}, ["y"])
        given.opset_import[0].domain = "ai.onnx"
        valid = make_valid(given, 18)
        np.testing.assert_array_equal(run(valid, {"x": IMAGE})[0], IMAGE[0])
        assert [(each.domain, each.version) for each in valid.opset_import] == [("", 18)]

    def test_properties_and_the_name_of_a_node_stay(self):
        old = node("Squeeze", "x", axes=[0])
        old.name = "mine"
        old.metadata_props.add(key="torchferry.source", value="net.py:3")
        valid = make_valid(fragment([old], {"x": IMAGE}, ["y"]), 20)
        assert valid.graph.node[-1].name == "mine"
        assert {p.value for each in valid.graph.node for p in each.metadata_props} == {"net.py:3"}

    def test_new_names_are_new(self):
        nodes = [node("Clip", "x", min=0.0), node("Relu", ["y"], ["y_min"])]
        valid = make_valid(fragment(nodes, {"x": X}, ["y", "y_min"]), 20)
        names = [name for each in valid.graph.node for name in each.output]
        assert len(set(names)) == len(names)

    def test_the_fragment_given_is_left_alone(self):
        given = fragment([OLD["pad_value"][0]], {"x": X}, ["y"])
        before = given.SerializeToString(deterministic=True)
        make_valid(given, 20)
        assert given.SerializeToString(deterministic=True) == before


FLOATS = {"x": X, "z": X}
MIXED = {"x": X, "i": X.astype(np.int64)}
REFUSED = {  # the node, its inputs, the opset, message, hint
    "later_operator": (
        node("Gelu", "x"),
        FLOATS,
        18,
        "'Gelu' exists from opset 20 on, the graph has 18",
        "ask for opset 20",
    ),
    "later_form": (
        node("ReduceSum", "xi"),
        MIXED,
        11,
        "'ReduceSum' has this form from opset 13 on, the graph has 11: 'ReduceSum' of opset 11 takes 1 inputs",
        "ask for opset 13",
    ),
    "later_value": (
        node("Pad", "xi", mode="wrap"),
        MIXED,
        18,
        "'Pad' has this form from opset 19 on, the graph has 18: 'mode' of 'Pad' may be 'wrap' from opset 19 on",
        "ask for opset 19",
    ),
    "unknown": (node("Sofmax", "x"), FLOATS, 18, "ONNX has no operator 'Sofmax'", "did you mean 'Softmax'"),
    "attribute": (node("Softmax", "x", axes=1), FLOATS, 18, "'Softmax' of opset 13 has no attribute 'axes'", "'axis'"),
    "type_of_attribute": (
        node("Softmax", "x", axis=1.0),
        FLOATS,
        18,
        "attribute 'axis' of 'Softmax' of opset 13 is INT, got FLOAT",
        None,
    ),
    "missing_attribute": (
        node("Concat", "xz"),
        FLOATS,
        18,
        "'Concat' of opset 13 needs the attribute 'axis', got none",
        None,
    ),
    "too_few_inputs": (node("Conv", "x"), FLOATS, 18, "'Conv' of opset 11 takes 2 to 3 inputs (X, W, B), got 1", None),
    "too_many_inputs": (node("Relu", "xz"), FLOATS, 18, "'Relu' of opset 14 takes 1 inputs (X), got 2", None),
    "left_out": (node("Add", ["", "x"]), FLOATS, 18, "'Add' of opset 14 needs its input 'A', which is left out", None),
    "outputs": (node("Relu", "x", ["y", "w"]), FLOATS, 18, "'Relu' of opset 14 has 1 outputs, got 2", None),
    "gone": (node("Upsample", "x"), FLOATS, 18, "'Upsample' of opset 9 takes 2 inputs (X, scales), got 1", None),
    "training": (
        node("Dropout", "x", ratio=0.5, is_test=0),
        FLOATS,
        18,
        "'Dropout' cannot be written for opset 18: Attribute is_test must not have value",
        None,
    ),
    "two_dtypes": (
        node("Mul", "xi"),
        MIXED,
        18,
        "input 'B' of 'Mul' ('i') is tensor(int64), expected tensor(float) as 'A' is",
        "cast one of them",
    ),
    "dtype": (
        node("Conv", ["i", "i"]),
        MIXED,
        18,
        "input 'X' of 'Conv' ('i') is tensor(int64), opset 18 expects tensor(double), tensor(float), tensor(float16)",
        "cast it",
    ),
    "dtype_of_many": (
        node("Concat", ["x", "x", "i"], axis=0),
        MIXED,
        18,
        "input 'inputs[2]' of 'Concat' ('i') is tensor(int64), expected tensor(float) as 'inputs[0]' is",
        "cast one of them",
    ),
    "shapes": (
        node("MatMul", ["k", "k"]),
        {"k": np.zeros((2, 3), np.float32)},
        18,
        "'MatMul' does not take inputs of these shapes ('k' [2, 3], 'k' [2, 3]): Incompatible dimensions for matrix",
        None,
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_onnx_does_not_allow(self, case):
        wrong, inputs, opset, message, hint = REFUSED[case]
        wrong = onnx.NodeProto.FromString(wrong.SerializeToString())
        wrong.name = "the_node"
        given = fragment([wrong], inputs, wrong.output)
        if case == "shapes":
            for info in given.graph.input:
                info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, inputs[info.name].shape))
        with pytest.raises(OperatorError) as caught:
            make_valid(given, opset)
        assert caught.value.message.startswith(message)
        assert hint is None or hint in (caught.value.hint or "")
        assert caught.value.where is None
        assert caught.value.node_name == "the_node"

    def test_a_dtype_that_shows_only_after_other_nodes(self):
        nodes = [node("Cast", "x", "a", to=TensorProto.INT64), node("Squeeze", "a", "b", axes=[0]), node("Mul", "xb")]
        with pytest.raises(OperatorError, match=r"input 'B' of 'Mul' \('b'\) is tensor\(int64\)"):
            make_valid(fragment(nodes, {"x": IMAGE}, ["y"]), 18)

    def test_a_dtype_that_only_the_caller_can_know(self):
        nodes = [helper.make_node("Count", ["x"], ["a"], domain="my"), node("Mul", "xa")]
        given = fragment(nodes, {"x": X}, ["y"], domains=["my"])
        assert list(make_valid(given, 18).graph.node) == nodes
        given.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.INT64, None))
        with pytest.raises(OperatorError, match="is tensor\\(int64\\), expected tensor\\(float\\)"):
            make_valid(given, 18)

    def test_what_is_not_known_is_not_refused(self):
        nodes = [
            helper.make_node("Anything", ["x"], ["a"], domain="my"),
            node("Mul", "ax", "b"),
            node("MatMul", "bi", "c"),
            node("Conv", ["c", "i"]),
        ]
        given = fragment(nodes, MIXED, ["y"], typed=False, domains=["my"])
        assert list(make_valid(given, 18).graph.node) == nodes

    @pytest.mark.parametrize("opset", [0, 999])
    def test_an_opset_that_nobody_knows(self, opset):
        with pytest.raises(OperatorError, match=f"opset {opset} is not known, ONNX .* knows 1 to"):
            make_valid(fragment([node("Relu", "x")], {"x": X}, ["y"]), opset)


VALID = st.lists(
    st.sampled_from([case for case, (old, *_) in OLD.items() if len(old.output) == 1 and case != "add_at_axis"]),
    max_size=4,
)


@given(VALID, st.sampled_from(OPSETS), st.booleans())
@settings(max_examples=30, deadline=None)
def test_what_is_valid_is_kept_as_it_is(cases, opset, typed):
    nodes, inputs = [], {}
    for number, case in enumerate(cases):
        each = onnx.NodeProto.FromString(OLD[case][0].SerializeToString())
        each.input[:] = [f"{name}{number}" for name in each.input]
        each.output[:] = [f"y{number}"]
        nodes.append(each)
        inputs |= {f"{name}{number}": array for name, array in OLD[case][2].items()}
    once = make_valid(fragment(nodes, inputs, [f"y{n}" for n in range(len(cases))], typed=typed), opset)
    assert make_valid(once, opset) == once


def test_every_example_of_onnx_itself_is_valid_and_kept():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [case.model for case in collect_testcases(None) if case.model]
    kept = 0
    for model in models:
        opset = {each.domain: each.version for each in model.opset_import}.get("")
        if opset:
            assert make_valid(model, opset).graph == model.graph
            kept += 1
    assert kept > 1000


def test_doctests():
    assert doctest.testmod(validity).failed == 0
