"""What is particular to TensorRT. TensorRT-RTX builds on any machine, so most of this needs no GPU."""

import dataclasses
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

import torchferry as ferry
from torchferry import backends
from torchferry.backends.tensorrt import build
from torchferry.backends.tensorrt.build import shape_ranges
from torchferry.backends.tensorrt.cuda import why_no_gpu
from torchferry.backends.tensorrt.types import check_precision, check_types
from torchferry.cli import main
from torchferry.core.engine import Engine
from torchferry.core.errors import MissingBackendError, UnsupportedError
from torchferry.core.signature import DimRange, Signature, TensorSpec
from torchferry.core.target import Target
from torchferry.graph import as_exported

RTX = "tensorrt-rtx"
available = backends.get(RTX).availability()
needs_rtx = pytest.mark.skipif(not available.ok, reason=available.reason)
needs_gpu = pytest.mark.skipif(bool(why_no_gpu()) or not available.ok, reason=why_no_gpu() or available.reason)
no_gpu_here = pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU, so engines run")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.last = torch.nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        return self.last(x.mean((2, 3)))


def exported(dtype=torch.float32, **bounds):
    torch.manual_seed(0)
    size = torch.export.Dim("size", min=4, max=64)
    batch = torch.export.Dim("batch", max=8)
    dims = {"x": {0: batch, 2: size, 3: size}} if bounds.get("dynamic") else None
    return ferry.export(Net().eval().to(dtype), torch.rand(2, 3, 8, 8, dtype=dtype), dynamic_shapes=dims)


def graph(nodes, inputs, outputs, initializers=()):
    values = [[helper.make_tensor_value_info(n, t, s) for n, t, s in group] for group in (inputs, outputs)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *values, list(initializers)), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def test_both_flavours_say_what_they_are_and_how_to_install_them():
    for name in ("tensorrt", RTX):
        backend = backends.get(name)
        assert backend.name == name
        found = backend.availability()
        assert found.ok or f"pip install 'torchferry[{name}]'" in found.reason or "NVIDIA" in found.reason
        if found.ok:
            assert found.version
            assert found.can_run == (not why_no_gpu())


def test_a_target_is_valid_without_the_engine_and_compiling_for_it_is_not(tmp_path):
    target = Target("tensorrt")
    if backends.get("tensorrt").availability().ok:
        pytest.skip("tensorrt is installed")
    with pytest.raises(MissingBackendError, match="tensorrt"):
        ferry.compile(exported(), target, tmp_path / "engine")


@needs_rtx
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.float16, "fp16")])
def test_it_builds_static_and_dynamic_graphs(tmp_path, dtype, precision):
    for dynamic in (False, True):
        engine = ferry.compile(exported(dtype, dynamic=dynamic), Target(RTX, precision), tmp_path / f"engine {dynamic}")
        assert (engine.folder / "model.engine").stat().st_size > 1000
        assert engine.versions[RTX] == available.version
        assert Engine.load(engine.folder) == engine
        names = json.loads((engine.folder / "model.json").read_text())
        assert list(names["inputs"]) == ["x"]


@needs_rtx
def test_it_builds_a_quantised_graph_that_is_symmetric(tmp_path):
    data = [(torch.rand(2, 3, 8, 8),) for _ in range(4)]
    whole, target = exported(dynamic=True), Target(RTX, "int8", device="cuda:sm86")
    assert backends.get(RTX).capabilities().symmetric_int8
    engine = ferry.compile(ferry.quantize(whole, data, symmetric=True), target, tmp_path / "engine")
    assert (engine.folder / "model.engine").stat().st_size > 1000
    with pytest.raises(UnsupportedError, match="with 0 for zero, and '.*' does not") as caught:
        ferry.compile(ferry.quantize(whole, data), target, tmp_path / "other")
    assert "symmetric=True" in caught.value.hint


