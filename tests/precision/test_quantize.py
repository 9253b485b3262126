"""Graphs in int8: near enough to PyTorch on real engines, in int8 kernels, at every size; what is refused, and how."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import torchferry as ferry
from torchferry.core.errors import BackendError, ConfigError, FormatError, InputError, MissingBackendError
from torchferry.core.errors import UnsupportedError as Unsupported

BUDGET = ferry.Budget(relative=0.05)


class Cnn(nn.Module):
    """Convolutions with batch norms, one of them depthwise, a residual addition, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = torch.relu(x + self.body(self.deep(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Two blocks of self-attention and a perceptron, with channels that are much larger than others."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                "norm2": nn.LayerNorm(width), "up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width),
            })
            for _ in range(2)
        )  # fmt: skip
        for block in self.blocks:
            block["norm1"].weight.data[:2] = 4

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for block in self.blocks:
            n, length, width = x.shape
            qkv = block["qkv"](block["norm1"](x)).reshape(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
            x = x + block["out"](nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape))
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return x


def calls(*shape: int, count: int = 8, seed: int = 0) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator),) for _ in range(count)]


def settled_cnn() -> Cnn:
    """Give batch norms the statistics of data, as training does."""
    torch.manual_seed(0)
    model = Cnn().train()
    with torch.no_grad():
        for (image,) in calls(8, 3, 24, 32, count=40, seed=9):
            model(image)
    return model.eval()


@pytest.fixture(scope="module")
def cnn() -> tuple[Cnn, Any]:
    model = settled_cnn()
    dims = {"image": {0: "batch", 2: "height", 3: "width"}}
    return model, ferry.export(model, calls(2, 3, 24, 32)[0], dynamic_shapes=dims, output_names=["scores"])


@pytest.fixture(scope="module")
def attention() -> tuple[Attention, Any]:
    torch.manual_seed(0)
    model = Attention().eval()
    dims = {"tokens": {0: "batch", 1: "length"}}
    return model, ferry.export(model, calls(2, 12, 32)[0], dynamic_shapes=dims)


@pytest.fixture(scope="module")
def quantized_cnn(cnn: Any) -> Any:
    return ferry.quantize(cnn[1], calls(2, 3, 24, 32))


@pytest.fixture(scope="module")
def quantized_attention(attention: Any) -> Any:
    return ferry.quantize(attention[1], calls(2, 12, 32))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "reference"])
@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_it_is_within_an_explicit_budget_on_data_that_it_has_not_seen(
    name: str, engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, _ = request.getfixturevalue(name)
    graph = request.getfixturevalue(f"quantized_{name}")
    compiled = ferry.compile(graph, ferry.Target(engine, "int8"), tmp_path / "engine")
    shape = (2, 3, 24, 32) if name == "cnn" else (2, 12, 32)
    sizes = [{"batch": 1}, {"batch": 5, "height": 30, "width": 47} if name == "cnn" else {"batch": 5, "length": 31}]
    report = ferry.verify(compiled, model, calls(*shape, seed=1), tolerance=BUDGET, sizes=sizes)
    assert report.passed, report.to_text()
    assert len(report.comparisons) == 10
    assert max(c.relative for c in report.comparisons) > 1e-3  # int8 it is


def test_names_sizes_and_the_graph_that_was_given_stay_as_they_are(cnn: Any) -> None:
    _, exported = cnn
    before = ir.to_proto(exported.model).SerializeToString(deterministic=True)
    graph = ferry.quantize(exported, calls(2, 3, 24, 32))
    assert ir.to_proto(exported.model).SerializeToString(deterministic=True) == before
    assert graph.signature == exported.signature
    assert [v.name for v in (*graph.model.graph.inputs, *graph.model.graph.outputs)] == ["image", "scores"]
    assert all(v.dtype == ir.DataType.FLOAT for v in (*graph.model.graph.inputs, *graph.model.graph.outputs))
    assert (exported.target.precision, graph.target.precision) == ("fp32", "int8")
    assert (exported.is_quantized, graph.is_quantized) == (False, True)
    assert graph.weights_bytes < exported.weights_bytes / 2
    modules = {node.op_type: graph.provenance(node).module for node in graph.model.graph if node.op_type != "Conv"}
    assert modules["Gemm"] == "head"
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)


