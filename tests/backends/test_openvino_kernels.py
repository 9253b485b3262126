"""What is particular to kernels in OpenVINO; what they do in every engine is tested with ``ferry.custom_op``."""

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import torchferry as ferry
from torchferry import backends
from torchferry.core import kernels
from torchferry.core.engine import Engine
from torchferry.core.errors import BackendError
from torchferry.core.kernels import DTYPES, Kernel, register_kernel
from torchferry.core.target import Target

pytestmark = pytest.mark.skipif(not backends.get("openvino").availability().ok, reason="openvino is not installed")

TARGET = Target("openvino")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def _no_kernels_left(monkeypatch):
    monkeypatch.setattr(kernels, "_KERNELS", {})


def register(function, inputs=("float32",), outputs=("float32",), name="my.own::Op", **attributes):
    register_kernel(Kernel(name, function, inputs, outputs, attributes))


def value(name, shape=("n", 3), dtype="float32"):
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def node(inputs=("x",), outputs=("y",), operator="Op", **attributes):
    return helper.make_node(operator, inputs, outputs, domain="my.own", **attributes)


def graph(*nodes, x=None, y=None, **parts):
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x or value("x")], [y or value("y")], **parts),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("my.own", 1)],
    )
    model.ir_version = 10
    return model


def run(model: onnx.ModelProto, folder: Path, x=X):
    with ferry.compile(model, TARGET, folder / "engine", overwrite=True).open() as session:
        return session.run({"x": x})["y"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_gets_and_gives_every_dtype_that_it_declares(dtype, tmp_path):
    seen = []

    def function(x):
        seen.append(x.dtype.name)
        return ~x if dtype == "bool" else x + x

    register(function, (dtype,), (dtype,))
    x = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    got = run(graph(node(), x=value("x", dtype=dtype), y=value("y", dtype=dtype)), tmp_path, x)
    np.testing.assert_array_equal(got, function(x))
    assert got.dtype == dtype
    assert set(seen) == {dtype}


def test_attributes_are_what_the_node_says_and_those_that_it_has_not_are_left_out(tmp_path):
    seen = []

    def function(x, **attributes):
        seen.append(attributes)
        return x

    register(function, times="int", alpha="float", how="string", on="int")
    run(graph(node(times=-(1 << 40), alpha=0.5, how="up")), tmp_path)
    assert len(seen) > 1  # when it is compiled, it is run as well
    assert all(attributes == {"times": -(1 << 40), "alpha": 0.5, "how": "up"} for attributes in seen)


def test_nodes_that_differ_in_attributes_alone_are_not_taken_for_one(tmp_path):
    register(lambda x, by: x * by, by="int")
    nodes = [
        node(outputs=["x2"], by=2),
        node(outputs=["x3"], by=3),
        helper.make_node("Sub", ["x3", "x2"], ["y"]),
    ]
    np.testing.assert_array_equal(run(graph(*nodes, value_info=[value("x2"), value("x3")]), tmp_path), X)


def test_an_output_that_nothing_uses_needs_no_shape(tmp_path):
    register(lambda x: (x.sum(0), x + 1, x.argmax(1)), outputs=("float32", "float32", "int64"))
    np.testing.assert_array_equal(run(graph(node(outputs=["unused", "y"])), tmp_path), X + 1)


def test_sizes_may_depend_on_the_numbers_and_be_zero(tmp_path):
    register(lambda x: x[x[:, 0] > 0])
    with ferry.compile(graph(node(), y=value("y", ("m", 3))), TARGET, tmp_path / "engine").open() as session:
        for x in (X, -X, X[:0], np.repeat(X, 4, axis=0)):
            np.testing.assert_array_equal(session.run({"x": x})["y"], x[x[:, 0] > 0])


def test_a_kernel_of_constants_and_one_inside_a_branch(tmp_path):
    register(lambda x: x * 3)

    def branch(part):
        return helper.make_graph([part], part.output[0], [], [value(part.output[0])])

    nodes = [
        node(["w"], ["w3"]),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["any"], to=TensorProto.BOOL),
        helper.make_node(
            "If",
            ["any"],
            ["chosen"],
            then_branch=branch(node(outputs=["x3"])),
            else_branch=branch(helper.make_node("Neg", ["x"], ["minus"])),
        ),
        helper.make_node("Add", ["chosen", "w3"], ["y"]),
    ]
    weights = helper.make_tensor("w", TensorProto.FLOAT, [3], [1, 2, 3])
    model = graph(*nodes, initializer=[weights], value_info=[value("w3", (3,))])
    np.testing.assert_array_equal(run(model, tmp_path), X * 3 + [3, 6, 9])
    np.testing.assert_array_equal(run(model, tmp_path, X * 0), X * 0 + [3, 6, 9])


def test_a_function_beside_the_graph_goes_before_a_kernel(tmp_path):
    register(lambda x: x * 3)
    body = helper.make_node("Neg", ["a"], ["b"])
    function = helper.make_function("my.own", "Op", ["a"], ["b"], [body], [helper.make_opsetid("", 20)])
    model = graph(node())
    model.functions.append(function)
    engine = ferry.compile(model, TARGET, tmp_path / "engine")
    assert "model.xml" in engine.files
    np.testing.assert_array_equal(engine.open().run({"x": X})["y"], -X)


def test_the_weights_of_an_engine_with_a_kernel_travel_with_it(tmp_path):
    register(lambda x: x * 3)
    weights = np.eye(3, dtype=np.float32) * 2
    model = graph(
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        node(["h"]),
        initializer=[onnx.numpy_helper.from_array(weights, "w")],
        value_info=[value("h")],
    )
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    engine = ferry.compile(path, TARGET, tmp_path / "engine")
    assert engine.files == ("model.onnx", "model.onnx.data")
    (tmp_path / "given").rename(tmp_path / "gone")
    (tmp_path / "engine").rename(tmp_path / "moved")
    with Engine.load(tmp_path / "moved").open() as session:
        np.testing.assert_array_equal(session.run({"x": X})["y"], X * 6)


def test_the_callers_graph_stays_as_it_was(tmp_path):
    register(lambda x: x)
    exported = ferry.graph.as_exported(graph(node()), TARGET)
    ferry.compile(exported, TARGET, tmp_path / "engine")
    assert [dict(given.attributes) for given in exported.model.graph] == [{}]


def test_in_bf16_a_kernel_still_gets_what_it_declares(tmp_path):
    if "bf16" not in backends.get("openvino").capabilities().precisions:
        pytest.skip("this CPU has no bf16")
    seen = []

    def function(x):
        seen.append(x.dtype.name)
        return x * 3

    register(function)
    engine = ferry.compile(graph(node()), Target("openvino", "bf16"), tmp_path / "engine")
    np.testing.assert_allclose(engine.open().run({"x": X})["y"], X * 3, rtol=1e-2)
    assert set(seen) == {"float32"}


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x[0], r"gave output 0 the shape \[\d\], expected \[\?, 3\]"),
            (lambda x: x[:, :2], r"gave output 0 the shape \[\d, 2\], expected \[\?, 3\]"),
        ],
    )
    def test_a_kernel_that_gives_other_shapes_than_the_graph_says(self, function, message, tmp_path):
        register(function)
        with pytest.raises(BackendError, match=message) as caught:
            run(graph(node()), tmp_path)
        assert "OpenVINO cannot run the model: " in caught.value.message

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda x: x @ x, "the kernel of 'my.own::Op' fails: ValueError: matmul"),
            (lambda x: (x, x), "the kernel of 'my.own::Op' fails: ValueError"),
        ],
    )
    def test_what_a_kernel_does_wrong(self, function, message, tmp_path):
        register(function)
        with ferry.compile(graph(node()), TARGET, tmp_path / "engine").open() as session:
            for _ in range(2):  # the session lives on
                with pytest.raises(BackendError, match=message) as caught:
                    session.run({"x": X})
                assert caught.value.message.startswith("OpenVINO cannot run the model: ")

    @pytest.mark.parametrize(
        ("dtype", "factor", "held"),
        [("int64", 1 << 40, r"1099511627776.* int64 in int32"), ("float64", 1e300, r"\d.*e\+")],
    )
    def test_numbers_that_openvino_would_change(self, dtype, factor, held, tmp_path):
        register(lambda x: x.astype(dtype) * factor, outputs=(dtype,))
        with pytest.raises(BackendError, match=rf"the kernel of 'my.own::Op' gave {held}"):
            run(graph(node(), y=value("y", dtype=dtype)), tmp_path, np.ones_like(X))

    def test_infinities_are_none_of_them(self, tmp_path):
        register(lambda x: np.full(x.shape, np.inf), outputs=("float64",))
        assert np.isposinf(run(graph(node(), y=value("y", dtype="float64")), tmp_path)).all()

    def test_an_output_of_unknown_rank(self, tmp_path):
        register(lambda x: x)
        nodes = [node(outputs=["h"]), helper.make_node("Neg", ["h"], ["y"])]
        with pytest.raises(BackendError, match="OpenVINO wants to know how many axes 'h' has") as caught:
            ferry.compile(graph(*nodes), TARGET, tmp_path / "engine")
        assert "value_info" in caught.value.hint
        np.testing.assert_array_equal(run(graph(*nodes, value_info=[value("h")]), tmp_path), -X)

    @pytest.mark.parametrize(
        ("declared", "message"),
        [
            ({"inputs": ("float32", "float32")}, "has 2 inputs and 1 outputs, its node 1 and 1$"),
            ({"inputs": ("int64",)}, "takes int64 as input 0, its node has f32$"),
        ],
    )
    def test_a_kernel_that_does_not_fit_its_node(self, declared, message, tmp_path):
        register(lambda x: x, **declared)
        with pytest.raises(BackendError, match=message):
            ferry.compile(graph(node()), TARGET, tmp_path / "engine")

    def test_a_process_without_the_kernel(self, tmp_path, monkeypatch):
        register(lambda x: x)
        engine = ferry.compile(graph(node()), TARGET, tmp_path / "engine")
        monkeypatch.setattr(kernels, "_KERNELS", {})
        with pytest.raises(
            BackendError, match=r"OpenVINO cannot load '.*model.onnx': it has no operator my.own::Op"
        ) as e:
            engine.open()
        assert e.value.hint.startswith("import the module that gives 'my.own::Op' a kernel")

    def test_an_operator_that_nobody_has(self, tmp_path):
        with pytest.raises(BackendError, match="OpenVINO has no operator my.own::Op") as caught:
            ferry.compile(graph(node()), TARGET, tmp_path / "engine")
        assert caught.value.hint.startswith("import the module that gives 'my.own::Op' a kernel")


