"""Every behaviour that a backend must have, on every backend."""

import gc
import shutil
import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import torchferry as ferry
from torchferry import backends
from torchferry.core.engine import Engine, get_backend
from torchferry.core.errors import (
    BackendError,
    FormatError,
    InputError,
    IntegrityError,
    MissingBackendError,
    MissingFileError,
    OutputError,
    TorchferryError,
    UnsupportedError,
)
from torchferry.core.target import Target

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


def graph(nodes, inputs, outputs, initializers=(), opset=20) -> onnx.ModelProto:
    """Build a model; inputs and outputs are (name, dtype, shape)."""
    values = [[helper.make_tensor_value_info(n, TYPES[t], s) for n, t, s in group] for group in (inputs, outputs)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *values, list(initializers)), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def double(dtype="float32", shape=("n", 3)) -> onnx.ModelProto:
    return graph([helper.make_node("Add", ["x", "x"], ["y"])], [("x", dtype, shape)], [("y", dtype, shape)])


@pytest.fixture(params=backends.names())
def backend(request) -> str:
    """One backend; a missing engine is a visible skip."""
    available = backends.get(request.param).availability()
    if not available.ok:
        pytest.skip(f"{request.param}: {available.reason}")
    return request.param


@pytest.fixture
def compiled(backend, tmp_path):
    """Compile a graph for the backend."""

    def compile_(model, name="engine") -> Engine:
        return ferry.compile(model, Target(backend), tmp_path / name)

    return compile_


def only(outputs):
    (value,) = outputs.values()
    return value


def test_it_says_what_it_is(backend):
    found = get_backend(backend)
    assert found.name == backend
    assert found.availability().version
    capabilities = found.capabilities()
    assert "fp32" in capabilities.precisions
    assert capabilities.max_opset >= 20
    assert capabilities.dynamic_shapes


def test_dynamic_sizes(compiled):
    with compiled(double()).open() as session:
        for n in (1, 2, 7, 0):
            x = np.random.default_rng(n).random((n, 3), np.float32)
            np.testing.assert_allclose(only(session.run({"x": x})), 2 * x)


def test_several_inputs_and_outputs_keep_their_names_and_order(compiled):
    nodes = [helper.make_node("Sub", ["a", "b"], ["z"]), helper.make_node("Add", ["a", "b"], ["c"])]
    values = [("b", "float32", [2]), ("a", "float32", [2])]
    model = graph(nodes, values, [("z", "float32", [2]), ("c", "float32", [2])])
    with compiled(model).open() as session:
        got = session.run({"a": np.float32([5, 6]), "b": np.float32([1, 2])})
    assert list(got) == ["z", "c"]
    np.testing.assert_array_equal(got["z"], [4, 4])
    np.testing.assert_array_equal(got["c"], [6, 8])


@pytest.mark.parametrize("dtype", [t for t in TYPES if t != "bool"])
def test_dtypes(compiled, dtype):
    with compiled(double(dtype)).open() as session:
        got = only(session.run({"x": np.arange(6, dtype=dtype).reshape(2, 3)}))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, 2 * np.arange(6).reshape(2, 3))


def test_booleans(compiled):
    model = graph([helper.make_node("Not", ["x"], ["y"])], [("x", "bool", ["n"])], [("y", "bool", ["n"])])
    with compiled(model).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.array([True, False])})), [False, True])


def test_scalars_and_views(compiled):
    scalar = graph([helper.make_node("Neg", ["x"], ["y"])], [("x", "float32", [])], [("y", "float32", [])])
    with compiled(scalar, "scalar").open() as session:
        assert only(session.run({"x": np.array(3, np.float32)})) == -3
    with compiled(double(shape=("n", "m"))).open() as session:
        x = np.arange(24, dtype=np.float32).reshape(4, 6)
        for view in (x.T, x[::2, ::-1], np.asfortranarray(x)):
            np.testing.assert_array_equal(only(session.run({"x": view})), 2 * view)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'x' is missing"),
        ({"y": np.zeros((2, 3), np.float32)}, "unknown input 'y'"),
        ({"x": np.zeros((2, 3), np.float32), "z": np.zeros(1)}, "unknown input 'z'"),
        ({"x": np.zeros((2, 3))}, "must be float32, got float64"),
        ({"x": np.zeros((2, 3), ">f4")}, "byte order"),
        ({"x": np.zeros(3, np.float32)}, "must have 2 dimensions"),
        ({"x": np.zeros((2, 4), np.float32)}, "axis 1 of 'x' must be 3, got 4"),
        ({"x": [[1.0, 2.0, 3.0]]}, "numpy array"),
        (None, "dictionary"),
    ],
)
def test_wrong_inputs_are_refused_before_the_engine_sees_them(compiled, inputs, message):
    with compiled(double()).open() as session:
        session.run({"x": np.zeros((2, 3), np.float32)})
        with pytest.raises(InputError, match=message):
            session.run(inputs)


def test_threads_may_share_a_session(compiled):
    weights = np.random.default_rng(0).random((64, 64), np.float32)
    model = graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", "float32", ["n", 64])],
        [("y", "float32", ["n", 64])],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    failures = []
    with compiled(model).open() as session:

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(20):
                x = rng.random((int(rng.integers(1, 9)), 64), np.float32)
                if not np.allclose(only(session.run({"x": x})), x @ weights, rtol=1e-4):
                    failures.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_close_and_reopen(compiled):
    engine = compiled(double())
    x = np.ones((1, 3), np.float32)
    session = engine.open()
    first = only(session.run({"x": x}))
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run({"x": x})
    gc.collect()
    np.testing.assert_array_equal(first, 2 * x)  # an output outlives its session
    with Engine.load(engine.folder).open() as again:
        np.testing.assert_array_equal(only(again.run({"x": x})), first)


def test_the_record_on_disk_is_the_engine(compiled):
    engine = compiled(double())
    assert Engine.load(engine.folder) == engine
    assert engine.versions[engine.target.backend]


def test_a_package_round_trip(compiled, tmp_path):
    engine = compiled(double())
    ferry.pack(engine, tmp_path / "package", name="double")
    shutil.rmtree(engine.folder)
    shutil.move(tmp_path / "package", tmp_path / "elsewhere")
    with ferry.load(tmp_path / "elsewhere").open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.ones((4, 3), np.float32)})), 2 * np.ones((4, 3)))


def test_it_is_the_graph_that_was_compiled_and_not_the_file(compiled, tmp_path):
    onnx.save(double(), tmp_path / "m.onnx")
    engine = compiled(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").unlink()
    with engine.open() as session:
        session.run({"x": np.ones((4, 3), np.float32)})


def test_a_graph_that_it_cannot_take_leaves_nothing_behind(backend, tmp_path):
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nobody")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)],
    )
    model.ir_version = 10
    with pytest.raises(BackendError, match="NoSuchOperator"):
        ferry.compile(model, Target(backend), tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_a_missing_or_unlisted_file_is_named(compiled):
    engine = compiled(double())
    (engine.folder / engine.files[0]).unlink()
    with pytest.raises(IntegrityError, match=engine.files[0]):
        engine.open()


def test_a_damaged_file_is_one_clear_error(compiled):
    engine = compiled(double())
    (engine.folder / engine.files[0]).write_bytes(b"\x00garbage")
    with pytest.raises(BackendError, match="load"):
        engine.open()


def test_a_precision_or_device_that_it_lacks_is_refused_with_what_it_offers(backend, tmp_path):
    missing = {"fp32", "fp16", "bf16", "int8"} - set(get_backend(backend).capabilities().precisions)
    for precision in missing:
        with pytest.raises(UnsupportedError, match="fp32"):
            ferry.compile(double(), Target(backend, precision), tmp_path / "engine")
    with pytest.raises(UnsupportedError, match="nowhere"):
        ferry.compile(double(), Target(backend, device="nowhere"), tmp_path / "engine")


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(backend, compiled, tmp_path):
    engine = compiled(double())
    with pytest.raises(OutputError, match="exists"):
        compiled(double())
    ferry.compile(double("int64"), Target(backend), engine.folder, overwrite=True)
    assert Engine.load(engine.folder).signature.inputs[0].dtype == "int64"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="did not write it"):
        ferry.compile(double(), Target(backend), tmp_path / "mine", overwrite=True)


class TestTheTable:
    def test_an_unknown_backend_names_the_nearest(self, tmp_path):
        with pytest.raises(MissingBackendError, match="did you mean 'onnxruntime'"):
            ferry.compile(double(), Target("onnxrutime"), tmp_path / "engine")

    def test_a_missing_engine_says_how_to_install_it(self, monkeypatch, tmp_path):
        import importlib.util

        find_spec = importlib.util.find_spec
        hidden = lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hidden)
        with pytest.raises(MissingBackendError, match=r"pip install 'torchferry\[onnxruntime\]'"):
            ferry.compile(double(), Target("onnxruntime"), tmp_path / "engine")

    @pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x0a" * 100])
    def test_a_file_that_is_no_onnx_model(self, tmp_path, content):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(FormatError, match="m.onnx"):
            ferry.compile(tmp_path / "m.onnx", Target(), tmp_path / "engine")

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(MissingFileError, match="m.onnx"):
            ferry.compile(tmp_path / "m.onnx", Target(), tmp_path / "engine")

    def test_something_else_altogether(self, tmp_path):
        with pytest.raises(TorchferryError, match="dict"):
            ferry.compile({}, Target(), tmp_path / "engine")

    @pytest.mark.parametrize("record", ["", "[]", "{}", '{"target": 3}'])
    def test_a_damaged_record(self, tmp_path, record):
        (tmp_path / "engine.json").write_text(record)
        with pytest.raises(FormatError, match="engine.json"):
            Engine.load(tmp_path)


def test_onnxruntime_saves_what_it_optimises_and_runs_with_one_thread(tmp_path):
    engine = ferry.compile(double(), Target("onnxruntime"), tmp_path / "engine")
    with engine.open(threads=1, spinning=True) as session:
        session.run({"x": np.ones((1, 3), np.float32)})
    with pytest.raises(TypeError, match="thread_count"):
        engine.open(thread_count=1)
