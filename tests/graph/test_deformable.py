"""``DeformConv`` for engines that do not read it: as an operator of their own, or written as a sampling."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import torchferry as ferry
from torchferry import backends
from torchferry.core.errors import BackendError, UnsupportedError
from torchferry.core.target import Target
from torchferry.graph import as_exported
from torchferry.graph.passes import adapt
from torchferry.graph.passes.declined import declined
from torchferry.graph.provenance import MODULE_KEY

needs_onnxruntime = pytest.mark.skipif(
    not backends.get("onnxruntime").availability().ok, reason="onnxruntime is not installed"
)

CONVOLUTIONS = {
    "plain": {},
    "moved": {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2], "bias": True},
    "groups": {"group": 2, "offset_group": 4, "mask": True, "bias": True, "pads": [1, 1, 1, 1]},
    "mask without bias": {"group": 4, "offset_group": 2, "mask": True},
}
CHANNELS, OUT, KERNEL = 4, 8, (3, 2)


def convolution(bias=False, mask=False, opset=20, kind=np.float32, **attributes) -> onnx.ModelProto:
    """Build a graph of one; the sizes of the picture are free."""
    taps = attributes.get("offset_group", 1) * KERNEL[0] * KERNEL[1]
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    rng = np.random.default_rng(0)
    shape = (OUT, CHANNELS // attributes.get("group", 1), *KERNEL)
    weights = {"w": rng.standard_normal(shape).astype(kind), "b": rng.standard_normal(OUT).astype(kind)}
    inputs = [("x", ["n", CHANNELS, "h", "w_"]), ("offset", ["n", 2 * taps, "oh", "ow"])]
    inputs += [("mask", ["n", taps, "oh", "ow"])] if mask else []
    names = ["x", "w", "offset", "b" if bias else "", "mask" if mask else ""]
    while not names[-1]:
        names.pop()
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("DeformConv", names, ["y"], name="deform", **attributes)],
            "g",
            [helper.make_tensor_value_info(name, dtype, sizes) for name, sizes in inputs],
            [helper.make_tensor_value_info("y", dtype, ["n", OUT, "oh", "ow"])],
            [numpy_helper.from_array(array, name) for name, array in weights.items() if name in names],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def inputs_at(batch, height, width, mask=False, kind=np.float32, **attributes) -> dict[str, np.ndarray]:
    """Return random inputs; many of the samples lie outside of the picture."""
    rng = np.random.default_rng(height)
    strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    pads = attributes.get("pads", [0, 0, 0, 0])
    out = [
        (size + pads[axis] + pads[axis + 2] - (KERNEL[axis] - 1) * dilations[axis] - 1) // strides[axis] + 1
        for axis, size in enumerate((height, width))
    ]
    taps = attributes.get("offset_group", 1) * KERNEL[0] * KERNEL[1]
    inputs = {
        "x": rng.standard_normal((batch, CHANNELS, height, width)),
        "offset": 3 * rng.standard_normal((batch, 2 * taps, *out)),
    }
    if mask:
        inputs["mask"] = rng.random((batch, taps, *out))
    return {name: array.astype(kind) for name, array in inputs.items()}


def run(model, inputs):
    (got,) = ReferenceEvaluator(model).run(None, inputs)
    return got


SIZES = ((2, 5, 6), (1, 8, 4))


class TestComposition:
    @pytest.mark.parametrize("given", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
    def test_it_is_what_the_operator_is_at_every_size(self, given):
        model = convolution(**given)
        adapted, done = adapt(ir.from_proto(model), ["compose-deform-conv"])
        assert done == ("compose-deform-conv x1",)
        assert not any(node.op_type == "DeformConv" for node in adapted.graph)
        composed = ir.to_proto(adapted)
        onnx.checker.check_model(composed, full_check=True)
        for size in SIZES:
            inputs = inputs_at(*size, **given)
            np.testing.assert_allclose(run(composed, inputs), run(model, inputs), rtol=1e-4, atol=2e-5)

    @needs_onnxruntime
    def test_in_opset_19_sampling_has_another_name(self, tmp_path):
        model = convolution(opset=19)  # in which onnx's evaluator does not know it
        adapted, _ = adapt(ir.from_proto(model), ["compose-deform-conv"])
        inputs = inputs_at(*SIZES[0])
        with backends.get("onnxruntime").trial(as_exported(adapted), tmp_path) as session:
            np.testing.assert_allclose(session.run(inputs)["y"], run(model, inputs), rtol=1e-4, atol=2e-5)

    @needs_onnxruntime
    def test_far_outside_is_zero(self, tmp_path):
        adapted, _ = adapt(ir.from_proto(convolution(bias=True)), ["compose-deform-conv"])
        inputs = inputs_at(1, 5, 6)
        inputs["offset"][:] = np.float32([1e30, -np.inf, np.inf]).reshape(1, 1, 3, 1)
        with backends.get("onnxruntime").trial(as_exported(adapted), tmp_path) as session:
            got = session.run(inputs)["y"]
        bias = adapted.graph.initializers["b"].const_value.numpy()
        np.testing.assert_allclose(got, np.broadcast_to(bias.reshape(1, -1, 1, 1), got.shape), atol=1e-6)

    def test_places_are_computed_in_float32_for_a_graph_of_float16(self):
        model = convolution(kind=np.float16)
        adapted, _ = adapt(ir.from_proto(model), ["compose-deform-conv"])
        inputs = inputs_at(1, 5, 6, kind=np.float16)
        got = run(ir.to_proto(adapted), inputs)
        assert got.dtype == np.float16
        expected = run(convolution(), {name: array.astype(np.float32) for name, array in inputs.items()})
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=2e-2)

    def test_the_nodes_say_where_they_come_from(self):
        given = ir.from_proto(convolution())
        given.graph[0].metadata_props[MODULE_KEY] = "neck.0"
        adapted, _ = adapt(given, ["compose-deform-conv"])
        assert {node.metadata_props[MODULE_KEY] for node in adapted.graph} == {"neck.0"}

    def test_it_leaves_volumes_and_weights_of_unknown_shape_and_says_why(self):
        volumes = convolution()
        volumes.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((1, 1, 1, 1, 1), np.float32), "w"))
        adapted, done = adapt(ir.from_proto(volumes), ["compose-deform-conv"])
        assert done == ()
        assert "3 spatial axes" in declined(adapted.graph[0])
        unknown = convolution()
        del unknown.graph.initializer[:]
        unknown.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [OUT, "k", 3, 2]))
        adapted, done = adapt(ir.from_proto(unknown), ["compose-deform-conv"])
        assert done == ()
        assert "shape of its weights" in declined(adapted.graph[0])


@pytest.mark.skipif(not backends.get("tensorrt-rtx").availability().ok, reason="tensorrt-rtx is not installed")
class TestTensorRt:
    def compiled(self, model, folder):
        exported = as_exported(model)
        dims = {name: dataclasses.replace(known, min=2, max=16) for name, known in exported.signature.dims.items()}
        bounded = exported.replace(signature=dataclasses.replace(exported.signature, dims=dims))
        return ferry.compile(bounded, Target("tensorrt-rtx", device="cuda:sm86"), folder)

    def test_it_builds_the_composition(self, tmp_path):
        engine = self.compiled(convolution(**CONVOLUTIONS["groups"]), tmp_path / "engine")
        assert engine.adaptations[0] == "compose-deform-conv x1"

    def test_what_is_not_composed_is_refused_with_the_reason(self, tmp_path):
        unknown = convolution()
        del unknown.graph.initializer[:]
        unknown.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [OUT, "k", 3, 2]))
        with pytest.raises(UnsupportedError, match="not take DeformConv .*: the shape of its weights is not known"):
            self.compiled(unknown, tmp_path / "engine")


@pytest.mark.skipif(not backends.get("openvino").availability().ok, reason="openvino is not installed")
class TestOpenVino:
    @pytest.mark.parametrize("given", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
    def test_it_is_openvinos_own_operator_and_needs_nothing_when_opened(self, tmp_path, given):
        model = convolution(**given)
        engine = ferry.compile(model, Target("openvino"), tmp_path / "engine")
        assert engine.adaptations == ("deform-conv-extension x1", "precision-hint f32")
        assert engine.files == ("model.bin", "model.xml")
        with engine.open() as session:
            for size in SIZES:
                inputs = inputs_at(*size, **given)
                np.testing.assert_allclose(session.run(inputs)["y"], run(model, inputs), rtol=1e-4, atol=1e-5)

    def test_volumes_are_refused(self, tmp_path):
        volumes = convolution()
        volumes.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((1, 1, 1, 1, 1), np.float32), "w"))
        with pytest.raises(BackendError, match="DeformConv for two spatial axes alone"):
            ferry.compile(volumes, Target("openvino"), tmp_path / "engine")
