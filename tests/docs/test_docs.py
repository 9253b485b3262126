"""Every fenced block of the documentation is run, validated, or compared with what was printed.

- ``python``: run, all blocks of a page in one namespace.
- ``bash``: run with ``torchferry`` on the path, in a folder that holds a copy of ``examples/``. Lines that set things
  up (``scripts/…``, ``pip install``) are checked for what they name, and not run.
- ``toml``: a deploy config, whole or a part of one.
- ``text``: the output of the block above it, with ``...`` for whatever differs from run to run.
- ``text diagram``: a drawing.

A ``python`` or ``toml`` block whose first line is ``# name.py`` or ``# name.toml`` is a file, saved under this name.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from markdown_blocks import Block, blocks

from torchferry.core.errors import ConfigError
from torchferry.pipeline.config import merge, read_toml, validate

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("page_driver.py")
# What most pages are about. The command is run once; pages that show it get its package and its output, and pages that
# only use the package find it there.
EXAMPLE_PACKAGE = "out/srcnn_x3"
DEPLOY_EXAMPLE = "torchferry deploy examples/super_resolution/deploy.toml"
# Pages about the package first, so that one process runs most of them and makes it once.
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "examples").glob("*/README.md")),
    ],
    key=lambda page: EXAMPLE_PACKAGE not in page.read_text(encoding="utf-8"),
)
# Too long to run; the script must at least know its flags.
LONG = ("python examples/super_resolution/train.py",)
NEEDS_COMPILER = "python examples/custom_operator_cpp/export.py"
NEEDS_OPENMMLAB = "mmdet::"
MINIMAL_CONFIG = {"model": {"factory": "net.py:build"}, "inputs": ["x=1,2"], "out": "out/net"}


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the super-resolution example was deployed, with what was printed in ``printed.txt``."""
    folder = tmp_path_factory.mktemp("deployed")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__", "build"))
    with (folder / "printed.txt").open("w") as printed:
        subprocess.run(
            DEPLOY_EXAMPLE.split(), cwd=folder, env=_environment(), check=True, stdout=printed, stderr=subprocess.STDOUT
        )
    return folder


def _environment() -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": binaries + os.pathsep + os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONWARNINGS": "error",
        "COLUMNS": "120",
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    steps = [block for block in blocks(page) if _is_run(block)]
    if any(NEEDS_COMPILER in _commands(step) for step in steps) and shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    if any(NEEDS_OPENMMLAB in _commands(step) for step in steps) and importlib.util.find_spec("mmdet") is None:
        pytest.skip("OpenMMLab is not installed; scripts/openmmlab installs it")
    if any(EXAMPLE_PACKAGE in _commands(step) or DEPLOY_EXAMPLE in step.text.splitlines() for step in steps):
        deployed = request.getfixturevalue("deployed")
        shutil.copytree(deployed / EXAMPLE_PACKAGE, tmp_path / EXAMPLE_PACKAGE)
        shutil.copy(deployed / "printed.txt", tmp_path)
    if steps:
        shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "build"))
    _check_page(page, tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```json\n{}\n```", "nothing checks a block of 'json'"),
        ("```bash\nfalse\n```", "the block fails"),
        ("```python\n1 / 0\n```", "page.md.*line 2.*ZeroDivisionError"),
        ("```bash\necho one\n```\n```text\ntwo\n```", "what came is\n\none"),
        ("```text\nout of nowhere\n```", "output of which block"),
        ("```toml\nnam = 1\n```", "did you mean 'name'"),
        ("```bash\nscripts/absent\n```", "scripts/absent is not there"),
        ("```bash\npip install '.[absent]'\n```", "absent"),
        ("```bash\necho one", "never closed"),
    ],
)
def test_a_wrong_block_is_noticed(text: str, complaint: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((AssertionError, pytest.fail.Exception, ConfigError)) as caught:
        _check_page(page, tmp_path)
    assert re.search(complaint, str(caught.value), re.DOTALL)


def _check_page(page: Path, folder: Path) -> None:
    """Check every block of a page, in a folder that holds what its commands need."""
    found = blocks(page)
    _check_languages(page, found)
    for block in found:
        if block.file_name:
            (folder / block.file_name).write_text(block.text)
    for block in found:
        if block.language == "toml":
            _check_config(block, folder)
        if block.language == "bash":
            _check_setup(block)
    steps = [block for block in found if _is_run(block)]
    _check_outputs(page, found, _run(page, steps, folder) if steps else {})


def _is_run(block: Block) -> bool:
    return block.language in ("python", "bash") and bool(_commands(block).strip())


def _check_languages(page: Path, found: list[Block]) -> None:
    for block in found:
        known = block.language in ("python", "bash", "toml", "text") and block.words in ((), ("diagram",))
        assert known, f"{page}:{block.line}: nothing checks a block of '{' '.join([block.language, *block.words])}'"


def _commands(block: Block) -> str:
    """Return what is run of a block: not a file's text, not the lines that set things up."""
    if block.language == "python":
        return "" if block.file_name else block.text
    instead = {DEPLOY_EXAMPLE: "cat printed.txt", **{line: f"{line} --help > help.txt" for line in LONG}}
    return "\n".join(instead.get(line, line) for line in block.text.splitlines() if not _is_setup(line))


def _is_setup(line: str) -> bool:
    return bool(re.match(r"([A-Z_]+=\S+ )*(scripts/\w+|pip install )", line))


def _check_setup(block: Block) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in filter(_is_setup, block.text.splitlines()):
        for script in re.findall(r"scripts/\w+", line):
            assert os.access(ROOT / script, os.X_OK), f"{script} is not there or cannot be run"
        for asked in re.findall(r"\[([\w,-]+)\]", line):
            assert set(asked.split(",")) <= extras.keys(), line


def _check_config(block: Block, folder: Path) -> None:
    path = folder / (block.file_name or "fragment.toml")
    path.write_text(block.text)
    validate(merge(MINIMAL_CONFIG, read_toml(path)), f"line {block.line}")


def _run(page: Path, steps: list[Block], folder: Path) -> dict[int, str]:
    """Run the steps in the folder; return what each printed, by its line."""
    plan, result = folder.parent / f"{folder.name}.json", folder.parent / f"{folder.name}.result.json"
    plan.write_text(
        json.dumps([{"language": s.language, "text": _commands(s), "page": str(page), "line": s.line} for s in steps])
    )
    done = subprocess.run(
        [sys.executable, DRIVER, plan, result],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.exists(), done.stderr
    outputs = dict(zip([step.line for step in steps], json.loads(result.read_text()), strict=False))
    if done.returncode:
        line, said = list(outputs.items())[-1]
        pytest.fail(f"{page}:{line}: the block fails:\n{said}{done.stderr}", pytrace=False)
    return outputs


def _check_outputs(page: Path, found: list[Block], outputs: dict[int, str]) -> None:
    for before, block in zip([None, *found], found, strict=False):
        if block.language != "text" or block.words:
            continue
        assert before is not None, f"{page}:{block.line}: output of which block?"
        assert before.line in outputs, f"{page}:{block.line}: output of a block that is not run"
        pattern = re.escape(block.text.strip()).replace(re.escape("..."), "(?s:.*?)")
        said = "\n".join(line.rstrip() for line in outputs[before.line].strip().splitlines())
        if not re.fullmatch(pattern, said):
            pytest.fail(f"{page}:{block.line}: the page says\n\n{block.text}\nwhat came is\n\n{said}", pytrace=False)