def test_what_takes_int8_is_said(quantized_cnn: Any, quantized_attention: Any) -> None:
    (finding,) = (f for f in quantized_cnn.report.findings if f.code == "int8-quantized")
    assert "Conv 3 of 3" in finding.message
    assert "Gemm 1 of 1" in finding.message
    assert "FP32" not in finding.message
    (finding,) = (f for f in quantized_attention.report.findings if f.code == "int8-quantized")
    assert "MatMul 10 of 12" in finding.message
    assert "LayerNormalization 4" in finding.message.partition("FP32")[2]
    assert not [f for f in quantized_cnn.report.findings if f.code == "int8-one-call"]


def kinds(engine: Any) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(engine.folder / "model.onnx").graph.node)


def test_onnx_runtime_runs_int8_kernels(quantized_cnn: Any, quantized_attention: Any, tmp_path: Path) -> None:
    target = ferry.Target("onnxruntime", "int8")
    engine = ferry.compile(quantized_cnn, target, tmp_path / "cnn")
    assert kinds(engine)["QLinearConv"] == 3
    assert not {"Conv", "FusedConv"} & kinds(engine).keys()
    assert engine.adaptations == ("Gemm x1 in fp32",)
    engine = ferry.compile(quantized_attention, target, tmp_path / "attention")
    assert kinds(engine)["MatMulIntegerToFloat"] >= 8


def test_openvino_runs_int8_kernels(quantized_cnn: Any, quantized_attention: Any, tmp_path: Path) -> None:
    for name, graph, layer, number in (
        ("cnn", quantized_cnn, "Convolution", 3),
        ("attention", quantized_attention, "FullyConnected", 8),
    ):
        engine = ferry.compile(graph, ferry.Target("openvino", "int8"), tmp_path / name)
        with engine.open() as session:
            layers = [op.get_rt_info() for op in session._compiled.get_runtime_model().get_ops()]
        found = [str(i["runtimePrecision"].astype(str)) for i in layers if i["layerType"].astype(str) == layer]
        assert len(found) == number
        assert set(found) <= {"u8", "i8"}


def test_onnx_runtime_says_what_it_leaves_in_fp32_and_refuses_to_call_all_of_it_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    target, data = ferry.Target("onnxruntime", "int8"), calls(2, 3, 16, 16)
    partly = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)).eval()
    engine = ferry.compile(ferry.quantize(ferry.export(partly, data[0]), data), target, tmp_path / "partly")
    assert engine.adaptations == ("Conv x2 in fp32",)
    smooth = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)).eval()
    graph = ferry.quantize(ferry.export(smooth, data[0]), data)
    with pytest.raises(Unsupported, match="nothing of the graph in int8"):
        ferry.compile(graph, target, tmp_path / "smooth")
    assert not (tmp_path / "smooth").exists()
    openvino = ferry.compile(graph, ferry.Target("openvino", "int8"), tmp_path / "smooth")
    assert ferry.verify(openvino, smooth, data, tolerance=BUDGET).passed


def test_symmetric_is_signed_with_zero_for_zero(cnn: Any, tmp_path: Path) -> None:
    model, exported = cnn
    for symmetric, expected in ((False, {"UINT8", "INT8"}), (True, {"INT8"})):
        graph = ferry.quantize(exported, calls(2, 3, 24, 32), symmetric=symmetric)
        zeros = [node.inputs[2] for node in graph.model.graph if node.op_type == "QuantizeLinear"]
        assert {zero.dtype.name for zero in zeros} == expected
        assert symmetric == (not any(zero.const_value.numpy().any() for zero in zeros))
        onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)
        engine = ferry.compile(graph, ferry.Target("onnxruntime", "int8"), tmp_path / str(symmetric))
        assert ferry.verify(engine, model, calls(2, 3, 24, 32, seed=1), tolerance=BUDGET, sizes=[]).passed


