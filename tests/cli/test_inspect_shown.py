"""``torchferry inspect --html`` and ``--netron``."""

import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto, helper

NETRON = """
import sys
started = []
def start(file, address=None, browse=False):
    assert browse
    print("served", file, file=sys.stderr)
    started.append(file)
    return "localhost", 8123
def wait():
    assert started
    print("waited", file=sys.stderr)
"""


@pytest.fixture
def foreign(place):
    """An ONNX file of 2,000 nodes that another tool made."""
    nodes = [helper.make_node("Relu", [f"v{at}"], [f"v{at + 1}"]) for at in range(2000)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("v0", "v2000")]
    model = helper.make_model(helper.make_graph(nodes, "foreign", ends[:1], ends[1:]), ir_version=8)
    onnx.save(model, place / "foreign.onnx")
    return "foreign.onnx"


def test_a_large_foreign_file(ferry, foreign):
    ran = ferry("inspect", foreign)
    assert (ran.status, ran.err) == (0, "")
    assert len(ran.out.splitlines()) < 20
    assert "nodes\n  2,000\n" in ran.out
    assert "  ai.onnx: Relu x2000" in ran.out
    assert ferry("inspect", foreign, "--json").values["nodes"] == 2000


def test_html(ferry, foreign, place):
    ran = ferry("inspect", foreign, "--html", "graph.html")
    assert (ran.status, ran.out, ran.err) == (0, "graph.html\n", "")
    assert "<title>foreign.onnx</title>" in (place / "graph.html").read_text(encoding="utf-8")
    assert ferry("inspect", foreign, "--html", "graph.html", "--json").values == {"html": "graph.html"}


def test_html_that_cannot_be_written(ferry, foreign):
    assert "there is no folder 'absent'" in ferry("inspect", foreign, "--html", "absent/graph.html").refusal


def run(place, *arguments):
    """Run the program as a process of its own, whose modules come from ``place`` first."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from torchferry.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(place / "modules"), *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60, check=False)


def test_netron_serves_the_file_until_it_is_stopped(foreign, place):
    (place / "modules").mkdir()
    (place / "modules" / "netron.py").write_text(NETRON)
    done = run(place, "inspect", foreign, "--netron")
    assert (done.returncode, done.stdout) == (0, "http://localhost:8123  (Ctrl-C ends it)\n")
    assert done.stderr.splitlines() == ["served foreign.onnx", "waited"]
    assert "absent.onnx" in run(place, "inspect", "absent.onnx", "--netron").stderr


def test_netron_that_is_not_installed(foreign, place):
    (place / "modules").mkdir()
    (place / "modules" / "netron.py").write_text("raise ImportError('no netron')")
    done = run(place, "inspect", foreign, "--netron")
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install netron" in done.stderr
    assert "https://netron.app" in done.stderr
    assert "Traceback" not in done.stderr
