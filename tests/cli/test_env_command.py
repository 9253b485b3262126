"""``torchferry env``: whole, broken and missing engines, and nothing heavy in its own process."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

import torchferry
from torchferry import backends


def _engines(ran):
    assert (ran.status, ran.err) == (0, "")
    return {engine["name"]: engine for engine in ran.values["engines"]}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Put a library of this name and source before the real one."""

    def put(name, source):
        (tmp_path / "first" / name).mkdir(parents=True)
        (tmp_path / "first" / name / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path / "first"))

    return put


def test_the_page(ferry):
    ran = ferry("env")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"torchferry  {torchferry.__version__}\n")
    titles = [line for line in ran.out.splitlines() if line[0] != " " and " " not in line]
    assert [title for title in titles if title != "variables"] == ["machine", "gpu", "engines", "packages", "openmmlab"]
    version = importlib.metadata.version("onnxruntime")
    assert f"  onnxruntime   {version}: fp32, int8; opset up to 24; dynamic shapes\n" in ran.out


def test_every_engine_is_listed(ferry):
    ran = ferry("env", "--json")
    engines = _engines(ran)
    assert tuple(engines) == backends.names()
    for name, engine in engines.items():
        available = backends.get(name).availability()
        assert (engine["usable"], engine["version"]) == (available.ok, available.version)
        if available.ok:
            able = backends.get(name).capabilities()
            assert engine["runs"] == available.can_run
            assert tuple(engine["precisions"]) == able.precisions
            assert engine["max_opset"] == able.max_opset
        else:
            assert engine["reason"] == available.reason
    assert ran.values["packages"]["torch"] == importlib.metadata.version("torch")
    assert ran.values["machine"]["cores"]
    assert not set(ran.values["packages"]) & set(engines)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('libodd.so: cannot open\\nmore')", "broken: ImportError: libodd.so: cannot open"),
        ("raise OSError('no such library')", "broken: OSError: no such library"),
        ("import os; os.abort()", "broken: loading it ends the process with status -6"),
        ("raise SystemExit('goodbye')", "broken: loading it ends the process with status 1: goodbye"),
    ],
    ids=["import", "library", "abort", "exit"],
)
def test_a_broken_engine(ferry, broken, source, reason):
    broken("onnxruntime", source)
    engines = _engines(ferry("env", "--json"))
    found = engines["onnxruntime"]["reason"]
    assert found.startswith(reason)
    assert "\n" not in found
    assert not engines["onnxruntime"]["usable"]
    assert engines["reference"]["usable"]


def test_an_engine_that_talks_while_it_is_imported(ferry, broken):
    broken("onnxruntime", "print('welcome')")
    assert _engines(ferry("env", "--json"))["onnxruntime"]["usable"]


def test_an_engine_without_its_metadata(ferry, broken):
    absent = next(name for name in ("tensorrt", "ncnn") if backends.get(name).availability().version is None)
    broken(absent, "")
    assert _engines(ferry("env", "--json"))[absent]["reason"].startswith("broken: ")


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("echo 'Odd GPU, 8192 MiB, 555.0, 8.9'", "Odd GPU, 8192 MiB, 555.0, 8.9"),
        ("echo 'no driver'; exit 9", "nvidia-smi: no driver"),
    ],
    ids=["gpu", "failure"],
)
def test_gpus(ferry, tmp_path, monkeypatch, script, shown):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert ferry("env", "--json").values["gpus"] == [shown]


def test_variables_that_matter(ferry, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert ferry("env", "--json").values["variables"]["OMP_NUM_THREADS"] == "3"


def test_nothing_heavy_is_imported():
    code = "from torchferry.cli.main import main; main(['env', '--json']); import sys; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    values, _, modules = done.stdout.rpartition("\n[")
    assert json.loads(values)["engines"]
    for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "openvino", "pydantic"):
        assert f"'{name}'" not in modules