def test_sizes_that_the_calibration_did_not_have_may_leave_the_budget(cnn: Any, tmp_path: Path) -> None:
    model, exported = cnn
    narrow, wide = calls(2, 3, 24, 32), [(torch.randn(2, 3, h, w),) for h, w in ((2, 2), (2, 32), (24, 2), (24, 32))]
    small = [{"batch": 2, "height": 2, "width": 32}]
    for name, data, passed in (("narrow", narrow, False), ("wide", wide, True)):
        engine = ferry.compile(ferry.quantize(exported, data), ferry.Target("openvino", "int8"), tmp_path / name)
        report = ferry.verify(engine, model, narrow[0], tolerance=ferry.Budget(relative=0.08), sizes=small)
        assert report.passed == passed, report.to_text()


def test_one_call_is_enough_and_said_to_be_little(cnn: Any) -> None:
    _, exported = cnn
    for given in (calls(2, 3, 24, 32)[0], {"image": calls(2, 3, 24, 32)[0][0].numpy()}):
        graph = ferry.quantize(exported, given)
        assert [f.severity for f in graph.report.findings if f.code == "int8-one-call"] == ["warning"]


def times(weights: Any, *more: Any, opset: int = 13, inputs: tuple[Any, ...] = ()) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["n", 8]), ("y", ["n", 8]))]
    nodes = more or [helper.make_node("MatMul", ["x", "w"], ["y"])]
    initializers = [numpy_helper.from_array(weights, "w")]
    graph = helper.make_graph(nodes, "g", [values[0], *inputs], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


WEIGHTS = np.random.default_rng(0).standard_normal((8, 8), np.float32)
DATA = [(np.random.default_rng(seed).standard_normal((5, 8), np.float32),) for seed in range(4)]


def run(graph: Any, folder: Path, precision: Any, **feeds: Any) -> Any:
    with ferry.compile(graph, ferry.Target("onnxruntime", precision), folder / precision).open() as session:
        return session.run(feeds)["y"]


@pytest.mark.parametrize("opset", [11, 13, 17, 21, 23])
def test_any_graph_of_any_opset(opset: int, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    onnx.save(times(WEIGHTS, opset=opset), file)
    graph = ferry.quantize(file, DATA)
    assert len(graph.model.graph.initializers["scale_w_1"].const_value.numpy()) == 8  # one for each output channel
    x = DATA[0][0]
    assert np.linalg.norm(run(graph, tmp_path, "int8", x=x) - x @ WEIGHTS) < 0.02 * np.linalg.norm(x @ WEIGHTS)


def test_a_weight_with_several_readers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["k"]),
        helper.make_node("Sub", ["k", "w"], ["y"]),
    ]
    model = times(WEIGHTS, *nodes)
    data = [(np.resize(array, (8, 8)),) for (array,) in DATA]
    x = data[0][0]
    expected, got = run(model, tmp_path, "fp32", x=x), run(ferry.quantize(model, data), tmp_path, "int8", x=x)
    assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected)


