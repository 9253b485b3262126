"""``torchferry deploy --backend auto`` with every engine that is here, measured on this machine."""

import pytest

from torchferry import backends
from torchferry.package import load
from torchferry.pipeline.auto import NOISE

CONFIG = """
inputs = ["picture.png"]
out = "out"
model = { factory = "net.py:net" }

[[targets]]
backend = "auto"
precision = "fp32"

[budget]
relative = 0.01
"""


def _offered():
    """Every target that can be tried here."""
    able = {name: backends.get(name).capabilities() for name in backends.running()}
    return {f"{name}-{precision}" for name, can in able.items() if can.fast for precision in can.precisions}


@pytest.mark.slow
@pytest.mark.parametrize("budget", [(), ("--budget", "relative=0.05")], ids=["none", "5 %"])
def test_the_fastest_of_those_within(deploy, place, budget):
    values = deploy("--backend", "auto", "--json", *budget).values
    tried = {row["target"]: row for row in values["tried"]}
    assert set(tried) == _offered()
    assert {row["verdict"] for row in tried.values()} <= {"chosen", "fallback", "within", "outside", "refused"}
    measured = [row for row in tried.values() if row["ratio"] is not None]
    [chosen] = [row for row in measured if row["verdict"] == "chosen"]
    fastest = min(row["ratio"] for row in measured)
    assert chosen["ratio"] <= NOISE * fastest
    for row in measured:
        assert row["seconds"] > 0
        assert row["relative"] < 0.05
        assert row["ratio"] > NOISE * fastest or row["relative"] >= chosen["relative"]
    outside = [row for row in tried.values() if row["verdict"] == "outside"]
    assert bool(budget) or all(row["target"].endswith("-bf16") for row in outside)
    assert all("differs" in row["reason"] for row in outside)
    package = load(place / "out")
    assert package.manifest.engines[0].id == chosen["target"]
    assert len(package.engines) == (1 if chosen["target"].endswith("-fp32") else 2)
    assert values["report"]["facts"]["tried"].keys() - tried.keys() == {"measured on"}


def test_one_precision_from_a_config(ferry, place):
    (place / "deploy.toml").write_text(CONFIG)
    ran = ferry("deploy", "deploy.toml")
    assert ran.status == 0, ran.err
    table = ran.out[ran.out.index("\ntried ") :].splitlines()[1:-1]
    assert table[0].split() == ["tried", "verdict", "max", "abs", "relative", "median", "ms", "ratio"]
    assert {line.split()[0] for line in table[1:]} == {name for name in _offered() if name.endswith("-fp32")}
    assert sum(line.split()[1] == "chosen" for line in table[1:]) == 1
    assert len(load(place / "out").engines) == 1


def test_nothing_within(ferry, place):
    (place / "deploy.toml").write_text(CONFIG)
    ran = ferry("deploy", "deploy.toml", "--budget", "relative=1e-12")
    assert ran.status == 1
    assert "no engine here runs it within budget relative 1e-12\n  onnxruntime-fp32: outside, max abs " in ran.refusal
    assert f"read '{place}/out.report.html'" in ran.refusal
    assert not (place / "out").exists()


@pytest.mark.parametrize("command", ["export", "compile"])
def test_other_commands_need_a_name(ferry, place, package, command):
    model = {
        "export": ("--model", "net.py:net", "--input", "picture.png"),
        "compile": (package / "exported/model.onnx",),
    }
    ran = ferry(command, *model[command], "--backend", "auto", "-o", "made")
    assert ran.status == 2
    assert "'auto' is no engine: it lets deploy choose one" in ran.refusal
    assert not (place / "made").exists()
