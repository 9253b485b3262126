"""Model references and factories that cannot be used: one clear error, with the user's own frames only."""

import logging

import pytest

import torchferry

BAD = """
import sys
import torch

number = 3


def fails():
    return inner()


def inner():
    raise ValueError("no such architecture")


def fails_in_torch():
    return torch.nn.Conv2d(3, 5, 3, groups=2)


def returns_none():
    return None


def ends():
    sys.exit(3)


def needs_more(depth):
    return torch.nn.Conv2d(3, 3, depth)


class Refusing(torch.nn.Module):
    def forward(self, x):
        return self.check(x)

    def check(self, x):
        raise ValueError("wants another picture")


class Unfit(torch.nn.Module):
    def forward(self, x):
        return x @ torch.ones(5, 5)


class Nameless(torch.nn.Module):
    def forward(self, *images):
        return images[0]
"""


@pytest.fixture(autouse=True)
def modules(place):
    (place / "bad.py").write_text(BAD)
    (place / "broken_import.py").write_text("import no_such_library\n\ndef net(): ...\n")
    (place / "broken_syntax.py").write_text("def net(:\n")
    (place / "broken_exit.py").write_text("raise SystemExit(4)\n")


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        ("bad.py:fails", ["the factory 'bad.py:fails' raised ValueError: no such architecture", "in inner"]),
        ("bad:fails", ["the factory 'bad:fails' raised ValueError: no such architecture", "in inner"]),
        ("bad.py:fails_in_torch", ["in_channels must be divisible by groups", "groups=2"]),
        ("bad.py:ends", ["raised SystemExit: 3", "sys.exit(3)"]),
        ("bad.py:needs_more", ["raised TypeError", "'depth'"]),
        ("bad.py:returns_none", ["returned a NoneType, expected a torch.nn.Module"]),
        ("bad.py:number", ["'bad.py:number' is of type int, not a function or class"]),
        ("bad.py:fail", ["'bad.py' has no 'fail'", "did you mean 'fails'"]),
        ("bad.py", ["model reference 'bad.py' must be 'module:factory' or 'file.py:factory'"]),
        (":net", ["model reference ':net' must be"]),
        ("bad.py:", ["model reference 'bad.py:' must be"]),
        ("missing.py:net", ["model file 'missing.py' does not exist"]),
        ("no_such_module:net", ["there is no module 'no_such_module'"]),
        ("json.no_such_module:net", ["there is no module 'json.no_such_module'"]),
        ("broken_import.py:net", ["importing 'broken_import.py' raised ModuleNotFoundError", "import no_such_library"]),
        ("broken_import:net", ["importing 'broken_import' raised ModuleNotFoundError", "import no_such_library"]),
        ("broken_syntax.py:net", ["importing 'broken_syntax.py' raised SyntaxError", "line 1"]),
        ("broken_exit.py:net", ["importing 'broken_exit.py' raised SystemExit: 4"]),
        ("bad.py:Refusing", ["the model fails on its own example in PyTorch", "wants another picture", "in check:"]),
        ("bad.py:Nameless", ["forward(*images) takes no input by name"]),
    ],
)
def test_refused_with_the_users_own_frames(deploy, place, model, fragments):
    before = sorted(place.iterdir())
    refusal = deploy(model=model).refusal
    for fragment in fragments:
        assert fragment in refusal
    frames = [line for line in refusal.splitlines() if line.lstrip().startswith('File "')]
    assert all(f'File "{place}' in frame for frame in frames), "a frame that is not the user's"
    assert torchferry.__path__[0] not in refusal
    assert not (place / "out").exists()
    assert sorted(place.iterdir()) == before


def test_error_as_json(deploy):
    ran = deploy("--json", model="bad.py:fails")
    assert (ran.status, ran.err) == (1, "")
    error = ran.values["error"]
    assert error["code"] == "ModelError"
    assert "no such architecture" in error["message"]
    assert error["hint"]


def test_what_a_factory_prints_leaves_the_json_whole(deploy, place):
    (place / "talks.py").write_text("from net import Net\n\ndef net():\n    print('loading')\n    return Net()\n")
    ran = deploy("--json", model="talks.py:net")
    assert ran.status == 0
    assert ran.values["package"] == "out"
    assert ran.err == "loading\n"


def test_torch_logs_nothing_beside_our_error(deploy, caplog):
    ran = deploy(model="bad.py:Unfit")
    assert "the model fails on its own example in PyTorch" in ran.err
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == []
