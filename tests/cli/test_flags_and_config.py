"""The config and the flags: they say the same things, and flags win."""

import json

import pytest

from torchferry.package import load

CONFIG = """
name = "tiny"
inputs = ["../picture.png"]
out = "../from_config"

[model]
factory = "../net.py:net"
arguments = { channels = 1 }

[export]
input_names = ["image"]
output_names = ["y"]

[export.dynamic]
image = { 2 = "h", 3 = "w" }

[verify]
atol = 2e-3

[preprocess.image]
channels = "BGR"
scale = 0.5

[postprocess.y]
channels = "L"
"""
FLAGS = (
    "--model", "net.py:net", "--set", "model.arguments={channels=1}", "--input", "picture.png",
    "--input-names", "image", "--output-names", "y", "--dynamic", "image:2=h,3=w", "--set", "verify.atol=2e-3",
    "--set", "preprocess.image={channels='BGR', scale=0.5}", "--set", "postprocess.y.channels=L",
    "--set", "name=tiny",
)  # fmt: skip


@pytest.fixture
def config(place):
    (place / "configs").mkdir()
    (place / "configs" / "deploy.toml").write_text(CONFIG)
    return "configs/deploy.toml"


def _manifest(folder):
    """What a package says, without what differs from run to run: times."""
    values = json.loads((folder / "deploy.json").read_text())
    del values["created"]
    for name in ("report.json", "report.html"):
        del values["files"][name]
    return values


def test_flags_alone_give_the_same_package_as_the_config(ferry, place, config):
    assert ferry("deploy", config).status == 0
    assert ferry("deploy", *FLAGS, "-o", "from_flags").status == 0
    given = _manifest(place / "from_config")
    assert given == _manifest(place / "from_flags")
    assert given["name"] == "tiny"
    assert given["verified"]["tolerances"]["y"]["atol"] == 2e-3
    assert given["preprocess"]["image"]["channels"] == "BGR"


def test_flags_win_and_the_rest_of_the_config_stays(ferry, place, config):
    flags = [
        "--set",
        "preprocess.image.channels=RGB",
        "--dynamic",
        "image:0=n",
        "--set",
        "verify.rtol=0.5",
        "-o",
        "new",
    ]
    assert ferry("deploy", config, *flags, "--output-names", "z", "--set", "postprocess={z={channels='L'}}").status == 2
    ran = ferry("deploy", config, *flags)
    assert ran.status == 0, ran.err
    package = load(place / "new")
    assert not (place / "from_config").exists()
    assert package.signature.dims.keys() == {"n", "h", "w"}
    preprocess = package.manifest.preprocess["image"]
    assert (preprocess.channels, preprocess.scale) == ("RGB", 0.5)
    tolerance = package.manifest.verified.tolerances["y"]
    assert (tolerance.atol, tolerance.rtol) == (2e-3, 0.5)


def test_a_budget_on_the_flags_wins_limit_by_limit(ferry, place, config):
    text = (place / config).read_text().replace("atol = 2e-3", "")
    (place / config).write_text(f"{text}\n[budget]\nmax_abs = 1e-9\n")
    assert "differs" in ferry("deploy", config).refusal
    given = ("--budget", "max_abs=1e-3", "--budget", "relative=0.02", "-o", "new")
    assert ferry("deploy", config, *given, "--budget", "max_abs=2e-3").status == 0
    budget = load(place / "new").manifest.verified.tolerances["y"]
    assert (budget.max_abs, budget.relative) == (2e-3, 0.02)
    ran = ferry("verify", "new", config, "--budget", "relative=1e-12, max_abs=1")
    assert ran.status == 1
    assert "allowed 1e-12, worst at" in ran.out


