"""The program itself: its help, its version, and what it costs to start."""

import json
import subprocess
import sys

import pytest

import torchferry

COMMANDS = ("deploy", "export", "compile", "verify", "run", "partition", "fp16", "bench", "inspect", "op", "env")
HEAVY = {
    "PIL", "jinja2", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_extensions", "onnxscript", "openvino",
    "pydantic", "rich", "safetensors", "scipy", "skimage", "torch",
}  # fmt: skip


def _loaded_by(code):
    """Tell which of the heavy packages a fresh Python has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return HEAVY & {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_loads_nothing_heavy():
    assert _loaded_by("import torchferry") == set()
    assert _loaded_by("import torchferry; dir(torchferry); torchferry.__version__") == set()
    assert _loaded_by("import torchferry; torchferry.TorchferryError, torchferry.Target") <= {"numpy"}


def test_loading_a_package_loads_neither_torch_nor_onnx():
    absent = {"torch", "onnx", "onnx_ir", "onnxscript", "scipy", "safetensors", "jinja2"}
    assert not absent & _loaded_by("import torchferry; torchferry.load, torchferry.Package, torchferry.Session")


def test_help_and_a_wrong_flag_need_no_torch():
    code = "from torchferry.cli.main import main\ntry: main(['deploy', '{}'])\nexcept SystemExit: pass"
    for flag in ("--help", "--nonsense"):
        assert not {"torch", "onnx", "onnxruntime", "onnxruntime_extensions", "openvino"} & _loaded_by(
            code.format(flag)
        )


def test_version(ferry):
    ran = ferry("--version")
    assert (ran.status, ran.out, ran.err) == (0, f"torchferry {torchferry.__version__}\n", "")


def test_help(ferry):
    ran = ferry("--help")
    assert ran.status == 0
    listed = [line.split()[0] for line in ran.out.splitlines() if line.startswith("    ") and line[4] != " "]
    assert tuple(listed) == COMMANDS


@pytest.mark.parametrize(
    "command",
    [*(c for c in COMMANDS if c != "fp16"), *(f"fp16 {verb}" for verb in ("check", "fix", "certify", "bisect"))],
)
def test_help_of_a_command(ferry, command):
    ran = ferry(*command.split(), "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"usage: torchferry {command} ")
    assert "--json" in ran.out


def test_python_dash_m_is_the_same_program(ferry):
    done = subprocess.run([sys.executable, "-m", "torchferry", "run"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", ferry("run").err)
