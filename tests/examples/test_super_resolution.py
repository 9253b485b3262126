"""The example does what its README says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchferry.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "super_resolution"


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "srcnn_x3"
    assert main(["deploy", str(EXAMPLE / "deploy.toml"), "--out", str(folder)]) == 0
    return folder


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
    return picture


def test_it_beats_bicubic_by_a_third_of_a_decibel_on_pictures_kept_out_of_the_training():
    """``evaluate.py`` exits with 1 below 0.3 dB."""
    done = subprocess.run([sys.executable, str(EXAMPLE / "evaluate.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.strip().splitlines()
    assert len(rows) >= 6
    assert float(rows[-1].split()[-1]) >= 0.3
    for row in rows[1:]:
        assert " ".join(row.split()) in " ".join((EXAMPLE / "README.md").read_text().split())


def test_the_package_enlarges_a_picture_as_pytorch_does(package, tmp_path, monkeypatch):
    assert (
        main(["run", str(package), "--input", str(EXAMPLE / "picture.png"), "--output", str(tmp_path / "big.png")]) == 0
    )
    small, big = opened(EXAMPLE / "picture.png"), opened(tmp_path / "big.png")
    assert big.size == (3 * small.width, 3 * small.height)

    monkeypatch.syspath_prepend(str(EXAMPLE))
    import torch
    from safetensors.torch import load_file

    from srcnn import srcnn_x3

    model = srcnn_x3().eval()
    model.load_state_dict(load_file(EXAMPLE / "srcnn_x3.safetensors"))
    pixels = torch.from_numpy(np.asarray(small, np.float32).transpose(2, 0, 1)[None] / 255)
    with torch.no_grad():
        want = model(pixels)[0].clamp(0, 1).mul(255).round().numpy().transpose(1, 2, 0)
    difference = np.abs(np.asarray(big, np.float32) - want)
    assert difference.max() <= 1  # one step of eight bits, where the two round differently
    assert (difference > 0).mean() < 0.01


def test_any_other_size_works_too(package, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 31, 3), dtype=np.uint8))
    picture.save(tmp_path / "noise.png")
    assert main(["run", str(package), "--input", str(tmp_path / "noise.png"), "--output", str(tmp_path / "o.png")]) == 0
    assert opened(tmp_path / "o.png").size == (93, 51)