class TestHowLongThingsLive:
    """OpenVINO forgets what an operator is in Python unless that is held, and is held for ever if it holds itself."""

    def test_many_runs_from_many_threads_with_the_garbage_gone(self, tmp_path):
        register(lambda x: (np.ascontiguousarray(x[::-1]), x.argmax(1)), outputs=("float32", "int64"))
        nodes = [node(outputs=["h", "places"]), node(["h"], ["y", "unused"])]
        engine = ferry.compile(graph(*nodes, value_info=[value("h")]), TARGET, tmp_path / "engine")
        failures = []

        def work(session, seed):
            rng = np.random.default_rng(seed)
            for size in rng.integers(1, 9, 30):
                x = rng.standard_normal((size, 3)).astype(np.float32)
                if not np.array_equal(session.run({"x": x})["y"], x):
                    failures.append((seed, size))

        with engine.open() as session:
            gc.collect()
            threads = [threading.Thread(target=work, args=(session, seed)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(20):
                gc.collect()
            for thread in threads:
                thread.join()
        assert not failures

    @pytest.mark.parametrize("way", ["open", "trial"])
    def test_nothing_is_left_of_a_closed_session_nor_more_after_each_run(self, way, tmp_path):
        from torchferry.backends.openvino.kernels import _operator_class

        register(lambda x: x * 2)
        exported = ferry.graph.as_exported(graph(node()), TARGET)
        engine = ferry.compile(exported, TARGET, tmp_path / "engine")
        (tmp_path / "trial").mkdir()
        gc.collect()
        before = count_of(_operator_class())
        with (
            engine.open() if way == "open" else backends.get("openvino").trial(exported, tmp_path / "trial") as session
        ):
            session.run({"x": X})
            after_one = count_of(_operator_class())
            assert after_one > before
            for size in range(1, 30):
                session.run({"x": np.ones((size, 3), np.float32)})
            assert count_of(_operator_class()) == after_one
        del session
        gc.collect()
        assert count_of(_operator_class()) == before

    def test_a_session_that_nobody_closed_goes_with_its_last_name(self, tmp_path):
        register(lambda x: x * 2)
        session = ferry.compile(graph(node()), TARGET, tmp_path / "engine").open()
        session.run({"x": X})
        seen = weakref.ref(session)
        del session
        gc.collect()
        assert seen() is None

    def test_a_program_may_end_with_a_session_open(self, tmp_path):
        register(lambda x: x * 2)
        ferry.compile(graph(node()), TARGET, tmp_path / "engine")
        program = """if True:
            import sys
            import numpy
            from torchferry.core.engine import Engine
            from torchferry.core.kernels import Kernel, register_kernel
            register_kernel(Kernel("my.own::Op", lambda x: x * 2, ("float32",)))
            session = Engine.load("engine").open()
            print(session.run({"x": numpy.ones((1, 3), numpy.float32)})["y"])
            assert not {"torch", "onnx", "onnx_ir"} & sys.modules.keys()
        """
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "[[2. 2. 2.]]\n", "")


def count_of(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())
