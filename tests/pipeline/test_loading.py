"""From a config to a model with its data."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

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