@needs_rtx
def test_the_gpus_are_chosen_by_the_device(tmp_path):
    model = exported()
    small = ferry.compile(model, Target(RTX, device="cuda:sm86"), tmp_path / "one")
    many = ferry.compile(model, Target(RTX, device="cuda:sm80,sm86,sm120"), tmp_path / "three")
    sizes = [(engine.folder / "model.engine").stat().st_size for engine in (small, many)]
    assert sizes[0] < sizes[1]
    with pytest.raises(UnsupportedError, match="the GPU 'sm99'") as caught:
        ferry.compile(model, Target(RTX, device="cuda:sm99"), tmp_path / "none")
    assert "sm8" in caught.value.hint
    with pytest.raises(UnsupportedError, match="'cuda'"):
        ferry.compile(model, Target(RTX, device="npu"), tmp_path / "none")


@needs_rtx
def test_marks_vanish_by_a_named_pass(tmp_path):
    class Marked(torch.nn.Module):
        def forward(self, x):
            return -ferry.mark_tensors("inside", x * 2)

    marked = ferry.export(Marked(), torch.rand(2, 3), apply_marks=True)
    engine = ferry.compile(marked, Target(RTX), tmp_path / "engine")
    assert engine.adaptations[0].startswith("inline-functions")


@needs_rtx
def test_sizes_that_depend_on_the_values_of_an_input_are_refused_by_its_name(tmp_path):
    nodes = [helper.make_node("Resize", ["x", "", "", "sizes wanted"], ["y"])]
    inputs = [("x", TensorProto.FLOAT, [1, 3, 8, 8]), ("sizes wanted", TensorProto.INT64, [4])]
    model = graph(nodes, inputs, [("y", TensorProto.FLOAT, [1, 3, None, None])])
    with pytest.raises(UnsupportedError, match="values of 'sizes wanted'"):
        ferry.compile(model, Target(RTX), tmp_path / "engine")
    nodes = [helper.make_node("Resize", ["x", "", "scales wanted"], ["y"])]
    inputs[1] = ("scales wanted", TensorProto.FLOAT, [4])
    model = graph(nodes, inputs, [("y", TensorProto.FLOAT, [1, 3, None, None])])
    with pytest.raises(UnsupportedError, match="values of 'scales wanted'"):
        ferry.compile(model, Target(RTX), tmp_path / "engine")


@needs_rtx
def test_scales_that_are_computed_from_sizes_are_taken_and_the_ranges_are_a_listed_profile(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["wanted", "sizes"], ["scales"]),
        helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear"),
    ]
    wanted = helper.make_tensor("wanted", TensorProto.FLOAT, [4], [1, 3, 40, 30])
    values = [("x", TensorProto.FLOAT, [1, 3, "h", "w"])], [("y", TensorProto.FLOAT, [1, 3, 40, 30])]
    free = as_exported(graph(nodes, *values, [wanted]))
    dims = dict.fromkeys(free.signature.dims, DimRange(4, 64))
    ranged = free.replace(signature=dataclasses.replace(free.signature, dims=dims))
    engine = ferry.compile(ranged, Target(RTX, device="cuda:sm86"), tmp_path / "engine")
    assert engine.adaptations[-1] == "optimization-profile x1"


@needs_rtx
@no_gpu_here
def test_an_engine_that_cannot_run_here_says_so(tmp_path):
    engine = ferry.compile(exported(), Target(RTX), tmp_path / "engine")
    with pytest.raises(UnsupportedError, match="built here, and runs only where an NVIDIA GPU is"):
        engine.open()
    with pytest.raises(UnsupportedError, match="runs only where"):
        ferry.verify(engine, Net().eval(), torch.rand(2, 3, 8, 8))
    package = ferry.pack(engine, tmp_path / "package")
    with pytest.raises(MissingBackendError, match="only builds here"):
        ferry.load(package.folder).open()


