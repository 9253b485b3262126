"""``torchferry deploy``: what it writes, what it says, and what it does when an engine is wrong."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from torchferry.core.errors import InputError
from torchferry.package import load

DYNAMIC = ("--dynamic", "x:0=n,2=h,3=w")
WRONG = """
import random
import torch


class Fickle(torch.nn.Module):
    "Its factor is another at every call, and a constant in the graph."

    def forward(self, x):
        return x * random.random()


class Signs(torch.nn.Module):
    "The sign of NaN is 0 in PyTorch and NaN in ONNX."

    def forward(self, x):
        return torch.sign(torch.log(x - 0.5))
"""


def test_a_package_with_its_proof(deploy, place):
    ran = deploy(*DYNAMIC, "--output-names", "y")
    assert ran.status == 0
    assert ran.err == "", "quiet when not on a terminal"
    assert "proof   passed, " in ran.out
    assert ran.out.endswith("report: out/report.html\n")
    package = load(place / "out")
    assert str(package) in ran.out
    assert package.manifest.name == "net"
    assert list(package.signature.dims) == ["n", "h", "w"]
    assert package.manifest.preprocess.keys() == {"x"}
    assert package.manifest.postprocess.keys() == {"y"}
    assert package.manifest.verified.passed
    assert len(package.manifest.verified.cases) > 5
    assert {"torch", "onnx", "torchferry"} <= package.manifest.versions.keys()


def test_json(deploy):
    values = deploy("--json", *DYNAMIC).values
    assert values["package"] == "out"
    assert values["report"]["passed"] is True
    assert len(values["report"]["comparisons"]) > 5
    assert all(step["seconds"] >= 0 and step["peak_mib"] > 10 for step in values["steps"])


@pytest.mark.parametrize("model", ["Fickle", "Signs"])
@pytest.mark.parametrize("flags", [(), DYNAMIC], ids=["fixed", "dynamic"])
def test_a_model_that_does_not_arrive_intact_is_not_packed(deploy, place, scratch, left_in, model, flags):
    (place / "wrong.py").write_text(WRONG)
    ran = deploy(*flags, model=f"wrong.py:{model}", out="new/out")
    assert ran.status == 1
    assert "error: the model did not arrive intact: " in ran.refusal
    assert f"nothing was packed; read '{place}/new/out.report.html'" in ran.refusal
    assert [path.name for path in (place / "new").iterdir()] == ["out.report.html"]
    assert "<html" in (place / "new" / "out.report.html").read_text()
    assert left_in(scratch) == []


def test_a_failed_verification_as_json_keeps_the_old_package(deploy, place, tree):
    (place / "wrong.py").write_text(WRONG)
    assert deploy().status == 0
    before = tree(place / "out")
    ran = deploy("--json", "--overwrite", model="wrong.py:Fickle")
    assert (ran.status, ran.err) == (1, "")
    assert ran.values["error"]["code"] == "VerificationError"
    assert "differs" in ran.values["error"]["message"]
    assert tree(place / "out") == before


def test_a_page_that_cannot_be_written_does_not_hide_the_failure(deploy, place):
    (place / "wrong.py").write_text(WRONG)
    (place / "out.report.html").mkdir()
    refusal = deploy(model="wrong.py:Fickle").refusal
    assert "the model did not arrive intact" in refusal
    assert "the report could not be written" in refusal


def test_a_tolerance_that_no_engine_meets_fails_and_a_wide_one_passes(deploy, place):
    (place / "wrong.py").write_text(WRONG)
    assert "differs" in deploy("--set", "verify.atol=0", "--set", "verify.rtol=0").refusal
    assert deploy("--set", "verify.atol=2.0", model="wrong.py:Fickle").status == 0
    assert load(place / "out").manifest.verified.tolerances["mul"].atol == 2.0


def test_sizes_to_verify_at(deploy):
    values = deploy("--json", *DYNAMIC, "--set", "verify.sizes.h=[5, 9]", "--set", "verify.sizes.w=[4]").values
    cases = [comparison["case"] for comparison in values["report"]["comparisons"]]
    assert cases == ["data", "h=5, w=4", "h=9, w=4"]


BACKEND_CONFIG = """
[export.dynamic]
x = { 0 = "n", 2 = "h", 3 = "w" }

[backend_config]
type = "onnxruntime"
precision = "FP32"
common_config = { max_workspace_size = 1073741824 }

