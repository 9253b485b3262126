"""Ctrl-C and a polite kill, at any moment: the output folder is whole or absent, and nothing is left beside it."""

import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from torchferry.cli.terminal import Terminal
from torchferry.package import load

STEPS = (
    "import torch",
    "load model and data",
    "export",
    "compile for onnxruntime-fp32",
    "verify onnxruntime-fp32",
    "pack",
)
MESSAGE = "error: interrupted; nothing is half written\n"


def _interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


@pytest.fixture
def old_package(package, place):
    shutil.copytree(package, place / "out")
    return place / "out"


def test_the_steps_below_are_all_there_are(deploy):
    assert tuple(step["name"] for step in deploy("--json").values["steps"]) == STEPS


@pytest.mark.parametrize("moment", ["started", "finished"])
@pytest.mark.parametrize("step", STEPS)
def test_ctrl_c_in_a_step(deploy, place, scratch, left_in, tree, old_package, monkeypatch, step, moment):
    before = tree(old_package)
    beside = {path.name for path in place.iterdir()}
    told = getattr(Terminal, moment)

    def watch(self, seen):
        told(self, seen)
        if getattr(seen, "name", seen) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, moment, watch)
    ran = deploy("--overwrite")
    assert (ran.status, ran.err) == (1, MESSAGE)
    if (step, moment) == ("pack", "finished"):
        load(old_package)
        assert tree(old_package) != before
    else:
        assert tree(old_package) == before
    assert {path.name for path in place.iterdir()} == beside
    assert left_in(scratch) == []


@pytest.mark.parametrize(
    "function",
    [
        "torch.export.export",
        "torch.onnx.export",
        "onnxruntime.InferenceSession",
        "torchferry.core.engine.Session.run",
        "torchferry.core.report.Report.to_html",
        "torchferry.package.store.sha256",
        "shutil.copyfile",
    ],
)
def test_ctrl_c_in_the_midst_of_a_step(deploy, place, scratch, left_in, monkeypatch, function):
    monkeypatch.setattr(function, _interrupt)
    ran = deploy(out="new/out")
    assert (ran.status, ran.err) == (1, MESSAGE)
    assert not (place / "new").exists()
    assert left_in(scratch) == []


class _Interrupter:
    """Raises before or after the n-th change of the file system."""

    CHANGES = ((os, "mkdir"), (os, "rename"), (os, "replace"), (shutil, "copyfile"), (pathlib.Path, "open"))

    def __init__(self, monkeypatch, at, after):
        self.count = 0
        for owner, name in self.CHANGES:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name), at, after))

    def _counted(self, function, at, after):
        def counted(*args, **kwargs):
            self.count += 1
            if self.count != at:
                return function(*args, **kwargs)
            if after:
                with contextlib.suppress(OSError):
                    getattr(function(*args, **kwargs), "close", bool)()
            raise KeyboardInterrupt

        return counted


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "overwrite"])
def test_ctrl_c_at_every_change_of_the_file_system(ferry, place, package, tree, replacing, after):
    making = ["compile", package / "exported" / "model.onnx", "-o", "a/b/out", "--overwrite"]
    assert ferry(*making).status == 0
    old = tree(place / "a")
    for at in itertools.count(1):
        if not replacing:
            shutil.rmtree(place / "a", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            interrupter = _Interrupter(patch, at, after)
            ran = ferry(*making)
        if interrupter.count < at:
            break
        assert (ran.status, ran.err) == (1, MESSAGE), at
        left = tree(place / "a")
        if left != (old if replacing else {}):
            load(place / "a/b/out")
            assert left.keys() == old.keys(), at
            old = left
    assert at > 20, "the file system was hardly touched"
    assert ran.status == 0


SLEEPER = """
import pathlib, time, torch

class Sleeper(torch.nn.Module):
    def forward(self, x):
        if torch.compiler.is_exporting() is {while_exporting}:
            pathlib.Path("asleep").touch()
            time.sleep(60)
        return x * 2
"""


@pytest.mark.parametrize(
    ("number", "while_exporting"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["SIGINT", "SIGTERM"]
)
def test_a_real_signal(place, scratch, left_in, number, while_exporting):
    (place / "sleeper.py").write_text(SLEEPER.format(while_exporting=while_exporting))
    command = ["deploy", "--model", "sleeper.py:Sleeper", "--input", "picture.png", "-o", "new/out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchferry", *command],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (place / "asleep").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (1, "", MESSAGE)
    assert not (place / "new").exists()
    assert left_in(scratch) == []
