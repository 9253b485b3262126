"""From a config to a model with its data."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError, InputError, ModelError
from torchferry.pipeline.config import validate
from torchferry.pipeline.loading import load_source

MODEL = """
import torch


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, factor=None, *, shift=0):
        return x * self.weight


class Nameless(torch.nn.Module):
    def forward(self, *images):
        return images[0]
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "scaled.py").write_text(MODEL)
    Image.new("RGB", (4, 2), (255, 0, 0)).save("red.png")
    pixels = np.zeros((1, 3, 2, 4), np.float32)
    pixels[:, 0] = 1
    np.save("gain.npy", np.float32([2]))
    np.savez("graph.npz", image=pixels, gain=np.float32([2]))
    np.savez("forward.npz", x=pixels, factor=np.float32([2]))
    return tmp_path


def _load(*inputs, model="Scaled", **sections):
    values = {"model": {"factory": f"scaled.py:{model}"}, "inputs": list(inputs), "out": "out", **sections}
    return load_source(validate(values, "test"))


NAMED = {"input_names": ["image", "gain"], "dynamic": {"image": {0: "n"}}}


@pytest.mark.parametrize(
    "inputs",
    [
        ("red.png", "factor=2"),
        ("red.png", "gain=2"),
        ("gain=2", "red.png"),
        ("image=red.png", "gain=2"),
        ("x=red.png", "gain=gain.npy"),
        ("x=red.png", "factor=gain.npy"),
        ("red.png", "gain=graph.npz"),
        ("red.png", "gain=forward.npz"),
        ("red.png", "factor=forward.npz"),
        ("graph.npz",),
        ("forward.npz",),
    ],
)
def test_inputs_go_by_the_graphs_names_and_by_forwards(inputs):
    loaded = _load(*inputs, export=NAMED)
    [call] = loaded.calls
    assert list(call) == ["x", "factor"], "in forward's order, by forward's names"
    assert call["x"].shape == (1, 3, 2, 4)
    assert call["x"][0, :, 0, 0].tolist() == [1, 0, 0]
    assert call["factor"].tolist() == [2]
    assert loaded.source.names.names == ["image", "gain"]
    assert list(loaded.preprocess) == (["image"] if any("red.png" in item for item in inputs) else [])


@pytest.mark.parametrize("name", ["x", "image"])
def test_preprocess_goes_by_both_names_too_and_is_kept_for_arrays(name):
    declared = {name: {"channels": "BGR", "scale": 1.0}}
    loaded = _load("red.png", "gain=2", export=NAMED, preprocess=declared)
    assert loaded.calls[0]["x"][0, :, 0, 0].tolist() == [0, 0, 255]
    assert loaded.preprocess["image"].channels == "BGR"
    assert _load("forward.npz", export=NAMED, preprocess=declared).preprocess == loaded.preprocess


def test_without_names_the_parameters_are_the_names():
    loaded = _load("red.png", "shift=1")
    assert loaded.source.names.names == ["x", "shift"]
    assert loaded.calls[0].keys() == {"x", "shift"}


def test_the_model_is_in_eval_mode_with_its_checkpoint(place):
    torch.save({"module.weight": torch.full((1,), 5.0)}, place / "w.pt")
    model = {"factory": "scaled.py:Scaled", "checkpoint": "w.pt"}
    loaded = load_source(validate({"model": model, "inputs": ["x=1"], "out": "o"}, "test"))
    assert loaded.notes == ("checkpoint: prefix 'module.' stripped",)
    assert not loaded.source.model.training
    assert loaded.source.model.weight.item() == 5


