"""Importing OpenMMLab's libraries: silent, and nothing of what is put in place stays."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from torchferry.codebases.openmmlab import libraries
from torchferry.codebases.openmmlab.operators import OperatorsInPython, nms
from torchferry.core.errors import ModelError

SCRIPT = """
import sys, warnings
warnings.simplefilter("error")
import numpy
from torchferry.codebases.openmmlab import libraries
for name in {names}:
    (libraries.leaf if "." in name else libraries.library)(name)
print(hasattr(numpy, "sctypes"), "mmcv._ext" in sys.modules, sys.modules["mmdet"].__version__)
print(sorted(name for name in sys.modules if name.startswith("mmagic.models")), len(warnings.filters))
"""


def run(names: list[str]) -> list[str]:
    script = SCRIPT.format(names=names)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(
    not libraries.installed("mmocr"), reason="OpenMMLab is not installed; scripts/openmmlab installs it"
)
def test_libraries_are_imported_in_silence_and_leave_nothing() -> None:
    leaf = "mmagic.models.editors.srcnn.srcnn_net"
    state, modules = run(["mmdet", "mmocr", "mmseg", "mmpretrain", leaf])
    assert state == "False False 3.3.0"
    assert modules.startswith(str([leaf]))


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("mm") else find(name))
    with pytest.raises(ModelError, match="'mmdet' is not installed\n  hint: run scripts/openmmlab"):
        libraries.library("mmdet")
    with pytest.raises(ModelError, match="did you mean 'mmdet'"):
        libraries.library("mmdett")


def test_an_operator_that_is_not_there_is_named_when_it_is_called() -> None:
    operators = OperatorsInPython()
    convolution = operators.deform_conv_forward
    with pytest.raises(ModelError, match="compiled operator 'deform_conv_forward'"):
        convolution(torch.zeros(1))


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_its_definition_keeps(offset: int) -> None:
    generator = torch.Generator().manual_seed(offset)
    corners = torch.randint(0, 40, (60, 2), generator=generator).float()
    boxes = torch.cat([corners, corners + torch.randint(1, 30, (60, 2), generator=generator)], dim=1)
    scores = torch.rand(60, generator=generator)

    def overlap(a: list[float], b: list[float]) -> float:
        width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
        height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
        areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
        return width * height / (sum(areas) - width * height)

    expected: list[int] = []
    for row in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[row].tolist(), boxes[kept].tolist()) <= 0.5 for kept in expected):
            expected.append(row)
    assert nms(boxes, scores, 0.5, offset).tolist() == expected
    assert 0 < len(expected) < 60
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
