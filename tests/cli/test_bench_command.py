"""``torchferry bench``: flags, what is printed, and how it ends."""

import json
import re

import pytest

QUICK = ("--rounds", "2", "--runs", "1", "--warm-up", "1", "--threads", "1")


def test_a_package_on_a_picture(ferry, place, package):
    ran = ferry("bench", package, "--input", "picture.png", *QUICK)
    assert (ran.status, ran.err) == (0, "")
    head, titles, row = ran.out.splitlines()
    assert re.match(r"x: float32\[1, 3, 6, 8\]; 1 thread each; cpu .*, cores .*, load ", head)
    assert re.split(r"  +", titles.strip()) == [
        "median ms", "quartiles", "ratio", "quartiles", "runs/s", "cpu ms", "cold s", "peak MiB", "max diff"
    ]  # fmt: skip
    assert re.match(r"onnxruntime-fp32 +[\d.]+ +[\d.]+ +1\.000 ", row)


def test_an_onnx_file_on_two_engines(ferry, package, place):
    model = package / "exported" / "model.onnx"
    ran = ferry(
        "bench", model, "--backends", "onnxruntime,reference:fp32,reference:fp16", "--size", "n=2,h=5", "--size", "w=7",
        "--profile", "--report", "bench.html", "--json", *QUICK,
    )  # fmt: skip
    assert (ran.status, ran.err) == (0, "")
    rows = {row["name"]: row for row in ran.values["rows"]}
    assert list(rows) == ["onnxruntime-fp32", "reference-fp32", "reference-fp16"]
    assert ran.values["inputs"] == ["x: float32[2, 3, 5, 7]"]
    assert rows["onnxruntime-fp32"]["measured"]["layers"]
    assert rows["reference-fp32"]["measured"]["ratio"]["median"] > 0
    assert rows["reference-fp16"]["measured"] is None
    assert rows["reference-fp16"]["failed"]
    assert (place / "bench.html").read_text().startswith("<!doctype html>")


def test_against_pytorch(ferry, package, place):
    ran = ferry(
        "bench", package, "--size", "n=1,h=5,w=7", "--model", "net.py:net", "--torch", "eager", "--json", *QUICK
    )
    assert (ran.status, ran.err) == (0, "")
    assert [row["name"] for row in ran.values["rows"]] == ["onnxruntime-fp32", "torch"]
    assert ran.values["rows"][1]["measured"]["difference"] < 1e-5


def test_every_engine(ferry, package):
    ran = ferry("bench", package, "--backends", "all", "--size", "n=1,h=5,w=7", "--json", *QUICK)
    rows = {row["name"]: row for row in ran.values["rows"]}
    assert rows["onnxruntime-fp32"]["measured"]
    assert "has no engine" in rows["reference-fp32"]["failed"]


def test_nothing_could_be_measured(ferry, package):
    ran = ferry("bench", package, "--backends", "onnxruntime:int8", "--size", "n=1,h=5,w=7", *QUICK)
    assert (ran.status, ran.err) == (1, "")
    assert "has no engine 'onnxruntime-int8'" in ran.out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--size", "n"), 2, "--size 'n' must look like batch=1"),
        (("--size", "n=1"), 2, "--size h=…,w=…, or --input"),
        (("--torch", "lazy"), 2, "--torch 'lazy' must be eager, compile or eager,compile"),
        (("--checkpoint", "w.safetensors"), 2, "--checkpoint belongs to a --model"),
        (("--backends", "onnxrutime"), 1, "did you mean 'onnxruntime'"),
        (("--backends", "onnxruntime:fp33"), 2, "unknown precision 'fp33'"),
        (("--rounds", "0"), 2, "rounds must be at least 1, got 0"),
        (("--input", "picture.png", "--input", "x=picture.png"), 2, "belongs to no input"),
        (("--report", "absent/r.html"), 1, "there is no folder 'absent'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals(ferry, package, flags, status, message):
    ran = ferry("bench", package, *flags)
    assert ran.status == status
    assert message in ran.refusal


def test_a_refusal_as_json(ferry):
    ran = ferry("bench", "absent.onnx", "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["error"]["code"] == "MissingFileError"
