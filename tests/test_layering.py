"""The house's rules: who may import whom, and where an engine's name may stand."""

import ast
from pathlib import Path

import pytest

import torchferry
from torchferry import backends

ROOT = Path(torchferry.__file__).parent

LAYERS = {
    "core": 0,
    "rewrite": 1,
    "graph": 1,
    "exporter": 2,
    "backends": 2,
    "partitioning": 2,
    "package": 2,
    "precision": 3,
    "verification": 3,
    "codebases": 3,
    "pipeline": 4,
    "testing": 5,
    "fp16": 5,
    "cli": 5,
}
TORCH = {"rewrite", "exporter", "precision", "verification", "codebases", "pipeline", "testing"}
# What one package may have besides the standard library and Torchferry itself, wherever that matters.
HEAVY = {
    "torch": TORCH,
    "onnx": {"graph", "backends", "exporter", "partitioning", "pipeline", "testing"},
    "onnx_ir": {"graph", "backends", "exporter", "partitioning", "precision", "verification", "pipeline", "testing"},
    "onnxscript": {"exporter", "rewrite"},
    "safetensors": {"exporter"},
    "onnxruntime": {"backends"},
    "openvino": {"backends"},
    "ncnn": {"backends"},
    "tensorrt": {"backends"},
    "tensorrt_rtx": {"backends"},
    "nncf": {"precision"},
    "mmengine": {"codebases"},
    "mmcv": {"codebases"},
    "mmdet": {"codebases"},
    "cv2": {"codebases"},
}
# The one place that says which engine is meant when nobody says anything.
DEFAULT_BACKEND_FILE = ROOT / "core" / "target.py"


def _files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or not path.stem.startswith("__")]


def _package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "torchferry"
                else [node.module]
            )
            found += [(node.lineno, module or "") for module in modules]
    return found


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    package = _package(path)
    for line, module in _imports(path):
        parts = module.split(".")
        if parts[0] == "torchferry" and len(parts) > 1 and parts[1] in LAYERS:
            other = parts[1]
            assert other == package or LAYERS[other] < LAYERS[package], f"{path}:{line}: {package} imports {other}"
        allowed = HEAVY.get(parts[0])
        assert allowed is None or package in allowed, f"{path}:{line}: {package} may not import {parts[0]}"


def test_every_package_has_a_layer() -> None:
    assert {_package(path) for path in _files()} <= LAYERS.keys()


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_engine_is_named_outside_its_folder(path: Path) -> None:
    if path in (DEFAULT_BACKEND_FILE, ROOT / "backends" / "__init__.py") or "rules" in path.parts:
        return
    folder = path.parent.name if path.parent.parent == ROOT / "backends" else None
    # Flavours of one engine share a folder, whose name theirs begin with.
    own = {name for name in backends.names() if name.partition("-")[0] == folder}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in backends.names():
            assert node.value in own, f"{path}:{node.lineno}: names the engine '{node.value}'"
    for line, module in _imports(path):
        library = module.split(".")[0].replace("_", "-")
        assert library not in backends.names() or library in own, f"{path}:{line}: imports {library}"


def test_the_rules_notice_a_breach(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from torchferry.cli import main\n    import torch.nn\n")
    assert [module for _, module in _imports(bad)] == ["torchferry.cli", "torch.nn"]
