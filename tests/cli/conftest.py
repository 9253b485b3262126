"""A place with a tiny model and a picture in it, and the program to call there."""

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchferry.cli.main import main

MODEL = '''
"""One convolution with fixed weights."""
import torch


class Net(torch.nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class Scaled(Net):
    def forward(self, x, factor):
        return self.conv(x) * factor


net = Net
scaled = Scaled
'''
DYNAMIC = ("--dynamic", "x:0=n,2=h,3=w")


@dataclass(frozen=True)
class Ran:
    """How one call of the program ended."""

    status: int
    out: str
    err: str

    @property
    def values(self):
        return json.loads(self.out)

    @property
    def refusal(self):
        """The one error that the user sees; nothing else is printed, and no traceback."""
        assert self.status in (1, 2), (self.status, self.out, self.err)
        assert self.err.startswith("error: "), self.err
        assert self.err.count("error: ") == 1, self.err
        assert "Traceback" not in self.err
        assert not self.out
        return self.err


def _write(folder):
    (folder / "net.py").write_text(MODEL)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")


@pytest.fixture
def scratch(tmp_path_factory, monkeypatch):
    """Where temporary folders go."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def place(tmp_path, scratch, monkeypatch):
    """The current folder, with ``net.py`` and ``picture.png``; what is imported from it is forgotten afterwards."""
    _write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def ferry(place, capsys):
    """Call the program in ``place``."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exc:  # argparse: a wrong flag, --help, --version
            status = exc.code
        return Ran(status, *capsys.readouterr())

    return call


@pytest.fixture
def deploy(ferry):
    """Deploy the tiny model into ``out``, with more flags."""

    def call(*flags, model="net.py:net", inputs=("picture.png",), out="out"):
        given = [flag for item in inputs for flag in ("--input", item)]
        return ferry("deploy", "--model", model, *given, "-o", out, *flags)

    return call


@pytest.fixture
def tree():
    """A function that gives every path below a folder with a digest of its bytes."""

    def digest(folder):
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(Path(folder).rglob("*"))
        }

    return digest


@pytest.fixture
def left_in():
    """A function that lists what we left in a folder for temporary files."""
    # The first export of a process may make torch's cache there.
    return lambda folder: [p.name for p in folder.iterdir() if not p.name.startswith("torchinductor_")]


def _quietly(*arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The tiny model, deployed once for all tests with a dynamic picture input; not to be changed."""
    folder = tmp_path_factory.mktemp("package")
    _write(folder)
    _quietly(
        "deploy", "--model", folder / "net.py:net", "--input", folder / "picture.png", *DYNAMIC,
        "--output-names", "y", "-o", folder / "out",
    )  # fmt: skip
    return folder / "out"


@pytest.fixture(scope="session")
def scaled_package(tmp_path_factory):
    """The model of two inputs, a picture and numbers."""
    folder = tmp_path_factory.mktemp("scaled")
    _write(folder)
    _quietly(
        "deploy", "--model", folder / "net.py:scaled", "--input", folder / "picture.png", "--input", "factor=2",
        *DYNAMIC, "--output-names", "y", "-o", folder / "out",
    )  # fmt: skip
    return folder / "out"