@needs_rtx
@no_gpu_here
def test_deploy_packs_what_it_could_not_run_and_warns(tmp_path):
    torch.manual_seed(0)
    source = ferry.Source(Net().eval(), torch.rand(2, 3, 8, 8))
    package = ferry.deploy(source, [Target(RTX), Target("onnxruntime")], tmp_path / "package")
    report = json.loads((package.folder / "report.json").read_text())
    (warning,) = (finding for finding in report["findings"] if finding["code"] == "engine-not-run")
    assert warning["severity"] == "warning"
    assert [entry.id for entry in package.manifest.engines] == ["tensorrt-rtx-fp32", "onnxruntime-fp32"]
    with package.open() as session:  # the first that runs here
        assert session.run({"x": np.zeros((2, 3, 8, 8), np.float32)})
    alone = ferry.deploy(source, [Target(RTX)], tmp_path / "alone")
    assert "proof   none, for nothing was run" in str(alone)


@needs_rtx
def test_the_command_line_bounds_dimensions(tmp_path, capsys):
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    model = graph(nodes, [("x", TensorProto.FLOAT, ["batch", 3])], [("y", TensorProto.FLOAT, ["batch", 3])])
    onnx.save(model, tmp_path / "m.onnx")
    command = ["compile", str(tmp_path / "m.onnx"), "--backend", RTX, "-o", str(tmp_path / "package")]
    assert main(command) == 1
    assert "--range batch=1..8" in capsys.readouterr().err
    assert main([*command, "--range", "batch=1..8", "--device", "cuda:sm86"]) == 0
    package = ferry.load(tmp_path / "package")
    assert package.signature.dims == {"batch": DimRange(1, 8)}
    assert package.engines[0].target.device == "cuda:sm86"
    assert main([*command, "--overwrite", "--range", "batch=1..4..8"]) == 0
    assert ferry.load(tmp_path / "package").signature.dims == {"batch": DimRange(1, 8, opt=4)}
    assert main([*command, "--overwrite", "--range", "batch=1-8"]) == 2


@needs_rtx
def test_the_workspace_is_limited(tmp_path):
    def compiled(limit):
        target = Target(RTX, device="cuda:sm86", options={"max_workspace_size": limit})
        return ferry.compile(exported(), target, tmp_path / str(limit))

    assert Engine.load(compiled(1 << 30).folder).target.options == {"max_workspace_size": 1 << 30}
    assert compiled(0)  # TensorRT's own limit
    with pytest.raises(UnsupportedError, match="workspace limit") as caught:
        compiled(1)
    assert "max_workspace_size" in caught.value.hint
    with pytest.raises(UnsupportedError, match="no option 'max_workspace'") as caught:
        ferry.compile(exported(), Target(RTX, options={"max_workspace": 1}), tmp_path / "none")
    assert "'max_workspace_size'" in caught.value.hint


