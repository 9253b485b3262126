"""Loading weights: what fits is loaded, what was done is said, and nothing in the file is run."""

import argparse
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchferry.core.errors import CheckpointError, MissingFileError
from torchferry.exporter.checkpoint import load_checkpoint


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def weights():
    """Weights that are not the model's own; also a whole number, BatchNorm's counter."""
    return {key: torch.full_like(value, 7) for key, value in Net().state_dict().items()}


def _prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def _loaded(model):
    return all((value == 7).all() for value in model.state_dict().values())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.ckpt", "w"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_plain(tmp_path, model, weights, name, zipped):
    if name.endswith("safetensors"):
        save_file(weights, tmp_path / name)
    else:
        torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert load_checkpoint(model, tmp_path / name) == []
    assert _loaded(model)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda w: {"state_dict": w, "epoch": 3}, "weights found under 'state_dict'"),
        (lambda w: {"model": {"state_dict": w}}, "weights found under 'model.state_dict'"),
        (lambda w: _prefixed("module.", w), "prefix 'module.' stripped"),
        (lambda w: _prefixed("_orig_mod.", w), "prefix '_orig_mod.' stripped"),
        (
            lambda w: {"state_dict": _prefixed("generator.", w)},
            "weights found under 'state_dict', prefix 'generator.' stripped",
        ),
        (
            lambda w: _prefixed("generator.", w) | {"discriminator.conv.weight": torch.ones(3), "step": torch.ones(1)},
            "prefix 'generator.' stripped, 2 other keys left out",
        ),
        (
            lambda w: _prefixed("module.generator.", w) | {"module.discriminator.weight": torch.ones(3)},
            "prefix 'module.' stripped, prefix 'generator.' stripped, 1 other keys left out",
        ),
        (lambda w: {key: value.half() for key, value in w.items()}, "float16 weights converted to the model's dtype"),
    ],
)
@pytest.mark.parametrize("unsafe", [False, True])
def test_what_was_done_is_said(tmp_path, model, weights, wrap, said, unsafe):
    torch.save(wrap(weights), tmp_path / "w.pt")
    assert load_checkpoint(model, tmp_path / "w.pt", unsafe=unsafe) == [f"checkpoint: {said}"]
    assert _loaded(model)


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path):
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2)})
    torch.save(
        {f"module.{key}": torch.full((2, 2)[: 2 - i], 7.0) for i, key in enumerate(("weight", "bias"))},
        tmp_path / "w.pt",
    )
    assert load_checkpoint(model, tmp_path / "w.pt") == []
    assert _loaded(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.bias": None}, "missing keys: conv.bias"),
        ({"conv.bias": None, "norm.weight": None}, "missing keys: conv.bias, norm.weight"),
        ({"head.bias": torch.ones(1)}, "unexpected keys: head.bias"),
        ({"conv.bias": torch.ones(3)}, r"other shapes: conv.bias is \(3,\), the model has \(2,\)"),
        (
            {"conv.bias": None, "head.bias": torch.ones(1), "conv.weight": torch.ones(1)},
            r"missing keys: conv.bias; unexpected keys: head.bias; other shapes: conv.weight is \(1,\)",
        ),
        ({f"k{i}": torch.ones(1) for i in range(20)}, "unexpected keys: k0, k1, k2, k3, k4, k5, k6, k7 and 12 more"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_does_not_fit_is_listed_and_the_model_left_alone(tmp_path, model, weights, change, message, prefix):
    changed = {key: value for key, value in (weights | change).items() if value is not None}
    torch.save(_prefixed(prefix, changed), tmp_path / "w.pt")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(model, tmp_path / "w.pt")
    assert "architecture" in caught.value.hint
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.ones(2), {}, "text"])
def test_a_checkpoint_without_weights(tmp_path, model, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_checkpoint(model, tmp_path / "w.pt")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _save_whole_model(_content, path):
    torch.save(Net(), path)


def _save_script(_content, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
        _save_whole_model,
        _save_script,
    ],
    ids=["zip", "old", "pickle", "pickle of protocol 2", "whole model", "TorchScript"],
)
def test_code_is_refused_and_does_not_run(tmp_path, model, weights, save):
    save({"state_dict": weights, "payload": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="is pickled with code in it.*refused") as caught:
        load_checkpoint(model, tmp_path / "evil.pt")
    assert "--unsafe-checkpoint" in caught.value.hint
    assert not (tmp_path / "ran").exists()


def test_the_code_is_named(tmp_path, model, weights):
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"code in it \(argparse.Namespace\)"):
        load_checkpoint(model, tmp_path / "w.pt")


def test_code_runs_when_told(tmp_path, model, weights):
    torch.save({"state_dict": weights, "payload": Touch(tmp_path / "ran")}, tmp_path / "w.pt")
    assert load_checkpoint(model, tmp_path / "w.pt", unsafe=True) == ["checkpoint: weights found under 'state_dict'"]
    assert (tmp_path / "ran").exists()
    assert _loaded(model)


def test_a_whole_model_is_taken_when_told(tmp_path, model):
    other = Net()
    torch.save(other, tmp_path / "w.pt")
    assert load_checkpoint(model, tmp_path / "w.pt", unsafe=True) == []
    assert torch.equal(model.conv.weight, other.conv.weight)


class Raises:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return _fail, ()


def _fail():
    raise ZeroDivisionError("in the file's own code")


def test_code_that_fails_is_an_error_of_the_checkpoint(tmp_path, model):
    torch.save({"x": Raises()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="ZeroDivisionError: in the file's own code"):
        load_checkpoint(model, tmp_path / "w.pt", unsafe=True)


@pytest.mark.parametrize(
    "data", [b"", b"text, and no weights", bytes(range(256)) * 20, b"PK\x03\x04" + bytes(200), b"\x80\x02}q\x00."[:3]]
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_garbage(tmp_path, model, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / name)
    assert f"checkpoint '{tmp_path / name}'" in caught.value.message
    assert "unsafe" not in str(caught.value)


def test_a_file_that_holds_itself_or_endless_prefixes_comes_to_an_end(tmp_path, weights):
    circle = _prefixed("other.", weights)
    circle["state_dict"] = circle
    for content in (circle, {".".join(["a"] * 5000): torch.ones(1)}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="does not fit|holds no tensors"):
            load_checkpoint(torch.nn.Conv1d(1, 1, 1), tmp_path / "w.pt")


def test_missing(tmp_path, model):
    with pytest.raises(MissingFileError, match="checkpoint '.*none.pt' does not exist"):
        load_checkpoint(model, tmp_path / "none.pt")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_damage_is_an_error_of_ours_or_harmless(tmp_path, weights, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_checkpoint(Net(), path)
        except CheckpointError:
            refused += 1
    assert refused > 30
