"""The template builds, exports and runs; without a compiler it says so."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchferry.testing import assert_op

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_operator_cpp"


@pytest.fixture(scope="module")
def template():
    spec = importlib.util.spec_from_file_location("custom_operator_cpp_export", EXAMPLE / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copied(template, tmp_path_factory) -> Path:
    """The folder as a user copies it: without what was built."""
    missing = template.missing_tools()
    if missing:
        pytest.skip(f"the extension cannot be built; missing: {'; '.join(missing)}")
    folder = tmp_path_factory.mktemp("copy") / "mine"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("build", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def printed(copied) -> str:
    done = subprocess.run([sys.executable, copied / "export.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_prints_what_its_readme_shows(printed):
    assert printed in (EXAMPLE / "README.md").read_text()
    assert printed.splitlines()[1] == "exported at [2, 3]: Mul Add"
    assert printed.count("agrees with PyTorch") == 3


@pytest.mark.slow
def test_the_built_operator_is_2a_plus_b_on_every_engine(printed, copied, template, monkeypatch):
    monkeypatch.syspath_prepend(str(copied / "build"))
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(template.MyAdd.apply(a, b), 2 * a + b, rtol=0, atol=0)
    report = assert_op(
        template.MyAdd.apply, [((2, 3), (2, 3)), ((7, 4), (7, 4))], dtypes=[torch.float32, torch.float64, torch.int64]
    )
    assert any(comparison.case.startswith("reference") for comparison in report.comparisons)


@pytest.mark.slow
def test_what_is_built_lies_where_git_ignores_it(printed, copied):
    assert "build/" in (copied / ".gitignore").read_text().splitlines()
    assert any((copied / "build").glob("my_add_cpp*"))
    assert not any(copied.glob("*.so"))


@pytest.mark.slow
def test_a_mistake_in_the_source_shows_what_the_compiler_says(copied, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(copied, folder, ignore=shutil.ignore_patterns("build"))
    source = (folder / "my_add.cpp").read_text()
    (folder / "my_add.cpp").write_text(source.replace("#include <torch/extension.h>", "#error nothing here\n"))
    done = subprocess.run([sys.executable, folder / "export.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "building my_add_cpp failed" in done.stderr
    assert "nothing here" in done.stderr


def test_without_a_compiler_it_says_what_is_missing(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler"}
    command = [sys.executable, EXAMPLE / "export.py", "--build-folder", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the C++ compiler 'no-such-compiler'" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr
