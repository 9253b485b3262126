"""Exports an operator written in C++: built, given a symbolic, exported, run by ONNX Runtime at other sizes.

A template: copy the folder, and change what is marked CHANGE.

Usage:
    python export.py
    python export.py --build-folder FOLDER
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchferry as ferry

HERE = Path(__file__).parent
EXTENSION = "my_add_cpp"  # CHANGE: as in setup.py


class MyAdd(torch.autograd.Function):
    """The C++ operator in PyTorch, and what it becomes in ONNX."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # noqa: ARG004 - torch hands it over
        """Compute 2a + b."""
        # CHANGE: call your operator.
        result: Tensor = importlib.import_module(EXTENSION).my_add(a, b)
        return result

    @staticmethod
    def symbolic(g: Any, a: Any, b: Any) -> Any:
        """Build 2a + b of ONNX operators."""
        # CHANGE: say the same in ONNX, with the arguments of forward after ctx. For an operator that only your own
        # engine has, write g.op("your_domain::your_operator", a, b).
        twice = g.op("Mul", a, g.op("Constant", value_t=torch.tensor([2])))  # int64; promoted to the type of a
        return g.op("Add", twice, b)


class Model(nn.Module):
    """CHANGE: the model that uses the operator."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Take two tensors of one shape, or of shapes that broadcast."""
        result: Tensor = MyAdd.apply(a, b)  # type: ignore[no-untyped-call]
        return result


def missing_tools() -> list[str]:
    """Return what building needs and this machine lacks, in words."""
    missing = []
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        missing.append(f"the C++ compiler '{compiler}' (on Debian: apt-get install g++; or set CXX to another)")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        missing.append(f"Python's header '{header}' (on Debian: apt-get install python3-dev)")
    if importlib.util.find_spec("setuptools") is None:
        missing.append("setuptools (pip install setuptools)")
    return missing


def build(folder: Path) -> Path:
    """Compile the extension, make it importable, and return its file.

    Args:
        folder: Where everything goes that is built.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}/objects"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode != 0:
        raise SystemExit(f"building {EXTENSION} failed:\n{done.stdout}{done.stderr}")
    sys.path.insert(0, str(folder))
    return Path(str(importlib.import_module(EXTENSION).__file__))


def main() -> None:
    """Build, export, run and compare; a line for each."""
    parser = argparse.ArgumentParser(description="Export an operator written in C++.")
    parser.add_argument("--build-folder", type=Path, default=HERE / "build")
    folder = parser.parse_args().build_folder.resolve()
    missing = missing_tools()
    if missing:
        raise SystemExit(f"{EXTENSION} cannot be built here; missing:\n  " + "\n  ".join(missing))
    print(f"built {build(folder).name.split('.')[0]}")

    model = Model().eval()
    example = (torch.rand(2, 3), torch.rand(2, 3))
    dynamic_shapes = {"a": {0: "rows", 1: "columns"}, "b": {0: "rows", 1: "columns"}}  # CHANGE: your axes
    exported = ferry.export(model, example, dynamic_shapes=dynamic_shapes, output_names=["sum"])
    exported.report.raise_for_failure()
    print(f"exported at {list(example[0].shape)}: {' '.join(node.op_type for node in exported.model.graph)}")

    with tempfile.TemporaryDirectory() as scratch:
        engine = ferry.compile(exported, ferry.Target("onnxruntime"), Path(scratch, "engine"))
        with engine.open() as session:
            for size in ((5, 4), (1, 7), (64, 64)):  # never exported
                a, b = torch.randn(size), torch.randn(size)
                got = session.run({"a": a.numpy(), "b": b.numpy()})["sum"]
                torch.testing.assert_close(torch.from_numpy(got), model(a, b))
                print(f"run at {list(size)}: agrees with PyTorch")


if __name__ == "__main__":
    main()