[[backend_config.model_inputs]]
[backend_config.model_inputs.input_shapes.x]
min_shape = [1, 3, 2, 3]
opt_shape = [2, 3, 9, 11]
max_shape = [4, 3, 16, 20]
"""


def test_mmdeploys_shapes_bound_the_graph_and_are_verified(deploy, ferry, place):
    (place / "deploy.toml").write_text(BACKEND_CONFIG)
    command = ("deploy.toml", "--model", "net.py:net", "--input", "picture.png", "-o")
    ran = ferry("deploy", *command, "out", "--json")
    assert ran.status == 0, ran.err
    cases = {comparison["case"] for comparison in ran.values["report"]["comparisons"]}
    assert {"h=2, w=3", "n=2, h=9, w=11", "n=4, h=16, w=20"} <= cases
    (ignored,) = (f for f in ran.values["report"]["findings"] if f["code"] == "config-ignored")
    assert "'backend_config.common_config.max_workspace_size' has no effect" in ignored["message"]
    package = load(place / "out")
    assert [entry.id for entry in package.manifest.engines] == ["onnxruntime-fp32"]
    assert {dim: str(allowed) for dim, allowed in package.signature.dims.items()} == {
        "n": "1..2..4", "h": "2..9..16", "w": "3..11..20"}  # fmt: skip
    with package.open() as session:
        session.run({"x": np.zeros((4, 3, 16, 20), np.float32)})
        with pytest.raises(InputError, match="'n' = 5"):
            session.run({"x": np.zeros((5, 3, 16, 20), np.float32)})
    ran = ferry("export", *command[:-1], "-o", "m.onnx", "--json")
    assert any(f["code"] == "config-ignored" for f in ran.values["report"]["findings"])


def test_two_engines_in_one_package(deploy, ferry, place):
    ran = deploy(*DYNAMIC, "--set", "targets=[{backend='onnxruntime'}, {backend='reference'}]", "--output-names", "y")
    assert ran.status == 0
    package = load(place / "out")
    assert [entry.id for entry in package.manifest.engines] == ["onnxruntime-fp32", "reference-fp32"]
    assert package.manifest.verified.max_abs.keys() == {"y on onnxruntime-fp32", "y on reference-fp32"}
    outputs = []
    for flags in ([], ["--backend", "reference"], ["--backend", "onnxruntime-fp32"]):
        assert ferry("run", "out", "--input", "picture.png", "--output", "y.npz", *flags).status == 0
        with np.load(place / "y.npz") as file:
            outputs.append(file["y"])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    np.testing.assert_array_equal(outputs[2], outputs[0])


def test_a_failure_of_one_of_two_engines_says_which(deploy, place):
    (place / "wrong.py").write_text(WRONG)
    targets = "targets=[{backend='onnxruntime'}, {backend='reference'}]"
    refusal = deploy("--set", targets, model="wrong.py:Fickle").refusal
    assert "at data, on onnxruntime-fp32" in refusal
    assert "(and 1 more)" in refusal


@pytest.mark.parametrize("inputs", [("picture.png", "other.png"), ("x=picture.png", "x=other.png")])
def test_several_pictures_are_several_sets_of_data(deploy, place, inputs):
    Image.new("RGB", (5, 9)).save(place / "other.png")
    values = deploy("--json", *DYNAMIC, inputs=inputs).values
    cases = [comparison["case"] for comparison in values["report"]["comparisons"]]
    assert cases[:2] == ["data 1", "data 2"]
    shapes = [tuple(comparison["shape"]) for comparison in values["report"]["comparisons"]]
    assert shapes[:2] == [(1, 3, 6, 8), (1, 3, 9, 5)]


@pytest.mark.parametrize("inputs", [["image=picture.png", "gain=2"], ["x=picture.png", "factor=2"]])
def test_inputs_go_by_the_graphs_names_and_by_forwards(deploy, place, inputs):
    assert deploy("--input-names", "image,gain", model="net.py:scaled", inputs=inputs).status == 0
    signature = load(place / "out").signature
    assert [str(spec) for spec in signature.inputs] == ["image: float32[1, 3, 6, 8]", "gain: float32[1]"]


def test_a_picture_declared_stays_declared_when_the_data_are_arrays(deploy, place):
    np.savez(place / "x.npz", x=np.ones((1, 3, 6, 8), np.float32))
    assert deploy("--set", "preprocess.x.channels='BGR'", inputs=["x.npz"]).status == 0
    assert load(place / "out").manifest.preprocess["x"].channels == "BGR"


def test_a_checkpoint_and_what_was_done_to_it(deploy, place):
    import torch
    from safetensors.torch import save_file

    weights = {f"module.conv.{name}": torch.ones(shape) for name, shape in (("weight", (3, 3, 3, 3)), ("bias", (3,)))}
    torch.save({"state_dict": weights}, place / "weights.pt")
    values = deploy("--json", "--checkpoint", "weights.pt").values
    [loading] = [step for step in values["steps"] if step["name"] == "load model and data"]
    assert loading["detail"] == "checkpoint: weights found under 'state_dict', prefix 'module.' stripped"

    ran = deploy("--checkpoint", "weights.pt", out="said")
    assert "prefix 'module.' stripped" in ran.err

    save_file({name.removeprefix("module."): value for name, value in weights.items()}, place / "weights.safetensors")
    assert deploy("--checkpoint", "weights.safetensors", out="plain").status == 0
    engines = [(place / out / "engines/onnxruntime-fp32/model.onnx").read_bytes() for out in ("out", "plain")]
    assert engines[0] == engines[1]


CODE = """
import pathlib

class Payload:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran"),)
"""


def test_a_checkpoint_with_code_runs_only_when_told(deploy, place):
    import torch

    namespace = {}
    exec(CODE, namespace)
    weights = {"conv.weight": torch.ones(3, 3, 3, 3), "conv.bias": torch.ones(3)}
    torch.save({"state_dict": weights, "payload": namespace["Payload"]()}, place / "evil.pt")
    refusal = deploy("--checkpoint", "evil.pt").refusal
    assert "checkpoint 'evil.pt' is pickled with code in it" in refusal
    assert "--unsafe-checkpoint" in refusal
    assert not (place / "ran").exists()
    assert not (place / "out").exists()

    assert deploy("--checkpoint", "evil.pt", "--unsafe-checkpoint").status == 0
    assert (place / "ran").exists()


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"conv.bias": None}, ["missing keys: conv.bias"]),
        ({"head.weight": (2,)}, ["unexpected keys: head.weight"]),
        ({"conv.weight": (3, 3, 5, 5)}, ["other shapes: conv.weight is (3, 3, 5, 5), the model has (3, 3, 3, 3)"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_listed(deploy, place, change, fragments):
    import torch

    shapes = {"conv.weight": (3, 3, 3, 3), "conv.bias": (3,)} | change
    torch.save({key: torch.ones(shape) for key, shape in shapes.items() if shape}, place / "other.pt")
    refusal = deploy("--checkpoint", "other.pt").refusal
    assert "checkpoint 'other.pt' does not fit the model" in refusal
    for fragment in fragments:
        assert fragment in refusal


@pytest.mark.parametrize("name", ["empty.pt", "short.pt", "text.pt", "empty.safetensors", "text.safetensors"])
def test_a_checkpoint_that_is_none(deploy, place, name):
    import torch

    torch.save({"conv.weight": torch.ones(3, 3, 3, 3)}, place / "whole.pt")
    whole = (place / "whole.pt").read_bytes()
    data = {"empty": b"", "short": whole[: len(whole) // 2], "text": b"this is a text, and no weights are in it"}
    (place / name).write_bytes(data[name.partition(".")[0]])
    refusal = deploy("--checkpoint", name).refusal
    assert f"checkpoint '{name}'" in refusal
    assert "unsafe" not in refusal


def test_progress_on_a_terminal(place):
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "torchferry", "deploy", "--model", "net.py:net", "--input", "picture.png", "-o", "out"],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
    ) as process:
        os.close(follower)
        seen = b""
        try:
            while chunk := os.read(leader, 4096):
                seen += chunk
        except OSError:  # how Linux says that the other side is closed
            pass
        out = process.stdout.read()
    os.close(leader)
    assert process.returncode == 0
    assert out.startswith("net: package of ")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    for step in ("import torch", "load model and data", "export", "compile for onnxruntime-fp32", "pack"):
        assert re.search(rf"✓ {step}  [\d.]+ s  \d+ MiB", plain), plain
    assert "✓ verify onnxruntime-fp32" in plain
    assert "max abs difference" in plain
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h"), "the cursor was hidden and not shown again"


def test_the_readers_leaving_is_no_traceback(place, package):
    done = subprocess.run(
        f"{sys.executable} -m torchferry run {package} --input picture.png --output y.png --json | true",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert (place / "y.png").exists()


def test_numbers_of_another_dtype(deploy, place):
    (place / "picks.py").write_text(
        "import torch\nclass Picks(torch.nn.Module):\n    def forward(self, x, rows):\n        return x[:, :, rows]\n"
    )
    ran = deploy("--json", model="picks.py:Picks", inputs=["picture.png", "rows=5,0,3:int64"])
    assert ran.status == 0, ran.out
    report = json.loads((place / "out" / "report.json").read_text())
    assert [comparison["shape"] for comparison in report["comparisons"]] == [[1, 3, 3, 8]]
