"""``ferry.fp16.emulate``: what true FP16 gives, to the bit, and the right tensor named."""

import dataclasses
import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import torchferry as ferry
from torchferry import backends
from torchferry.core.errors import ConfigError, FormatError, InputError, VerificationError
from torchferry.core.target import DEFAULT_BACKEND
from torchferry.graph import as_exported
from torchferry.precision.rounding import rounded, rounding_nodes

EXACT_BITS = [0, 1 << 31, 0x7F800000, 0xFF800000, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x477FE000, 0x477FEFFF, 0x477FF000]


def model(nodes, inputs, outputs, weights=(), opset=18):
    """A model whose inputs and outputs are ``{name: (dtype, shape)}`` and whose weights are named arrays."""
    infos = [[helper.make_tensor_value_info(n, *spec) for n, spec in given.items()] for given in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *infos, [numpy_helper.from_array(a, n) for n, a in dict(weights).items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
node = helper.make_node


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """For each rounding a graph that rounds its input, run as the emulator runs graphs."""
    sessions = {}
    for kind in ("fp16", "ideal"):
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
        nodes, y = rounding_nodes(x, kind)
        graph = ir.Graph([x], [y], nodes=nodes, opset_imports={"": 18}, name="g")
        exported = as_exported(ir.Model(graph, ir_version=10))
        sessions[kind] = backends.get(DEFAULT_BACKEND).trial(exported, tmp_path_factory.mktemp("trial"))
    return lambda kind, x: next(iter(sessions[kind].run({"x": x}).values()))


def eleven_bits(x):
    mantissa, exponent = np.frexp(x.astype(np.float64))
    with np.errstate(over="ignore"):
        return np.ldexp(np.rint(mantissa * 2048) / 2048, exponent).astype(np.float32)


def half(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize(("kind", "expected"), [("fp16", half), ("ideal", eleven_bits)])
@settings(max_examples=100, deadline=None)
@given(bits=st.lists(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(EXACT_BITS)), min_size=1, max_size=50))
def test_rounding_is_exact_bit_by_bit(engines, kind, expected, bits):
    x = np.array(bits, np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    for got in (engines(kind, x), rounded(x, kind)):
        np.testing.assert_array_equal(got, expected(x))
        if kind == "fp16":  # down to the sign of zero, which the engine's Where loses
            np.testing.assert_array_equal(np.signbit(got), np.signbit(x))


@pytest.mark.parametrize(("kind", "expected"), [("fp16", half), ("ideal", eleven_bits)])
def test_rounding_of_every_tie_goes_to_even(engines, kind, expected):
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    x = np.concatenate([ties, -ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    for got in (engines(kind, x), rounded(x, kind)):
        np.testing.assert_array_equal(got, expected(x))


@pytest.mark.parametrize("kind", ["fp16", "ideal"])
def test_what_is_not_a_number_stays_so(engines, kind):
    x = np.array([np.nan, 1], np.float32)
    assert np.isnan(engines(kind, x)).tolist() == np.isnan(rounded(x, kind)).tolist() == [True, False]


class Grows(nn.Module):
    """Overflows in the second block, where its own code squares."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Sequential(nn.Linear(8, 8), Squares())
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.second(self.first(x))).tanh()


class Squares(nn.Module):
    def forward(self, x):
        return x * x  # the line


def test_the_first_bad_tensor_is_named_with_magnitude_module_and_line():
    net, x = Grows().eval(), torch.randn(4, 8) * 3000
    emulation = ferry.fp16.emulate(net, x)
    bad = emulation.first_bad
    assert (bad.operator, bad.kind, bad.reason, bad.module) == ("Mul", "tensor", "overflow", "second.1")
    assert "return x * x" in bad.source
    expected = (net.second[0](net.first(x)) ** 2).abs().max().item()
    assert bad.magnitude == pytest.approx(expected, rel=0.01)
    assert [tensor.is_origin for tensor in emulation.bad] == [True] + [False] * (len(emulation.bad) - 1)
    report = emulation.report(x)
    assert [f.code for f in report.findings if f.severity == "error"] == ["fp16-overflow"]
    assert "second.1 at" in report.findings[0].where
    with pytest.raises(VerificationError, match="reaches"):
        report.raise_for_failure()


def test_tensors_agree_with_numpy_step_by_step():
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((8, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    nodes = [node("Mul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["a"]), node("Exp", ["a"], ["y"])]
    onnx_model = model(nodes, {"x": (F32, [8, 8])}, {"y": (F32, [8, 8])}, {"w": w, "b": b})
    x = rng.standard_normal((8, 8)).astype(np.float32)
    h = np.float16
    expected = np.exp((x.astype(h) * w.astype(h) + b.astype(h)).astype(np.float32)).astype(h)
    (got,) = ferry.fp16.emulate(onnx_model).run((x,)).values()
    np.testing.assert_array_equal(got, expected.astype(np.float32))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v


NETS = {
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 10)),
    "sigmoids": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.AvgPool2d(2), nn.Sigmoid()),
    "attention": lambda: nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten(2), nn.Linear(4, 16), Attends()),
    "groups": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Hardswish(), nn.AdaptiveAvgPool2d(1)),
}


@pytest.mark.parametrize("factor", [1.0, 3e4], ids=["ordinary", "large"])
@pytest.mark.parametrize("name", NETS)
def test_the_verdict_is_that_of_half(name, factor):
    net = NETS[name]().eval()
    x = (torch.rand(2, 3, 8, 8) - 0.3) * 1.9 * factor
    for layer in net:
        if factor > 1 and isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= 8
    with torch.no_grad():
        expected = net.half()(x.half()).float().numpy()
    net.float()
    (got,) = ferry.fp16.emulate(net, x).run(x).values()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    finite = np.isfinite(expected)
    scale = np.abs(expected[finite]).max(initial=1e-3)
    np.testing.assert_allclose(got[finite], expected[finite], atol=6e-3 * scale)


def test_an_input_beyond_the_range_is_the_origin():
    emulation = ferry.fp16.emulate(nn.ReLU(), torch.tensor([[1.0, 7e4]]))
    assert dataclasses.astuple(emulation.first_bad)[:5] == ("input", "input", "", 7e4, "overflow")
    assert emulation.first_bad.where == "tensor 'input'"


def test_numbers_up_to_65520_are_rounded_down_and_fit():
    assert ferry.fp16.emulate(nn.ReLU(), torch.tensor([[65519.0]])).first_bad is None


def test_a_mask_of_minus_a_billion_is_a_constant_out_of_range():
    class Masks(nn.Module):
        def forward(self, x, mask):
            return x.masked_fill(mask, -1e9).softmax(-1)

    arguments = (torch.randn(2, 4), torch.tensor([[True, False, False, True]]))
    emulation = ferry.fp16.emulate(Masks(), arguments)
    assert (emulation.first_bad.kind, emulation.first_bad.magnitude) == ("constant", 1e9)
    assert "masked_fill" in emulation.first_bad.source
    report = emulation.report(arguments)
    assert [f.code for f in report.findings if f.severity == "error"] == ["constant-out-of-range"]
    assert np.isfinite(emulation.run(arguments)["softmax"]).all()


def test_what_is_infinite_in_fp32_too_is_not_bad():
    class Masks(nn.Module):
        def forward(self, x, mask):
            return (x + mask).softmax(-1)

    arguments = (torch.randn(2, 4), torch.tensor([[0.0, -torch.inf, 0, 0]]))
    report = ferry.fp16.emulate(Masks(), arguments).report(arguments)
    assert report.passed
    assert [f.code for f in report.findings] == ["infinite-in-fp32"]


def test_a_division_by_what_fp16_flushes_to_zero():
    class Divides(nn.Module):
        def forward(self, x):
            return 1 / (x * 1e-3)

    bad = ferry.fp16.emulate(Divides(), torch.full((1, 3), 1e-5)).first_bad
    assert (bad.reason, bad.operator) == ("infinite", "Reciprocal")


def test_nan_in_one_place():
    class Root(nn.Module):
        def forward(self, x):
            return ((x * 1e4 + 1) - x * 1e4).sub(0.5).sqrt()

    x = torch.tensor([[0.0, 0.0, 1.0]])
    emulation = ferry.fp16.emulate(Root(), x)
    assert [(t.operator, t.reason) for t in emulation.bad] == [("Sqrt", "nan")]
    assert [f.code for f in emulation.report(x).findings] == ["fp16-nan"]


def test_strict_sees_the_squares_inside_a_norm():
    net, x = nn.LayerNorm(64).eval(), torch.randn(2, 64) * 400
    assert ferry.fp16.emulate(net, x).first_bad is None
    bad = ferry.fp16.emulate(net, x, mode="strict").first_bad
    assert (bad.reason, bad.operator) == ("overflow", "Mul")
    assert "layer_norm" in bad.name


def test_strict_bounds_accumulators_without_rounding_them():
    net = nn.Linear(64, 1, bias=False).eval()
    net.weight.data = torch.tensor([[1.0, -1.0] * 32])
    x = torch.full((1, 64), 3000.0)
    assert ferry.fp16.emulate(net, x).accumulators == ()
    emulation = ferry.fp16.emulate(net, x, mode="strict")
    assert emulation.first_bad is None
    assert [(a.bound, a.operator) for a in emulation.accumulators] == [(64 * 3000.0, "Gemm")]
    report = emulation.report(x)
    assert report.passed
    assert [f.code for f in report.findings] == ["accumulator-overflow"]


def test_strict_says_what_it_could_not_open():
    graph = model([node("LRN", ["x"], ["y"], size=3)], {"x": (F32, [1, 4, 2, 2])}, {"y": (F32, [1, 4, 2, 2])})
    report = ferry.fp16.emulate(graph, mode="strict").report(np.ones((1, 4, 2, 2), np.float32))
    assert [f.code for f in report.findings] == ["sums-not-opened"]


def test_ideal_never_overflows_and_is_the_floor_of_the_error():
    net, x = Grows().eval(), torch.randn(4, 8) * 3000
    assert ferry.fp16.emulate(net, x, mode="ideal").first_bad is None
    (error,) = ferry.fp16.emulate(net, x).errors(x).values()
    assert (error.relative, error.ratio) == (np.inf, np.inf)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    (error,) = ferry.fp16.emulate(net, x / 3000).errors(x / 3000).values()
    assert 1e-5 < error.ideal < 1e-2
    assert 0.9 < error.ratio < 1.1


def test_several_batches_are_taken_together():
    batches = [(torch.full((1, 4), v),) for v in (1.0, 1e5, 1e6)]
    emulation = ferry.fp16.emulate(nn.ReLU(), iter(batches))
    assert emulation.first_bad.magnitude == 1e6
    report = ferry.fp16.emulate(nn.ReLU(), batches[0]).report(iter(batches))
    assert report.facts["tensors"]["batches"] == "3"
    assert not json.loads(report.to_json())["passed"]


def test_batches_of_several_sizes():
    source = ferry.Source(nn.Sequential(nn.Linear(3, 2)), torch.rand(2, 3), dynamic_shapes={"input": {0: "n"}})
    report = ferry.fp16.emulate(source).report([(torch.rand(n, 3),) for n in (1, 4, 7)])
    assert report.title == "FP16 emulation (acc32) of Sequential"
    assert report.passed


def test_the_subnormal_share():
    x = torch.tensor([[1e-5, 1e-5, 0.0, 1.0]])
    report = ferry.fp16.emulate(nn.Sigmoid(), x).report(x)
    assert report.facts["tensors"]["subnormal"] == "50.0% of 'input'"


# Other tools' files -----------------------------------------------------------------------------------------------


def half_file(weight, *, island=False):
    """A file in FP16 whose product overflows, in FP16 or, as an island, between casts to FP32 and back."""
    wide = [node("Cast", ["x"], ["x32"], to=F32), node("Cast", ["w"], ["w32"], to=F32)]
    nodes = [
        *(wide if island else []),
        node("MatMul", ["x32", "w32"] if island else ["x", "w"], ["m"]),
        node("Mul", ["m", "tiny32" if island else "tiny"], ["s"]),
        *([node("Cast", ["s"], ["y"], to=F16)] if island else [node("Identity", ["s"], ["y"])]),
    ]
    weights = {"w": weight.astype(np.float16), "tiny": np.float16(0.001), "tiny32": np.float32(0.001)}
    weights.pop("tiny" if island else "tiny32")
    return model(nodes, {"x": (F16, [2, 4])}, {"y": (F16, [2, 4])}, weights)


@pytest.mark.parametrize("island", [False, True])
def test_a_file_in_fp16_is_audited_as_it_is(island):
    weight = np.full((4, 4), 100.0)
    x = np.full((2, 4), 1000, np.float16)
    emulation = ferry.fp16.emulate(half_file(weight, island=island), (x,))
    (got,) = emulation.run((x,)).values()
    if island:
        assert emulation.first_bad is None
        np.testing.assert_array_equal(got, np.float32(np.float16(400_000 * np.float32(0.001))))
    else:
        assert (emulation.first_bad.name, emulation.first_bad.magnitude) == ("m", 400_000)
        assert np.isinf(got).all()
    assert got.dtype == np.float32


@pytest.mark.parametrize(
    ("value", "codes"),
    [(np.inf, ["constant-out-of-range"]), (65504, ["fp16-overflow", "constant-clipped"]), (-np.inf, [])],
)
def test_constants_of_such_a_file(value, codes):
    weight = np.zeros((4, 4))
    weight[0, 0] = value
    x = np.full((2, 4), 2, np.float32)
    report = ferry.fp16.emulate(half_file(weight)).report((x,))
    assert [f.code for f in report.findings if f.code != "infinite-in-fp32"] == codes


def test_a_file_whose_nodes_stand_in_no_order():
    nodes = [node("Cast", ["h"], ["y"], to=F32), node("Exp", ["c"], ["h"]), node("Cast", ["x"], ["c"], to=F16)]
    graph = model(nodes, {"x": (F32, [1])}, {"y": (F32, [1])})
    assert ferry.fp16.emulate(graph, (np.float32([12]),)).first_bad.name == "h"
    graph.graph.node[2].input[0] = "y"
    with pytest.raises(FormatError, match="cannot be put in an order"):
        ferry.fp16.emulate(graph)


def test_constants_and_attributes_in_fp16():
    half_one = numpy_helper.from_array(np.array([1.5], np.float16))
    nodes = [
        node("Constant", [], ["c"], value=half_one),
        node("Shape", ["x"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["ones"], value=half_one),
        node("Add", ["x", "c"], ["a"]),
        node("Mul", ["a", "ones"], ["y"]),
    ]
    graph = model(nodes, {"x": (F16, ["n"])}, {"y": (F16, ["n"])})
    x = np.array([1, 60000], np.float16)
    emulation = ferry.fp16.emulate(graph, (x,))
    assert emulation.run((x,))["y"].tolist() == [3.75, np.inf]
    assert emulation.first_bad.name == "y"


# Kinds of graphs --------------------------------------------------------------------------------------------------


def test_inside_branches_and_loops_tensors_are_rounded():
    class Branches(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: (x * 1000) * 0.001, lambda x: x * 0.3, (x,))

    net = Branches()
    emulation = ferry.fp16.emulate(net, torch.tensor([[100.0, 1.0]]))
    (got,) = emulation.run(torch.tensor([[100.0, 1.0]])).values()
    assert np.isinf(got[0, 0])
    assert emulation.first_bad.operator == "If"
    (other,) = emulation.run(torch.tensor([[-100.0, -1.0]])).values()
    np.testing.assert_array_equal(other, half(half(np.float32([[-100, -1]])) * half(np.float32(0.3))))


def test_a_loop_rounds_at_every_turn():
    scalar = {"i": (TensorProto.INT64, []), "go": (TensorProto.BOOL, []), "a": (F32, [1])}
    infos = [helper.make_tensor_value_info(name, *spec) for name, spec in scalar.items()]
    outputs = [
        helper.make_tensor_value_info("going", TensorProto.BOOL, []),
        helper.make_tensor_value_info("b", F32, [1]),
    ]
    body = helper.make_graph(
        [node("Identity", ["go"], ["going"]), node("Add", ["a", "step"], ["b"])], "g", infos, outputs
    )
    weights = {"turns": np.int64(3000), "always": np.array(True), "step": np.ones(1, np.float32)}
    graph = model(
        [node("Loop", ["turns", "always", "x"], ["y"], body=body)], {"x": (F32, [1])}, {"y": (F32, [1])}, weights
    )
    (got,) = ferry.fp16.emulate(graph).run((np.zeros(1, np.float32),)).values()
    assert got == 2048  # where 2048 + 1 is a tie that goes to even


def test_what_is_huge_in_fp32_is_not_mistaken_for_infinite():
    x = torch.full((1, 1000), 1e36)
    emulation = ferry.fp16.emulate(nn.Sequential(nn.ReLU(), nn.Sigmoid()), x)
    assert emulation.first_bad.magnitude == pytest.approx(1e36)


def test_an_input_that_is_an_output_too():
    graph = model([node("Exp", ["x"], ["y"])], {"x": (F32, [2])}, {"y": (F32, [2]), "x": (F32, [2])})
    outputs = ferry.fp16.emulate(graph).run((np.float32([0.1, 1e5]),))
    np.testing.assert_array_equal(outputs["x"], half(np.float32([0.1, 1e5])))


def test_values_of_a_fp16_file_that_are_cast_like_another():
    nodes = [node("CastLike", ["x", "w"], ["c"]), node("Mul", ["c", "w"], ["y"])]
    graph = model(nodes, {"x": (F32, [1])}, {"y": (F16, [1])}, {"w": np.float16([3])})
    assert ferry.fp16.emulate(graph).run((np.float32([1e5]),))["y"] == np.inf
    assert ferry.fp16.emulate(graph).run((np.float32([0.1]),))["y"] == half(3 * half(np.float32(0.1)))


def test_recurrent_nets_stay_closed():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 3)

        def forward(self, x):
            return self.lstm(x)[0]

    x = torch.randn(5, 1, 4)
    report = ferry.fp16.emulate(Recurrent().eval(), x, mode="strict").report(x)
    assert "sums-not-opened" in [f.code for f in report.findings]
    assert report.passed


@pytest.mark.parametrize("name", ["convolutions", "attention", "groups"])
def test_strict_differs_by_rounding_alone_where_nothing_overflows(name):
    net, x = NETS[name]().eval(), torch.rand(2, 3, 8, 8)
    emulation = ferry.fp16.emulate(net, x, mode="strict")
    assert emulation.bad == ()
    assert all(0 < error.relative < 2e-2 for error in emulation.errors(x).values())


def test_sizes_and_factors_between_sizes_are_no_tensors_of_fp16():
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Cast", ["shape"], ["sizes"], to=F32),
        node("Mul", ["sizes", "factor"], ["larger"]),
        node("Cast", ["larger"], ["target"], to=TensorProto.INT64),
        node("Expand", ["one", "target"], ["y"]),
    ]
    weights = {"factor": np.array([1.0001], np.float32), "one": np.ones((1,), np.float32)}
    graph = model(nodes, {"x": (F32, ["n"])}, {"y": (F32, ["m"])}, weights)
    emulation = ferry.fp16.emulate(graph)
    assert emulation.run((np.ones(70_000, np.float32),))["y"].shape == (70_007,)
    assert emulation.first_bad is None


def test_bounds_of_a_clip_may_be_beyond_the_range():
    graph = model(
        [node("Clip", ["x", "low"], ["c"]), node("Exp", ["c"], ["y"])],
        {"x": (F32, [2])},
        {"y": (F32, [2])},
        {"low": np.float32(-3e38)},
    )
    assert ferry.fp16.emulate(graph).report((np.zeros(2, np.float32),)).passed


def test_empty_tensors_are_within_range():
    graph = model([node("Exp", ["x"], ["y"])], {"x": (F32, ["n"])}, {"y": (F32, ["n"])})
    report = ferry.fp16.emulate(graph).report((np.zeros(0, np.float32),))
    assert report.passed


def test_marks_are_seen_through():
    class Marked(nn.Module):
        def forward(self, x):
            return ferry.mark_tensors("here", x * 70000) * 2

    exported = ferry.export(Marked(), torch.ones(1, 2), apply_marks=True)
    bad = ferry.fp16.emulate(exported, torch.ones(1, 2)).first_bad
    assert (bad.kind, bad.magnitude) == ("constant", 70000)


def test_the_model_and_the_graph_stay_as_they_were():
    net = Grows().eval()
    x = torch.randn(2, 8)
    exported = ferry.export(net, x)
    before, weights = str(exported.model), {k: v.clone() for k, v in net.state_dict().items()}
    with ferry.fp16.emulate(exported, x, mode="strict") as emulation:
        emulation.report(x)
    assert str(exported.model) == before
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())


def test_dictionaries_and_magnitudes():
    x = torch.tensor([[2.0, -3.0]])
    emulation = ferry.fp16.emulate(nn.Sequential(nn.ReLU(), nn.Sigmoid()), {"input": x})
    assert emulation.magnitudes()["input"] == 3
    emulation.close()
    assert emulation.run({"input": x.numpy()})["sigmoid"].shape == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.ReLU(),), {}, InputError, "needs inputs"),
        ((nn.ReLU(), torch.ones(1)), {"mode": "acc16"}, ConfigError, "unknown mode 'acc16'"),
        ((nn.ReLU(), []), {}, InputError, "no inputs"),
    ],
)
def test_what_cannot_be_emulated(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ferry.fp16.emulate(*arguments, **options)
