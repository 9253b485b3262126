"""``torchferry run``: a package on pictures and arrays."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def expected(place):
    """What the tiny model gives for the picture, times a factor."""
    import torch

    namespace = {}
    exec((place / "net.py").read_text(), namespace)
    with Image.open(place / "picture.png") as picture:
        pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    np.savez(place / "x.npz", x=pixels)
    with torch.no_grad():
        return namespace["Net"]()(torch.from_numpy(pixels)).numpy()


def _pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).transpose(2, 0, 1)


def _as_bytes(values):
    return np.rint(np.clip(values[0] * 255, 0, 255))


@pytest.mark.parametrize("item", ["picture.png", "x=picture.png", "x.npz", "x=x.npz"])
def test_to_arrays(ferry, package, place, expected, item):
    ran = ferry("run", package, "--input", item, "--output", "y.npz")
    assert (ran.status, ran.out, ran.err) == (0, "y.npz\n", "")
    with np.load(place / "y.npz") as outputs:
        assert list(outputs) == ["y"]
        np.testing.assert_allclose(outputs["y"], expected, atol=1e-5)


@pytest.mark.parametrize("item", ["picture.png", "x=picture.png"])
def test_to_a_picture(ferry, package, place, expected, item):
    values = ferry("run", package, "--input", item, "--output", "y.png", "--json").values
    assert values["output"] == "y.png"
    assert [step["name"] for step in values["steps"]] == ["load", "run"]
    np.testing.assert_allclose(_pixels(place / "y.png"), _as_bytes(expected), atol=1)


def test_a_picture_with_an_equals_sign_in_its_name(ferry, package, place, expected):
    (place / "picture.png").rename(place / "a=b.png")
    assert ferry("run", package, "--input", "a=b.png", "--output", "y.png").status == 0
    np.testing.assert_allclose(_pixels(place / "y.png"), _as_bytes(expected), atol=1)


@pytest.mark.parametrize(
    "inputs",
    [
        ("picture.png", "factor=0.5"),
        ("factor=0.5", "picture.png"),
        ("factor=0.5", "x=picture.png"),
        ("x=picture.png", "factor=half.npy"),
        ("half.npz", "picture.png"),
    ],
)
@pytest.mark.parametrize("output", ["y.png", "y.npz"])
def test_a_picture_and_numbers(ferry, scaled_package, place, expected, inputs, output):
    np.save(place / "half.npy", np.float32([0.5]))
    np.savez(place / "half.npz", factor=np.float32([0.5]))
    given = [flag for item in inputs for flag in ("--input", item)]
    ran = ferry("run", scaled_package, *given, "--output", output)
    assert ran.status == 0, ran.err
    if output == "y.png":
        np.testing.assert_allclose(_pixels(place / "y.png"), _as_bytes(expected / 2), atol=1)
    else:
        with np.load(place / "y.npz") as outputs:
            np.testing.assert_allclose(outputs["y"], expected / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "output", "fragment"),
    [
        (["picture.png", "picture.png"], "y.png", "expected one picture to run on, got several"),
        (["factor=1"], "y.png", "expected one picture to run on, got none"),
        (["half.npz"], "y.png", "expected one picture to run on, got none"),
        (["picture.png", "picture.png"], "y.npz", "several pictures for one input"),
        (["picture.png"], "y.png", "input 'factor' is missing"),
        (["picture.png"], "y.npz", "input 'factor' is missing"),
        (["picture.png", "factor=1", "gain=1"], "y.png", "unknown input 'gain'"),
        (["picture.png", "factor=1"], "y.txt", "unknown suffix '.txt'"),
        (["picture.png", "factor=1"], "y", "unknown suffix ''"),
    ],
)
def test_refused(ferry, scaled_package, place, inputs, output, fragment):
    given = [flag for item in inputs for flag in ("--input", item)]
    assert fragment in ferry("run", scaled_package, *given, "--output", output).refusal
    assert not (place / output).exists()


def test_unknown_engine(ferry, package):
    refusal = ferry("run", package, "--input", "picture.png", "--output", "y.png", "--backend", "onnxrutime").refusal
    assert "has no engine 'onnxrutime'" in refusal
    assert "did you mean 'onnxruntime'" in refusal


def test_sizes_outside_the_ranges(ferry, package, place):
    np.savez(place / "flat.npz", x=np.ones((1, 3, 0, 4), np.float32))
    refusal = ferry("run", package, "--input", "flat.npz", "--output", "y.npz").refusal
    assert "'h' = 0 is outside what this model was exported for (h: 1..)" in refusal


BLOCKED = """
import sys

ABSENT = {"torch", "onnx", "onnx_ir", "onnxscript", "scipy", "jinja2", "safetensors"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


sys.meta_path.insert(0, Blocker())
from torchferry.cli.main import main

status = main(sys.argv[1:])
assert not ABSENT & {name.partition(".")[0] for name in sys.modules}
sys.exit(status)
"""


@pytest.mark.parametrize("output", ["y.png", "y.npz"])
def test_without_torch_and_onnx(package, place, expected, output):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, "run", package, "--input", "picture.png", "--output", output],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{output}\n", "")
    if output == "y.png":
        np.testing.assert_allclose(_pixels(place / output), _as_bytes(expected), atol=1)
    else:
        with np.load(place / output) as outputs:
            np.testing.assert_allclose(outputs["y"], expected, atol=1e-5)