def test_a_weight_that_a_branch_reads_too(tmp_path: Path) -> None:
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    bodies = {
        f"{branch}_branch": helper.make_graph([helper.make_node(op, ["x", "w"], ["r"])], branch, [], [result])
        for branch, op in (("then", "MatMul"), ("else", "MatMul"))
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["c"], ["z"], **bodies),
        helper.make_node("Add", ["h", "z"], ["y"]),
    ]
    model = times(WEIGHTS, *nodes, inputs=(helper.make_tensor_value_info("c", TensorProto.BOOL, []),))
    feeds = {"x": DATA[0][0], "c": np.array(True)}
    graph = ferry.quantize(model, [{"x": x, "c": np.array(True)} for (x,) in DATA])
    expected, got = run(model, tmp_path, "fp32", **feeds), run(graph, tmp_path, "int8", **feeds)
    assert np.linalg.norm(got - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param([], "no inputs are given", id="none"),
        pytest.param([(torch.rand(2, 4, 24, 32),)], "axis 1 of 'image' must be 3, got 4", id="shape"),
        pytest.param([(torch.rand(2, 3, 24, 32, dtype=torch.float64),)], "must be float32, got float64", id="dtype"),
        pytest.param([{"picture": torch.rand(2, 3, 24, 32)}], "picture", id="name"),
        pytest.param([*calls(2, 3, 24, 32, count=1), (torch.rand(0, 3, 24, 32),)], "call 2 .* nothing in", id="empty"),
        pytest.param([(torch.full((1, 3, 24, 32), torch.nan),)], "NaN or infinity in 'image'", id="nan"),
        pytest.param([(torch.full((1, 3, 24, 32), torch.inf),)], "NaN or infinity in 'image'", id="infinity"),
    ],
)
def test_calibration_data_that_cannot_be_used(cnn: Any, given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ferry.quantize(cnn[1], given)


def test_graphs_that_cannot_be_quantised(cnn: Any, quantized_cnn: Any) -> None:
    with pytest.raises(FormatError, match="quantised already"):
        ferry.quantize(quantized_cnn, calls(2, 3, 24, 32))
    half, _ = ferry.fp16.fix(cnn[1], calls(2, 3, 24, 32), keep_io_types=True)
    with pytest.raises(FormatError, match="is FLOAT16 already"):
        ferry.quantize(half, calls(2, 3, 24, 32))
    with pytest.raises(Unsupported, match="nothing in the graph"):
        ferry.quantize(times(WEIGHTS, helper.make_node("Exp", ["x"], ["y"])), DATA)


def test_what_nncf_raises_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import nncf

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("it hurts\nhere")

    monkeypatch.setattr(nncf, "quantize", fail)
    with pytest.raises(BackendError, match=r"NNCF cannot quantise the graph: it hurts\n"):
        ferry.quantize(times(WEIGHTS), DATA)


def test_without_nncf_there_is_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingBackendError, match="NNCF") as caught:
        ferry.quantize(times(WEIGHTS), DATA)
    assert caught.value.hint == "pip install 'torchferry[quantize]'"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "reference"])
def test_the_precision_never_changes_without_a_word(cnn: Any, quantized_cnn: Any, engine: str, tmp_path: Path) -> None:
    _, exported = cnn
    with pytest.raises(Unsupported, match="is quantised, so it would be computed in int8, not in fp32"):
        ferry.compile(quantized_cnn, ferry.Target(engine), tmp_path / "engine")
    with pytest.raises(Unsupported, match="is not quantised") as caught:
        ferry.compile(exported, ferry.Target(engine, "int8"), tmp_path / "engine")
    assert "ferry.quantize" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_verify_wants_to_know_how_much_error_is_allowed(cnn: Any, quantized_cnn: Any, tmp_path: Path) -> None:
    model, _ = cnn
    engine = ferry.compile(quantized_cnn, ferry.Target("onnxruntime", "int8"), tmp_path / "engine")
    with pytest.raises(ConfigError, match="int8 has no usual tolerance") as caught:
        ferry.verify(engine, model, calls(2, 3, 24, 32))
    assert "Budget(relative=0.05)" in caught.value.hint
    assert not ferry.verify(engine, model, calls(2, 3, 24, 32), tolerance=ferry.Tolerance(1e-4, 1e-4)).passed


def test_it_is_the_same_each_time_and_says_nothing(cnn: Any, capfd: pytest.CaptureFixture[str]) -> None:
    graphs = [ferry.quantize(cnn[1], calls(2, 3, 24, 32)) for _ in range(2)]
    first, second = (ir.to_proto(graph.model).SerializeToString(deterministic=True) for graph in graphs)
    assert first == second
    assert capfd.readouterr() == ("", "")


def test_nncf_comes_late_reports_to_nobody_and_changes_nobodys_loggers() -> None:
    """In a process of its own, for NNCF keeps quiet under pytest."""
    program = """
import logging, sys, types
class Telemetry:
    def __init__(self, *args, **kwargs): raise SystemExit("it would report")
    init_ga4 = send_event = start_session = end_session = __init__
sys.modules["openvino_telemetry"] = fake = types.ModuleType("openvino_telemetry")
fake.Telemetry = Telemetry
from torchferry.precision.quantize import _nncf, quantize
assert "nncf" not in sys.modules
nncf = _nncf()
from nncf.telemetry.wrapper import telemetry
assert type(telemetry).__name__ == "MagicMock", telemetry
assert logging.getLoggerClass() is logging.Logger
assert sys.modules["openvino_telemetry"] is fake
import os
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
