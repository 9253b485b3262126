"""The operator means what its definition says, and each of the three ways exports it."""

# ruff: noqa: F821 - the fixture below imports the modules of the example

import importlib
import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import torchferry as ferry
from torchferry.testing import assert_op

EXAMPLE = Path(__file__).parents[2] / "examples" / "deform_conv"
BACKENDS = ("onnxruntime", "openvino", "reference")
DYNAMIC = {"image": {0: "batch", 2: "height", 3: "width"}}


@pytest.fixture(scope="module", autouse=True)
def _example():
    """The operator is defined only while these tests run, for others count on its absence."""
    names = ("deformable", "ways")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        globals().update({name: importlib.import_module(name) for name in names})
        yield
    if not deformable.IS_TORCHVISION:
        deformable.LIBRARY._destroy()
    for name in names:
        del globals()[name], sys.modules[name]


def way(name: str) -> dict:
    return {"function_rewriter" if name == "COMPOSED" else "symbolic_rewriter": getattr(ways, name)}


CONFIGURATIONS = {
    "plain": {},
    "masked": {"use_mask": True},
    "stride": {"stride": (2, 3)},
    "padding": {"padding": (0, 2)},
    "dilation": {"dilation": (2, 1), "padding": (2, 1)},
    "kernel": {"kernel_size": (2, 3), "padding": (0, 1)},
    "groups": {"channels": (4, 6), "groups": 2},
    "offset groups": {"channels": (4, 2), "offset_groups": 2},
    "both groups": {"channels": (8, 4), "groups": 4, "offset_groups": 2},
    "all": {
        "channels": (4, 6),
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": (1, 2),
        "groups": 2,
        "offset_groups": 4,
        "use_mask": True,
    },
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def model(request):
    model = deformable.DeformableConv2d(**request.param).eval()
    with torch.no_grad():
        model.offsets.weight *= 5  # far enough for many samples to lie outside of the picture
    return model


def by_definition(image, weight, offset, mask, bias, sh, sw, ph, pw, dh, dw, groups, offset_groups, use_mask):
    """The operator, one number after the other."""
    (channels, height, width), (out, per_group, kh, kw), (oh, ow) = image.shape[1:], weight.shape, offset.shape[2:]
    result = torch.zeros(len(image), out, oh, ow, dtype=torch.float64)

    def pixel(n, c, y, x):
        return image[n, c, y, x].item() if 0 <= y < height and 0 <= x < width else 0.0

    for n, o, i, j in itertools.product(range(len(image)), range(out), range(oh), range(ow)):
        total = bias[o].item()
        for k, u, v in itertools.product(range(per_group), range(kh), range(kw)):
            c = o // (out // groups) * per_group + k
            tap = c // (channels // offset_groups) * kh * kw + u * kw + v
            y = i * sh - ph + u * dh + offset[n, 2 * tap, i, j].item()
            x = j * sw - pw + v * dw + offset[n, 2 * tap + 1, i, j].item()
            top, left = math.floor(y), math.floor(x)
            down, right = y - top, x - left
            sample = (1 - down) * ((1 - right) * pixel(n, c, top, left) + right * pixel(n, c, top, left + 1))
            sample += down * ((1 - right) * pixel(n, c, top + 1, left) + right * pixel(n, c, top + 1, left + 1))
            total += weight[o, k, u, v].item() * sample * (mask[n, tap, i, j].item() if use_mask else 1)
        result[n, o, i, j] = total
    return result.float()


def arguments(model, image: torch.Tensor) -> tuple:
    mask = torch.zeros(len(image), 1) if model.masks is None else model.masks(image).sigmoid()
    return image, model.weight, model.offsets(image), mask, model.bias, *model.numbers


@torch.no_grad()
def test_the_operator_and_the_composition_are_what_the_definition_says(model):
    given = arguments(model, torch.randn(2, model.offsets.in_channels, 6, 7))
    expected = by_definition(*given)
    torch.testing.assert_close(torch.ops.torchvision.deform_conv2d(*given), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ways.composed(*given), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_offsets_it_is_a_convolution(model):
    image = torch.randn(2, model.offsets.in_channels, 8, 9)
    _, weight, offset, _, bias, *numbers = arguments(model, image)
    got = torch.ops.torchvision.deform_conv2d(
        image, weight, torch.zeros_like(offset), torch.zeros(2, 1), bias, *numbers[:-1], False
    )
    sh, sw, ph, pw, dh, dw, groups, *_ = numbers
    torch.testing.assert_close(got, torch.conv2d(image, weight, bias, (sh, sw), (ph, pw), (dh, dw), groups))


BORDERS = [-1e30, -7.0, -1.0, -0.999, -0.5, 0.0, 0.25, 1.0, 1.5, 2.0, 3.0, 3.001, 4.0, 1e30, math.inf]


def opened(exported: ferry.Exported, backend: str):
    with tempfile.TemporaryDirectory() as scratch:
        return ferry.compile(exported, ferry.Target(backend), Path(scratch) / "engine").open()


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_at_and_beyond_the_border(backend):
    """A kernel of one tap at pixel 0 reads where its offset says, so the offsets are the places."""
    image = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
    places = torch.cartesian_prod(torch.tensor(BORDERS), torch.tensor(BORDERS)).T
    steps = torch.arange(len(BORDERS) ** 2, dtype=torch.float32)
    offset = torch.stack((places[0], places[1] - steps)).reshape(1, 2, 1, -1)
    constants = (torch.ones(1, 1, 1, 1), torch.zeros(1, 1), torch.zeros(1))

    def sampled(image, offset):
        weight, mask, bias = constants
        return torch.ops.torchvision.deform_conv2d(image, weight, offset, mask, bias, 1, 1, 0, 0, 1, 1, 1, 1, False)

    exact = offset.clone().nan_to_num(posinf=1e30)
    weight, mask, bias = constants
    torch.testing.assert_close(
        sampled(image, offset), by_definition(image, weight, exact, mask, bias, 1, 1, 0, 0, 1, 1, 1, 1, False)
    )
    assert_op(sampled, (image, offset), backend, **way("COMPOSED"))


def test_the_composition_agrees_in_every_engine_at_sizes_never_exported(model):
    """What is exported for one is run on all: it has nothing that is one engine's own."""
    channels = model.offsets.in_channels
    exported = ferry.export(model, torch.randn(2, channels, 9, 8), dynamic_shapes=DYNAMIC, **way("COMPOSED"))
    exported.report.raise_for_failure()
    for backend, size in itertools.product(BACKENDS, ((1, channels, 5, 11), (3, channels, 14, 6))):
        image = torch.randn(size)
        [got] = opened(exported, backend).run({"image": image.numpy()}).values()
        torch.testing.assert_close(torch.from_numpy(got), model(image).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_standard_operator_agrees_at_sizes_never_exported(model, backend):
    channels = model.offsets.in_channels
    cases = [((2, channels, 9, 8),), ((1, channels, 5, 11),), ((3, channels, 14, 6),)]
    assert_op(model, cases, backend, rtol=0, atol=1e-4, **way("STANDARD"))


def test_the_standard_operator_agrees_in_the_evaluator():
    """It is slow, so a few pixels are enough."""
    assert_op(
        deformable.DeformableConv2d(use_mask=True).eval(),
        [((1, 3, 4, 5),), ((2, 3, 5, 3),)],
        "reference",
        **way("STANDARD"),
    )


def node(exported: ferry.Exported, operator: str):
    [found] = [node for node in exported.model.graph if node.op_type == operator]
    return found, {name: attribute.value for name, attribute in found.attributes.items()}


def test_the_standard_operators_inputs_and_attributes():
    model = deformable.DeformableConv2d(**CONFIGURATIONS["all"]).eval()
    exported = ferry.export(model, torch.randn(2, 4, 9, 8), **way("STANDARD"))
    deform, attributes = node(exported, "DeformConv")
    assert deform.domain == ""
    assert {name: list(value) if isinstance(value, tuple | list) else value for name, value in attributes.items()} == {
        "strides": [2, 1],
        "pads": [1, 2, 1, 2],
        "dilations": [1, 2],
        "group": 2,
        "offset_group": 4,
    }
    names = [value.name for value in deform.inputs]
    assert names[0] == "image"
    assert names[1] == "weight"
    assert names[3] == "bias"
    assert deform.inputs[2].shape[1] == 2 * deform.inputs[4].shape[1] == 2 * 4 * 6


@pytest.mark.parametrize("use_mask", [False, True])
def test_the_operator_of_ones_own_has_all_inputs_and_attributes(use_mask):
    model = deformable.DeformableConv2d(**CONFIGURATIONS["all"] | {"use_mask": use_mask}).eval()
    exported = ferry.export(model, torch.randn(2, 4, 9, 8), dynamic_shapes=DYNAMIC, **way("CUSTOM"))
    own, attributes = node(exported, "deform_conv2d")
    assert own.domain == "custom"
    assert "custom" in exported.model.opset_imports
    assert {name: list(value) if isinstance(value, tuple | list) else value for name, value in attributes.items()} == {
        "stride": [2, 1],
        "padding": [1, 2],
        "dilation": [1, 2],
        "groups": 2,
        "offset_groups": 4,
        "use_mask": int(use_mask),
    }
    image, weight, offset, mask, bias = own.inputs
    assert (image.name, weight.name, bias.name) == ("image", "weight", "bias")
    assert offset.producer().op_type == "Conv"
    assert offset.shape[1] == 48
    assert mask.producer().op_type == ("Sigmoid" if use_mask else "ConstantOfShape")
    assert [str(size) for size in exported.signature.outputs[0].shape][:2] == ["batch", "6"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_engine_runs_the_operator_of_ones_own_and_says_which_it_lacks(backend, tmp_path):
    target = ferry.Target(backend)
    exported = ferry.export(
        deformable.DeformableConv2d().eval(), torch.randn(1, 3, 8, 8), target=target, **way("CUSTOM")
    )
    with pytest.raises(ferry.TorchferryError, match=r"(?s)custom.*deform_conv2d|deform_conv2d.*custom"):
        ferry.compile(exported, target, tmp_path / "engine")


def test_an_opset_without_the_standard_operator():
    """DeformConv came with opset 19; the composition does not need it."""
    model, image = deformable.DeformableConv2d().eval(), torch.randn(1, 3, 8, 8)
    target = ferry.Target("onnxruntime", opset=18)
    with pytest.raises(ferry.TorchferryError, match=r"torchvision::deform_conv2d(?s:.*)opset 19"):
        ferry.export(model, image, target=target, **way("STANDARD"))
    assert_op(model, (image,), target, **way("COMPOSED"))


def test_the_schema_is_torchvisions():
    schema = str(torch.ops.torchvision.deform_conv2d.default._schema)
    assert schema == f"torchvision::{deformable.SCHEMA}"


@pytest.mark.slow
def test_it_prints_what_its_readme_shows():
    done = subprocess.run([sys.executable, EXAMPLE / "export.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    readme = (EXAMPLE / "README.md").read_text().splitlines()
    lines = done.stdout.splitlines()
    for line in lines:
        assert line in readme
    assert sum("agrees" in line for line in lines) == 6
    assert sum("cannot" in line for line in lines) == 3