@pytest.mark.parametrize(
    ("inputs", "sections", "error", "message"),
    [
        (["y=1"], {}, ConfigError, "no parameter 'y'"),
        (["imag=1"], {"export": NAMED}, ConfigError, "no parameter 'imag'\n  hint: did you mean 'image'"),
        (["x=1"], {"preprocess": {"shif": {}}}, ConfigError, "no parameter 'shif'\n  hint: did you mean 'shift'"),
        (["x=1"], {"model": "Nameless"}, ModelError, r"forward\(\*images\) takes no input"),
        (["text.npz"], {}, InputError, "input 'x' of dtype <U1 cannot be a tensor"),
    ],
)
def test_refused(inputs, sections, error, message):
    np.savez("text.npz", x=np.array(["a"]))
    with pytest.raises(error, match=message):
        _load(*inputs, **sections)


def _declared(shapes, *, dynamic=None, model_inputs=None, names=("image",)):
    backend = {"model_inputs": model_inputs or [{"input_shapes": {"image": shapes}}]}
    export = {"input_names": list(names), "dynamic": dynamic or {"image": {0: "n", 3: "w"}}}
    return _load("red.png", export=export, backend_config=backend).source.dynamic_shapes


SHAPES = {"min_shape": [1, 3, 2, 2], "opt_shape": [2, 3, 2, 4], "max_shape": [8, 3, 2, 6]}
RANGED = {"image": {0: Dimension("n", 1, 8, opt=2), 3: Dimension("w", 2, 6, opt=4)}}


def test_shapes_are_the_sizes_of_the_named_axes():
    assert _declared(SHAPES) == RANGED
    assert _declared(SHAPES, dynamic={"x": {0: "n", 3: "w"}}) == RANGED  # forward's own name
    from_the_end = _declared(SHAPES, dynamic={"image": {0: "n", -1: "w"}})
    assert from_the_end == {"image": {0: RANGED["image"][0], -1: RANGED["image"][3]}}
    without_optimum = _declared({key: SHAPES[key] for key in ("min_shape", "max_shape")})
    assert without_optimum == {"image": {0: Dimension("n", 1, 8, opt=4), 3: Dimension("w", 2, 6, opt=4)}}
    usual = _declared({}, model_inputs=[{"opt_shapes": {"image": [2, 3, 2, 4]}}])
    assert usual == {"image": {0: Dimension("n", opt=2), 3: Dimension("w", opt=4)}}
    assert _declared({}, model_inputs=[{}]) == {"image": {0: Dimension("n"), 3: Dimension("w")}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"min_shape": [1, 3, 2]},
            r"image\.min_shape' has 3 sizes, \[1, 3, 2\], the example of 'image' \[1, 3, 2, 4\]",
        ),
        ({"max_shape": [8, 3, 9, 6]}, r"image\.max_shape' has 9 at axis 2, which is not dynamic and 2 in the example"),
        ({"opt_shape": [2, 4, 2, 4]}, r"image\.opt_shape' has 4 at axis 1"),
        ({"opt_shape": [9, 3, 2, 4]}, r"input_shapes\.image': the sizes of 'n' must rise.*min 1, opt 9, max 8"),
        ({"min_shape": [9, 3, 2, 2]}, r"input_shapes\.image': the sizes of 'n' must rise"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_key(changed, message):
    with pytest.raises(ConfigError, match=r"'backend_config\.model_inputs\.0\..*" + message) as caught:
        _declared({**SHAPES, **changed})
    if "not dynamic" in message:
        assert "name the axis in export.dynamic" in caught.value.hint


def test_shapes_of_what_is_no_input_and_sizes_said_twice_are_refused():
    with pytest.raises(ConfigError, match=r"opt_shapes\.imag': the graph has no input 'imag'"):
        _declared({}, model_inputs=[{"opt_shapes": {"imag": [1, 3, 2, 4]}}])
    with pytest.raises(ConfigError, match="says sizes of 'n', and so does 'n=1..8'"):
        _declared(SHAPES, dynamic={"image": {0: "n=1..8", 3: "w"}})
    both = [{"input_shapes": {"image": SHAPES}, "opt_shapes": {"image": SHAPES["opt_shape"]}}]
    with pytest.raises(ConfigError, match="'image' stands in input_shapes and in opt_shapes"):
        _declared({}, model_inputs=both)
