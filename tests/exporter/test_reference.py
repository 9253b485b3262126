"""From a reference to a module."""

import sys

import pytest
import torch

from torchferry.core.errors import MissingFileError, ModelError
from torchferry.exporter.reference import load_model

CODE = """
import dataclasses
import torch


@dataclasses.dataclass
class Settings:
    width: int = 2


class Net(torch.nn.Linear):
    def __init__(self, width=Settings().width):
        super().__init__(width, 1)


def factory(width=4, *, bias=True):
    return torch.nn.Linear(width, 1, bias=bias)


instance = torch.nn.Linear(5, 1)


def through_a_library():
    return sorted([torch.ones(2), torch.ones(2)], key=deep)


def deep(value):
    raise LookupError("deep down")
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "nets_of_test.py").write_text(CODE)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("module", ["nets_of_test", "nets_of_test.py", "./nets_of_test.py"])
@pytest.mark.parametrize(
    ("name", "arguments", "width"),
    [
        ("Net", {}, 2),
        ("Net", {"width": 3}, 3),
        ("factory", {}, 4),
        ("factory", {"bias": False}, 4),
        ("instance", {}, 5),
    ],
)
def test_a_class_a_function_or_a_module(module, name, arguments, width):
    model = load_model(f"{module}:{name}", arguments)
    assert isinstance(model, torch.nn.Linear)
    assert model.in_features == width
    assert (model.bias is None) == (arguments.get("bias") is False)


def test_a_library():
    assert isinstance(load_model("torch.nn:Linear", {"in_features": 2, "out_features": 3}), torch.nn.Linear)


def test_an_absolute_path_from_elsewhere_with_its_neighbours(place, tmp_path_factory, monkeypatch):
    (place / "user_of_nets.py").write_text("from nets_of_test import factory\n\ndef net():\n    return factory(7)\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_model(f"{place}/user_of_nets.py:net").in_features == 7


def test_a_file_is_read_anew_each_time(place):
    (place / "nets_of_test.py").write_text("import torch\ninstance = torch.nn.Linear(1, 1)\n")
    assert load_model("nets_of_test.py:instance").in_features == 1
    (place / "nets_of_test.py").write_text("import torch\ninstance = torch.nn.Linear(22, 1)\n")
    assert load_model("nets_of_test.py:instance").in_features == 22


def test_a_file_that_fails_to_import_leaves_no_module_behind(place):
    (place / "half.py").write_text("x = 1\nraise OSError('no data')\n")
    with pytest.raises(ModelError, match="importing 'half.py' raised OSError: no data"):
        load_model("half.py:net")
    assert not [name for name in sys.modules if "half" in name and name.startswith("torchferry_model")]


def test_the_traceback_holds_the_users_frames_in_order(place):
    with pytest.raises(ModelError) as caught:
        load_model("nets_of_test.py:through_a_library")
    lines = caught.value.message.splitlines()
    assert lines[0] == "the factory 'nets_of_test.py:through_a_library' raised LookupError: deep down"
    frames = [line.strip() for line in lines if line.startswith("  File ")]
    assert [frame.rpartition("in ")[2] for frame in frames] == ["through_a_library", "deep"]
    assert all(frame.startswith(f'File "{place}/nets_of_test.py"') for frame in frames)
    assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.parametrize("reference", ["", "nets_of_test", "nets_of_test.py", ":Net", "nets_of_test:", "a.b.c"])
def test_what_is_no_reference(reference):
    with pytest.raises(ModelError, match="must be 'module:factory' or 'file.py:factory'"):
        load_model(reference)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("nets_of_test:Nett", ModelError, "'nets_of_test' has no 'Nett'\n  hint: did you mean 'Net'"),
        ("nets_of_test:Settings", ModelError, "returned a Settings, expected a torch.nn.Module"),
        ("nets_of_test:dataclasses", ModelError, "is of type module, not a function"),
        ("no_nets:Net", ModelError, "there is no module 'no_nets'"),
        ("nets_of_test.inner:Net", ModelError, "there is no module 'nets_of_test.inner'"),
        ("no_nets.py:Net", MissingFileError, "model file 'no_nets.py' does not exist"),
    ],
)
def test_refused(reference, error, message):
    with pytest.raises(error, match=message):
        load_model(reference)


def test_ctrl_c_stays_ctrl_c(place):
    (place / "stops.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_model("stops.py:net")