class TestRanges:
    image = TensorSpec("x", "float32", ("batch", 3, "2*side", "side"))

    def test_smallest_middle_and_largest(self):
        dims = {"batch": DimRange(0, 4), "side": DimRange(8, 24), "idle": DimRange()}
        ranges = shape_ranges(Signature((self.image, TensorSpec("k", "float32", (2,))), (), dims))
        assert ranges["x"] == ((1, 3, 16, 8), (2, 3, 32, 16), (4, 3, 48, 24))
        assert ranges["k"] == ((2,), (2,), (2,))

    def test_the_usual_sizes_that_were_declared(self):
        dims = {"batch": DimRange(2, 4, opt=1), "side": DimRange(8, 24, opt=10)}
        ranges = shape_ranges(Signature((self.image,), (), dims))
        assert ranges["x"] == ((2, 3, 16, 8), (2, 3, 20, 10), (4, 3, 48, 24))

    @needs_rtx
    def test_tensorrt_takes_them_as_its_profile(self, tmp_path, monkeypatch):
        shapes = []
        original = build._profile

        def watched(builder, model, ranges):
            profile = original(builder, model, ranges)
            shapes.extend(map(tuple, profile.get_shape(model.graph.inputs[0].name)))
            return profile

        monkeypatch.setattr(build, "_profile", watched)
        model = ferry.export(Net().eval(), torch.rand(1, 3, 8, 8), dynamic_shapes={"x": {0: "batch=1..2..7"}})
        ferry.compile(model, Target(RTX, device="cuda:sm86"), tmp_path / "engine")
        assert shapes == [(1, 3, 8, 8), (2, 3, 8, 8), (7, 3, 8, 8)]

    def test_a_fixed_graph_has_none(self):
        assert shape_ranges(Signature((TensorSpec("k", "float32", (2,)),), ())) == {}

    def test_a_dimension_without_a_largest_size_is_named_with_the_flag(self):
        dims = {"batch": DimRange(0, 4), "side": DimRange(2)}
        with pytest.raises(UnsupportedError, match=r"largest size of 'side'.*\(side: 2\.\.\)") as caught:
            shape_ranges(Signature((self.image,), (), dims))
        assert "--range side=2..8" in caught.value.hint
        assert "Dim('side', max=" in caught.value.hint

    def test_a_size_without_a_name(self):
        with pytest.raises(UnsupportedError, match="to have a name"):
            shape_ranges(Signature((TensorSpec("x", "float32", (None,)),), ()))


class TestTypes:
    """TensorRT computes in the graph's types: a target that says otherwise would be a silent change."""

    def product(self, kind):
        weights = helper.make_tensor("w", kind, [3, 2], np.ones(6))
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="times")
        return ir.from_proto(graph([node], [("x", kind, [1, 3])], [("y", kind, [1, 2])], [weights]))

    @pytest.mark.parametrize(
        ("kind", "precision"),
        [(TensorProto.FLOAT, "fp32"), (TensorProto.FLOAT16, "fp16"), (TensorProto.BFLOAT16, "bf16")],
    )
    def test_a_graph_is_for_the_precision_that_it_is_typed_in(self, kind, precision):
        check_precision(self.product(kind), precision)
        for other in {"fp32", "fp16", "bf16"} - {precision}:
            with pytest.raises(UnsupportedError, match="computes in the types of the graph"):
                check_precision(self.product(kind), other)

    def test_islands_in_fp32_may_be_in_an_fp16_graph(self):
        weights = [helper.make_tensor(n, k, [2, 2], np.ones(4)) for n, k in (("w", 10), ("island", 1))]
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["t"]),
            helper.make_node("Cast", ["t"], ["u"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["u", "island"], ["y"]),
        ]
        whole = graph(nodes, [("x", TensorProto.FLOAT16, [1, 2])], [("y", TensorProto.FLOAT, [1, 2])], weights)
        check_precision(ir.from_proto(whole), "fp16")
        with pytest.raises(UnsupportedError, match="is FLOAT16, not fp32"):
            check_precision(ir.from_proto(whole), "fp32")

    def test_float64_is_refused_by_name(self):
        model = self.product(TensorProto.DOUBLE)
        with pytest.raises(UnsupportedError, match="'x' is float64"):
            check_types(model, as_exported(model).signature)
        constant = helper.make_tensor("c", TensorProto.DOUBLE, [1], [1.0])
        nodes = [
            helper.make_node("Cast", ["c"], ["k"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["x", "k"], ["y"]),
        ]
        values = [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])]
        inside = as_exported(graph(nodes, *values, [constant]))
        with pytest.raises(UnsupportedError, match="float64 in the graph, such as 'c'"):
            check_types(inside.model, inside.signature)


@needs_gpu
def test_it_gives_what_pytorch_gives(tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    engine = ferry.compile(exported(dynamic=True), Target(RTX), tmp_path / "engine")
    assert ferry.verify(engine, model, torch.rand(2, 3, 8, 8)).passed