def test_an_engine_on_the_flags_keeps_the_rest_of_the_target(ferry, place, config):
    with (place / config).open("a") as file:
        file.write('[[targets]]\nbackend = "onnxruntime"\nopset = 19\n')
    assert ferry("deploy", config, "--target", "reference", "-o", "new").status == 0
    [entry] = load(place / "new").manifest.engines
    assert (entry.target.backend, entry.target.opset) == ("reference", 19)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("imputs = []", "imputs", "inputs"),
        ("bases = []", "bases", "base"),
        ("[modle]", "modle", "model"),
        ("[model]\ncheckpont = 'x'", "model.checkpont", "checkpoint"),
        ("[[targets]]\nbackand = 'x'", "targets.0.backand", "backend"),
        ("[[targets]]\n[[targets]]\npercision = 'x'", "targets.1.percision", "precision"),
        ("[export]\ninput_name = ['x']", "export.input_name", "input_names"),
        ("[verify]\natoll = 1", "verify.atoll", "atol"),
        ("[preprocess.image]\nchanels = 'RGB'", "preprocess.image.chanels", "channels"),
        ("[postprocess.y]\ncrop_pading = true", "postprocess.y.crop_pading", "crop_padding"),
    ],
)
def test_unknown_keys_name_the_nearest_one(ferry, place, text, key, nearest):
    (place / "deploy.toml").write_text(text)
    ran = ferry("deploy", "deploy.toml", "--model", "net.py:net", "--input", "picture.png", "-o", "out")
    assert ran.status == 2
    assert f"deploy.toml: unknown key '{key}' (did you mean '{nearest}'" in ran.refusal


def test_unknown_keys_on_the_flags(deploy):
    ran = deploy("--set", "verify.siezs={h=[3]}")
    assert "unknown key 'verify.siezs' (did you mean 'sizes'" in ran.refusal
    assert ran.status == 2


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("inputs = 'picture.png'", "'inputs'"),
        ("inputs = []", "'inputs'"),
        ("inputs = [3]", "'inputs.0'"),
        ("out = 3", "'out'"),
        ("model = 'net.py:net'", "'model'"),
        ("[model]\nfactory = 3", "'model.factory'"),
        ("[model]\nunsafe_checkpoint = 'maybe'", "'model.unsafe_checkpoint'"),
        ("[model]\narguments = [1]", "'model.arguments'"),
        ("targets = {backend = 'onnxruntime'}", "'targets'"),
        ("[export]\ninput_names = 'x'", "'export.input_names'"),
        ("[export.dynamic]\nx = {height = 'h'}", "'export.dynamic.x"),
        ("[export.dynamic]\nx = ['h']", "'export.dynamic.x'"),
        ("[export.dynamic]\nx = {2 = 5}", "'export.dynamic.x.2'"),
        ("[verify]\natol = 'small'", "'verify.atol'"),
        ("[verify]\nsizes = {h = 'all'}", "'verify.sizes.h'"),
        ("[preprocess.x]\nmean = [1]", "'preprocess.x'"),
        ("[preprocess.x]\nchannels = 'RGBA'", "'preprocess.x.channels'"),
    ],
)
def test_wrong_values_name_their_key(ferry, place, text, fragment):
    whole = {"inputs": "inputs = ['picture.png']\n", "out = ": "out = 'out'\n"}
    (place / "deploy.toml").write_text(
        "".join(line for key, line in whole.items() if key not in text)
        + ("" if "model = " in text or "[model]" in text else "model = {factory = 'net.py:net'}\n")
        + text
    )
    ran = ferry("deploy", "deploy.toml")
    assert ran.status == 2
    assert ran.refusal.startswith("error: deploy.toml: ")
    assert fragment in ran.refusal
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("data", "fragment"),
    [(b"inputs = [", "is not TOML"), (b"\xff\xfe", "is not TOML"), (b"base = 3", "'base' in 'deploy.toml' must be")],
)
def test_what_is_no_config(ferry, place, data, fragment):
    (place / "deploy.toml").write_bytes(data)
    ran = ferry("deploy", "deploy.toml")
    assert fragment in ran.refusal
    assert ran.status == 2


def test_the_example_config_of_the_project_is_valid():
    from pathlib import Path

    import torchferry
    from torchferry.pipeline.config import read_toml, validate

    example = Path(torchferry.__file__).parents[2] / "examples" / "super_resolution" / "deploy.toml"
    config = validate(read_toml(example), str(example))
    assert config.model.checkpoint is not None
    assert config.model.checkpoint.is_file()
