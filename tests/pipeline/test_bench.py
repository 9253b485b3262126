"""Contenders side by side: what is measured, what fails alone, and that nothing stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import torchferry as ferry
from torchferry import backends
from torchferry.core.errors import ConfigError, MissingBackendError, MissingFileError
from torchferry.pipeline.bench import every_target, made_inputs
from torchferry.pipeline.bench_driver import Contender, Plan, measure
from torchferry.pipeline.bench_report import BenchReport
from torchferry.pipeline.bench_worker import Server, open_contender

QUICK = {"threads": 1, "rounds": 3, "runs": 2, "warm_up": 1}
SIZES = {"n": 1, "h": 6, "w": 8}
MODEL_FILE = """
import torch


class FromFile(torch.nn.Module):
    def forward(self, image):
        return image * 2


class Hidden(FromFile):
    def __init__(self):
        super().__init__()
        self.kept = lambda: None  # nothing that pickle takes
"""
# Speaks the protocol, and dies as an engine may.
DYING = """
import json, os, sys
np = __import__("numpy")
for line in sys.stdin:
    request = json.loads(line)
    if "open" in request:
        np.savez(request["outputs"])
        print(json.dumps({"open_seconds": 1, "first_seconds": 1, "version": "1"}), flush=True)
    else:
        print("out of luck", file=sys.stderr, flush=True)
        os.abort()
"""


# Speaks the protocol, and says that every run took what it was told.
TOLD = """
import json, sys
np = __import__("numpy")
for line in sys.stdin:
    request = json.loads(line)
    if "open" in request:
        seconds = request["open"]["seconds"]
        np.savez(request["outputs"])
        print(json.dumps({"open_seconds": 1, "first_seconds": 1, "version": "1"}), flush=True)
    elif "run" in request:
        print(json.dumps({"seconds": [seconds] * request["run"], "cpu_seconds": seconds}), flush=True)
    else:
        print(json.dumps({"mib": 1}), flush=True)
