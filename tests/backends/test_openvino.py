"""What is particular to OpenVINO; what every engine must do is in the conformance tests."""

import dataclasses
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import torchferry as ferry
from torchferry import backends
from torchferry.core.errors import BackendError, InputError, UnsupportedError
from torchferry.core.target import Target

pytestmark = pytest.mark.skipif(not backends.get("openvino").availability().ok, reason="openvino is not installed")


def value(name, dtype=TensorProto.FLOAT, shape=("n", 32)):
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(nodes, inputs, outputs, initializers=(), opset=20) -> onnx.ModelProto:
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, list(initializers)),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    model.ir_version = 10
    return model


WEIGHTS = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)


def product() -> onnx.ModelProto:
    weights = helper.make_tensor("w", TensorProto.FLOAT, WEIGHTS.shape, WEIGHTS.tobytes(), raw=True)
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [value("x")], [value("y")], [weights])


def test_nothing_is_told_to_the_network_and_neither_torch_nor_onnx_is_needed(tmp_path):
    ferry.compile(product(), Target("openvino"), tmp_path / "engine")
    (tmp_path / "openvino_telemetry").mkdir()
    (tmp_path / "openvino_telemetry" / "__init__.py").write_text("raise SystemExit('telemetry')\n")
    program = """if True:
        import sys
        from torchferry.core.engine import Engine
        import numpy
        with Engine.load('engine').open() as session:
            assert session.run({'x': numpy.ones((2, 32), numpy.float32)})['y'].shape == (2, 32)
        assert not {'torch', 'onnx', 'onnx_ir', 'openvino_telemetry'} & sys.modules.keys(), sys.modules.keys()
        import openvino_telemetry  # the program's own import still finds it
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == "telemetry"


def test_weights_are_saved_as_they_are_and_no_place_of_this_machine_with_them(tmp_path):
    engine = ferry.compile(product(), Target("openvino"), tmp_path / "engine")
    assert engine.files == ("model.bin", "model.xml")
    assert WEIGHTS.tobytes() in engine.path("model.bin").read_bytes()
    assert str(tmp_path) not in engine.path("model.xml").read_text()


def test_fp32_is_exact_and_bf16_is_not(tmp_path):
    x = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)

    def error(precision):
        with ferry.compile(product(), Target("openvino", precision), tmp_path / precision).open() as session:
            return np.abs(session.run({"x": x})["y"] - x @ WEIGHTS).max()

    assert error("fp32") < 1e-5
    if "bf16" not in backends.get("openvino").capabilities().precisions:
        pytest.skip("this CPU has no bf16")
    assert 1e-3 < error("bf16") < 0.2


def test_another_precision_is_not_taken_in_secret(tmp_path, monkeypatch):
    backend = backends.get("openvino")
    with_bf16 = backend.capabilities()
    engine = ferry.compile(product(), Target("openvino"), tmp_path / "engine")
    fp32_only = dataclasses.replace(with_bf16, precisions=("fp32",))
    monkeypatch.setattr(type(backend), "capabilities", lambda self: fp32_only)
    with pytest.raises(UnsupportedError, match="does not compute in bf16"):
        dataclasses.replace(engine, target=Target("openvino", "bf16")).open()


def test_threads_are_an_option(tmp_path):
    engine = ferry.compile(product(), Target("openvino"), tmp_path / "engine")
    with engine.open(threads=1) as session:
        session.run({"x": np.ones((1, 32), np.float32)})
    with pytest.raises(TypeError, match="thread_count"):
        engine.open(thread_count=1)


def test_what_is_done_to_the_graph_is_listed(tmp_path):
    opset = helper.make_opsetid("", 20)
    negated = helper.make_function("own", "Negated", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [opset])
    values = [value("x", TensorProto.DOUBLE)], [value("y", TensorProto.DOUBLE)]
    model = graph([helper.make_node("Negated", ["x"], ["y"], domain="own")], *values)
    model.functions.append(negated)
    model.opset_import.append(helper.make_opsetid("own", 1))
    engine = ferry.compile(model, Target("openvino"), tmp_path / "engine")
    assert engine.adaptations == ("inline-functions x1", "float64-as-float32 x2", "precision-hint f32")


@pytest.mark.parametrize("dtype", [TensorProto.BFLOAT16, TensorProto.STRING])
def test_a_type_that_it_does_not_take_is_named(tmp_path, dtype):
    model = graph([helper.make_node("Identity", ["x"], ["y"])], [value("x", dtype)], [value("y", dtype)])
    with pytest.raises(BackendError, match=r"OpenVINO takes no \w+, which 'x' is"):
        ferry.compile(model, Target("openvino"), tmp_path / "engine")


@pytest.mark.parametrize(
    ("dtype", "array", "message"),
    [
        (TensorProto.INT64, np.array([1, 1 << 40]), r"'x' holds 1099511627776, but OpenVINO computes int64 in int32"),
        (TensorProto.DOUBLE, np.array([1.0, -1e300]), r"'x' holds -1e\+300, but OpenVINO computes float64 in float32"),
    ],
)
def test_numbers_that_it_would_change_are_named(tmp_path, dtype, array, message):
    model = graph([helper.make_node("Neg", ["x"], ["y"])], [value("x", dtype, ["n"])], [value("y", dtype, ["n"])])
    with ferry.compile(model, Target("openvino"), tmp_path / "engine").open() as session:
        with pytest.raises(InputError, match=message):
            session.run({"x": array})
        np.testing.assert_array_equal(session.run({"x": array[:1]})["y"], [-1])