"""


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image):
        return self.conv(image).relu()


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert [p.name for p in folder.iterdir() if not p.name.startswith("torchinductor_")] == []


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    ferry.export(
        model, torch.rand(2, 3, 4, 6), dynamic_shapes={"image": {0: "n", 2: "h", 3: "w"}}, output_names=["y"]
    ).save(path)
    return path


@pytest.fixture(scope="module")
def package(onnx_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    engines = [
        ferry.compile(onnx_file, ferry.Target(name), folder / name) for name in (ferry.Target.backend, "reference")
    ]
    return ferry.pack(engines, folder / "out").folder


def test_what_is_measured(onnx_file):
    targets = [ferry.Target(), ferry.Target("reference")]
    report = ferry.bench(onnx_file, targets=targets, sizes=SIZES, profile=True, **QUICK)
    assert [row.name for row in report.rows] == ["onnxruntime-fp32", "reference-fp32"]
    assert report.inputs == ("image: float32[1, 3, 6, 8]",)
    assert report.baseline is report.rows[0]
    for row in report.rows:
        assert row.failed == ""
        assert row.version == backends.get(row.name.removesuffix("-fp32")).availability().version
        assert [len(round_) for round_ in row.measured.rounds] == [2, 2, 2]
        latency = row.measured.latency
        assert 0 < latency.first <= latency.median <= latency.third
        assert row.measured.throughput > 0
        assert row.measured.peak_mib > 20  # Python and numpy at least
        assert row.measured.cold_seconds > latency.median
        assert row.compile_seconds > 0
    first, second = (row.measured for row in report.rows)
    assert report.ratio(report.rows[0]).median == 1
    there, back = report.ratio(report.rows[1]), report.ratio(report.rows[0], to=report.rows[1])
    assert there.median == pytest.approx(1 / back.median)
    assert first.difference is None
    assert 0 <= second.difference < 1e-5
    assert "Conv" in {layer.kind for layer in first.layers}
    assert all(layer.seconds > 0 for layer in first.layers)
    assert second.layers == ()


def test_each_process_has_its_own_peak(onnx_file):
    ballast = np.ones(60 << 20, np.uint8)  # of this process, not of theirs
    report = ferry.bench(onnx_file, sizes=SIZES, **QUICK)
    with_large = ferry.bench(onnx_file, sizes={"n": 60, "h": 250, "w": 250}, **QUICK)
    assert ballast.all()
    small, large = (found.rows[0].measured.peak_mib for found in (report, with_large))
    assert large - small > 60 * 250 * 250 * 7 * 4 / 2**20 / 2  # inputs and outputs, roughly
    assert small < 200  # torch alone, which this process has, takes more


@pytest.mark.skipif(not backends.get("openvino").availability().ok, reason="openvino is not installed")
def test_layers_of_openvino(onnx_file):
    report = ferry.bench(onnx_file, targets=[ferry.Target("openvino")], sizes=SIZES, profile=True, **QUICK)
    assert "Convolution" in {layer.kind for layer in report.rows[0].measured.layers}


def test_a_package_and_one_of_its_engines(package):
    inputs = {"image": np.ones((2, 3, 5, 5), np.float32)}
    report = ferry.bench(package, inputs, **QUICK)
    assert [row.name for row in report.rows] == ["onnxruntime-fp32", "reference-fp32"]
    assert all(row.measured for row in report.rows)
    assert report.inputs == ("image: float32[2, 3, 5, 5]",)
    chosen = ferry.bench(
        ferry.load(package), inputs, targets=[ferry.Target("openvino"), ferry.Target("reference")], **QUICK
    )
    assert [row.name for row in chosen.rows] == ["reference-fp32", "openvino-fp32"]
    assert chosen.rows[0].measured
    assert chosen.rows[1].failed == f"package '{package}' has no engine 'openvino-fp32'"


def test_several_subjects_are_told_apart(onnx_file, package):
    engine = ferry.load(package).engines[0]
    ferry.compile(onnx_file, engine.target, package.parent / "engine")
    report = ferry.bench([onnx_file, package.parent / "engine"], sizes=SIZES, **QUICK)
    assert [row.name for row in report.rows] == ["net/onnxruntime-fp32", "engine/onnxruntime-fp32"]
    assert all(row.measured for row in report.rows)


def test_one_that_cannot_compile_does_not_stop_the_others(onnx_file):
    targets = [ferry.Target("reference", "fp16"), ferry.Target("reference", "int8"), ferry.Target()]
    report = ferry.bench(onnx_file, targets=targets, sizes=SIZES, **QUICK)
    assert [bool(row.measured) for row in report.rows] == [False, False, True]
    assert "the graph computes in FP32" in report.rows[0].failed
    assert "the graph is not quantised" in report.rows[1].failed
    assert report.baseline.name == "onnxruntime-fp32"
    assert report.ratio(report.rows[0]) is None
    assert "the graph is not quantised" in report.to_text()


def test_one_that_does_not_take_the_inputs(onnx_file, model):
    wrong = {"image": np.ones((1, 4, 6, 8), np.float32)}
    report = ferry.bench(onnx_file, wrong, **QUICK)
    assert "axis 1 of 'image' must be 3, got 4" in report.rows[0].failed
    assert report.baseline is None
    assert report.to_dict()["baseline"] is None


def test_one_that_dies_does_not_stop_the_others(onnx_file, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    engine = ferry.compile(onnx_file, ferry.Target(), tmp_path / "engine")
    inputs = {"image": np.ones((1, 3, 6, 8), np.float32)}
    rows = measure(
        [
            Contender("dying", {}, inputs, worker=(str(tmp_path / "dying.py"),)),
            Contender("alive", {"kind": "engine", "folder": str(engine.folder)}, inputs),
        ],
        Plan(threads=1, rounds=2, runs=1, warm_up=1),
    )
    assert rows[0].failed == "its process ended with SIGABRT: out of luck"
    assert rows[0].measured is None
    assert len(rows[1].measured.rounds) == 2


@pytest.mark.parametrize(
    ("milliseconds", "rounds"),
    [((1.0, 1.2, 4.0), (8, 8, 5)), ((4.0, 1.0), (5, 5)), ((1.0,), (5,)), ((1.0, 1.0), (8, 8))],
)
def test_a_race_goes_on_among_those_that_may_win(tmp_path, milliseconds, rounds):
    (tmp_path / "told.py").write_text(TOLD)
    contenders = [
        Contender(f"{ms} ms", {"seconds": ms / 1e3}, {}, worker=(str(tmp_path / "told.py"),)) for ms in milliseconds
    ]
    report = BenchReport(measure(contenders, Plan(threads=1, rounds=8, race=True)), (), 1)
    assert tuple(len(row.measured.rounds) for row in report.rows) == rounds
    assert report.fastest.name == f"{min(milliseconds)} ms"
    assert [report.ratio(row, to=report.fastest).median for row in report.rows] == pytest.approx(
        [ms / min(milliseconds) for ms in milliseconds]
    )


def test_a_round_ends_in_time_on_a_busy_machine(onnx_file, tmp_path):
    engine = ferry.compile(onnx_file, ferry.Target(), tmp_path / "engine")
    image = np.ones((1, 3, 6, 8), np.float32)
    np.savez(tmp_path / "in.npz", image=image)
    server = Server(open_contender)
    opened = {"open": {"kind": "engine", "folder": str(engine.folder)}, "inputs": str(tmp_path / "in.npz")}
    server.answer({**opened, "outputs": str(tmp_path / "out.npz"), "threads": 1})
    assert len(server.answer({"run": 3, "within": 600})["seconds"]) == 3
    assert len(server.answer({"run": 1_000_000, "within": 1e-9})["seconds"]) == 1


def test_pytorch(onnx_file, model, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # the row is tested here, not torch's compiler
    report = ferry.bench(onnx_file, model=model, sizes=SIZES, **QUICK)
    assert [row.name for row in report.rows] == ["onnxruntime-fp32", "torch", "torch.compile"]
    for row in report.rows[1:]:
        assert row.version == torch.__version__
        assert row.measured.difference < 1e-5


@pytest.mark.parametrize("factory", ["FromFile", "Hidden"])
def test_pytorch_from_a_file(onnx_file, tmp_path, factory):
    (tmp_path / "net_in_file.py").write_text(MODEL_FILE)
    reference = f"{tmp_path / 'net_in_file.py'}:{factory}"
    report = ferry.bench(onnx_file, model=reference, torch_modes=["eager"], sizes=SIZES, **QUICK)
    assert [row.failed for row in report.rows] == ["", ""]
    assert report.rows[1].measured.difference is None  # an output of another shape


def test_a_module_that_cannot_be_sent(onnx_file, model):
    class Local(Net):
        pass

    report = ferry.bench(onnx_file, model=Local(), torch_modes=["eager"], sizes=SIZES, **QUICK)
    assert "the model cannot be sent to another process" in report.rows[1].failed
    assert report.rows[0].measured


def test_made_inputs(onnx_file):
    signature = ferry.Signature(
        (
            ferry.core.signature.TensorSpec("x", "float16", ("n", 3, "2*n")),
            ferry.core.signature.TensorSpec("ids", "int64", ("n",)),
            ferry.core.signature.TensorSpec("mask", "bool", (4,)),
        ),
        (),
        {"n": ferry.DimRange()},
    )
    made = made_inputs(signature, {}, {"n": 5})
    assert {name: (array.dtype.name, array.shape) for name, array in made.items()} == {
        "x": ("float16", (5, 3, 10)),
        "ids": ("int64", (5,)),
        "mask": ("bool", (4,)),
    }
    again = made_inputs(signature, {}, {"n": 5})
    assert all((made[name] == again[name]).all() for name in made)
    assert set(made["ids"]) <= {0, 1}
    words = ferry.Signature((ferry.core.signature.TensorSpec("words", "string", (2,)),), ())
    with pytest.raises(ConfigError, match="no input can be made for 'words: string"):
        made_inputs(words, {}, {})
    given = np.ones((7, 3, 14), np.float16)
    seen = made_inputs(signature, {"x": given}, {})
    assert seen["x"] is given
    assert seen["ids"].shape == (7,)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"sizes": {"n": 1}}, ConfigError, "--size h=…,w=…, or --input"),
        ({"sizes": {**SIZES, "height": 2}}, ConfigError, "no model has a dynamic dimension 'height'"),
        ({"inputs": {"picture": np.ones(3)}}, ConfigError, "no model has an input 'picture'"),
        ({"rounds": 0}, ConfigError, "rounds must be at least 1, got 0"),
        ({"warm_up": -1}, ConfigError, "warm-up must be at least 0, got -1"),
        ({"subjects": []}, ConfigError, "nothing to measure"),
        ({"subjects": "absent.onnx"}, MissingFileError, "absent.onnx"),
        ({"subjects": "."}, MissingFileError, "neither a package nor a compiled engine"),
        ({"targets": [ferry.Target("onnxrutime")]}, MissingBackendError, "did you mean 'onnxruntime'"),
    ],
    ids=["size", "unknown-size", "input", "rounds", "warm-up", "nothing", "absent", "folder", "engine"],
)
def test_what_cannot_be_used(onnx_file, changed, error, message):
    arguments = {"subjects": onnx_file, "sizes": SIZES, **QUICK, **changed}
    with pytest.raises(error) as caught:
        ferry.bench(arguments.pop("subjects"), **arguments)
    assert message in str(caught.value)


def test_every_target_runs_here():
    found = every_target()
    assert ferry.Target() in found
    assert ferry.Target("reference") in found
    assert all(backends.get(target.backend).availability().can_run for target in found)
    assert not {target.backend for target in found} & {"ncnn", "tensorrt", "tensorrt-rtx"}  # take some graphs only


def test_saved_as_text_json_and_a_page(onnx_file, tmp_path):
    report = ferry.bench(
        [onnx_file], targets=[ferry.Target(), ferry.Target("reference", "int8")], sizes=SIZES, profile=True, **QUICK
    )
    for name in ("r.txt", "r.json", "r.html"):
        report.save(tmp_path / name)
    assert (tmp_path / "r.txt").read_text() == report.to_text()
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["baseline"] == "onnxruntime-fp32"
    assert values["rows"][0]["measured"]["ratio"]["median"] == 1
    assert values["rows"][1]["measured"] is None
    page = (tmp_path / "r.html").read_text()
    assert "<svg" in page
    assert "the graph is not quantised" in page
    assert "Conv" in page
    assert not re.search(r"<script|<link|src=|https?://", page)


def test_the_page_escapes_names(onnx_file, tmp_path):
    odd = tmp_path / "<b>.onnx"
    odd.write_bytes(Path(onnx_file).read_bytes())
    page = ferry.bench([odd, onnx_file], sizes=SIZES, **QUICK).to_html()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def _workers(folder):
    """Return the processes that were told to keep their files below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"TMPDIR={folder}/".encode() in variables:
            found.append(int(process.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_no_worker_outlives_its_driver(onnx_file, tmp_path, how):
    command = [sys.executable, "-m", "torchferry", "bench", str(onnx_file), "--size", "n=1,h=6,w=8", "--rounds=100000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        while driver.poll() is None and not _workers(tmp_path):
            time.sleep(0.05)
        time.sleep(0.5)
        driver.send_signal(how)
        out, error = driver.communicate(timeout=30)
    for _ in range(200):
        if not _workers(tmp_path):
            break
        time.sleep(0.05)
    assert _workers(tmp_path) == []
    if how != signal.SIGKILL:
        assert (driver.returncode, out, error) == (1, "", "error: interrupted; nothing is half written\n")
        assert list(tmp_path.iterdir()) == []
