"""Config files: bases, paths, and the grammar of the flags that override them."""

import argparse
import tomllib
from pathlib import Path

import pytest

from torchferry import backends
from torchferry.cli.model_flags import add_model_flags, parse_dynamic, read_config
from torchferry.core.errors import ConfigError, MissingBackendError, MissingFileError
from torchferry.core.target import Target
from torchferry.pipeline.config import merge, read_toml, toml_value, validate


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    return tmp_path


def _write(**files):
    for name, text in files.items():
        Path(f"{name.replace('__', '/')}.toml").write_text(text)


def test_tables_merge_and_everything_else_is_replaced(place):
    _write(
        deep='inputs = ["x=1", "y=2"]\n[verify]\natol = 1\nrtol = 2\n[verify.sizes]\nh = [1]\n',
        main='base = ["deep.toml"]\ninputs = ["x=3"]\n[verify]\natol = 5\n[verify.sizes]\nw = [2]\n',
    )
    assert read_toml("main.toml") == {
        "inputs": ["x=3"],
        "verify": {"atol": 5, "rtol": 2, "sizes": {"h": [1], "w": [2]}},
    }


def test_later_bases_win_over_earlier_ones_and_the_file_over_all(place):
    _write(
        one='name = "one"\n[verify]\natol = 1\nrtol = 1\nsizes = {h = [1]}\n',
        two="[verify]\natol = 2\nrtol = 2\n",
        main='base = ["one.toml", "two.toml"]\n[verify]\natol = 3\n',
    )
    assert read_toml("main.toml") == {"name": "one", "verify": {"atol": 3, "rtol": 2, "sizes": {"h": [1]}}}


def test_a_base_has_bases_and_one_may_be_shared(place):
    _write(
        root='name = "root"\n[verify]\natol = 1\n',
        left='base = "root.toml"\n[verify]\nrtol = 2\n',
        right='base = ["root.toml"]\nout = "right"\n',
        main='base = ["left.toml", "right.toml"]\n',
    )
    assert read_toml("main.toml") == {"name": "root", "verify": {"atol": 1, "rtol": 2}, "out": "right"}


def test_paths_are_relative_to_the_file_that_says_them(place):
    _write(
        sub__base='inputs = ["p.png", "x=q.npz", "y=1,2:int64", "z=1.5,2.5", "file", "/abs/p.png"]\nout = "out"\n'
        '[model]\nfactory = "net.py:net"\ncheckpoint = "../w.pt"\n',
        main='base = ["sub/base.toml"]\n[model]\nfactory = "package.module:net"\n',
    )
    assert read_toml("main.toml") == {
        "inputs": ["sub/p.png", "x=sub/q.npz", "y=1,2:int64", "z=1.5,2.5", "sub/file", "/abs/p.png"],
        "out": "sub/out",
        "model": {"factory": "package.module:net", "checkpoint": "w.pt"},
    }
    assert read_toml("sub/base.toml")["model"]["factory"] == "sub/net.py:net"
    assert read_toml(place / "sub" / "base.toml")["out"] == str(place / "sub" / "out")


def test_a_base_is_relative_to_the_file_that_names_it(place):
    _write(sub__a='base = ["b.toml"]\n', sub__b='name = "b"\n', main='base = ["sub/a.toml"]\n')
    assert read_toml("main.toml") == {"name": "b"}


@pytest.mark.parametrize("first", ["a.toml", "sub/../a.toml"])
def test_a_circle_is_refused_and_shown(place, first):
    _write(a='base = ["sub/b.toml"]\n', sub__b='base = ["../c.toml"]\n', c='base = ["./a.toml"]\n')
    with pytest.raises(ConfigError) as caught:
        read_toml(first)
    names = ("a.toml", "sub/b.toml", "c.toml", "a.toml")
    assert str(caught.value) == "bases run in a circle: " + " -> ".join(f"'{place / name}'" for name in names)


def test_a_long_chain_of_bases_is_no_circle(place):
    _write(**{f"c{i}": f'base = ["c{i + 1}.toml"]\n' for i in range(40)}, c40='name = "end"\n')
    assert read_toml("c0.toml") == {"name": "end"}


def test_a_missing_base(place):
    _write(main='base = ["sub/none.toml"]\n')
    with pytest.raises(MissingFileError, match="config 'sub/none.toml' does not exist"):
        read_toml("main.toml")


def test_merge_leaves_its_arguments_alone():
    old, new = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(old, new) == {"a": {"b": 1, "c": 2}}
    assert (old, new) == ({"a": {"b": 1}}, {"a": {"c": 2}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("3", 3),
        ("true", True),
        ("[5, 9]", [5, 9]),
        ("{h = [5], w = [6]}", {"h": [5], "w": [6]}),
        ("'quoted'", "quoted"),
        ("bare words", "bare words"),
        ("net.py:net", "net.py:net"),
        ("", ""),
    ],
)
def test_values_of_set_are_toml_else_text(text, value):
    assert toml_value(text) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image:0=batch,2=height,3=width", ("image", {"0": "batch", "2": "height", "3": "width"})),
        ("x: 0 = n , 2 = h", ("x", {"0": "n", "2": "h"})),
        ("feats.0:1=c", ("feats.0", {"1": "c"})),
        ("odd:name:1=c", ("odd:name", {"1": "c"})),
    ],
)
def test_dynamic(text, expected):
    assert parse_dynamic(text) == expected


@pytest.mark.parametrize("text", ["", "x", "x:", ":0=n", "0=n", "x:0", "x:0=", "x:h=0", "x:0=n,", "x:²=n", "x:-1=n"])
def test_dynamic_refused(text):
    with pytest.raises(ConfigError, match="must look like image:0=batch,2=height,3=width"):
        parse_dynamic(text)


def _from_flags(*flags, out="out"):
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    return read_config(parser.parse_args(flags), out)


GIVEN = ("--model", "m:f", "--input", "x=1")


def test_flags_alone():
    config = _from_flags(
        *GIVEN, "--input", "y=2", "--dynamic", "x:0=n", "--dynamic", "x:1=m", "--dynamic", "feats.0:0=n",
        "--target", "reference", "--opset", "20", "--checkpoint", "w.pt", "--unsafe-checkpoint",
        "--set", "verify.sizes.n=[1, 2]",
    )  # fmt: skip
    assert config.inputs == ("x=1", "y=2")
    assert config.export.dynamic == {"x": {0: "n", 1: "m"}, "feats.0": {0: "n"}}
    assert [(t.backend, t.precision, t.opset) for t in config.targets] == [("reference", "fp32", 20)]
    assert (config.model.checkpoint, config.model.unsafe_checkpoint) == (Path("w.pt"), True)
    assert config.verify.sizes == {"n": (1, 2)}


def test_flags_are_what_a_config_could_say(place):
    _write(
        main='out = "out"\ninputs = ["x=1"]\nmodel = {factory = "m:f"}\nexport.dynamic.x = {0 = "n"}\n'
        'targets = [{backend = "reference"}]\n'
    )
    flags = _from_flags(*GIVEN, "--dynamic", "x:0=n", "--backend", "reference")
    assert flags == validate(read_toml("main.toml"), "main.toml") == _from_flags("main.toml")


def test_set_wins_over_the_other_flags():
    assert _from_flags(*GIVEN, "--output-names", "a", "--set", "export.output_names=['b']").export.output_names == (
        "b",
    )


@pytest.mark.parametrize("item", ["verify.atol", "=3", ""])
def test_set_needs_a_key_and_a_value(item):
    with pytest.raises(ConfigError, match="must be KEY=VALUE"):
        _from_flags(*GIVEN, "--set", item)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        validate(tomllib.loads('imputs = []\nout = 3\n[model]\nfactory = "m:f"\n'), "x.toml")
    message = str(caught.value)
    assert message.startswith("x.toml: ")
    for part in ("unknown key 'imputs' (did you mean 'inputs'", "'inputs' is missing", "'out'"):
        assert part in message


def _backend(**backend):
    values = {"out": "out", "inputs": ["x=1"], "model": {"factory": "m:f"}, "backend_config": backend}
    return validate(values, "x.toml")


@pytest.mark.parametrize(
    ("backend", "target"),
    [
        ({}, Target()),
        ({"type": "reference", "precision": "FP16"}, Target("reference", "fp16")),
        ({"common_config": {"fp16_mode": True}}, Target(precision="fp16")),
        ({"common_config": {"fp16_mode": False, "int8_mode": False}, "precision": "bf16"}, Target(precision="bf16")),
        ({"common_config": {"fp16_mode": True, "int8_mode": True}}, Target(precision="int8")),
        ({"common_config": {"fp16_mode": True}, "precision": "fp16"}, Target(precision="fp16")),
        ({"common_config": {"precision": "fp16", "keep_io_types": False}}, Target(precision="fp16")),
    ],
)
def test_mmdeploys_section_names_a_target(backend, target):
    assert _backend(**backend).engines() == [target]


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ({"typ": "reference"}, "unknown key 'backend_config.typ' .did you mean 'type'"),
        ({"precision": "FP8"}, "'backend_config.precision'"),
        ({"precision": "fp32", "common_config": {"fp16_mode": True}}, "precision is fp32, but common_config.fp16_mode"),
        ({"model_inputs": [{"input_shapes": {"x": {"min_shap": [1]}}}]}, "x.min_shap' .did you mean 'min_shape'"),
        ({"model_inputs": [{"input_shapes": {"x": {"min_shape": "1"}}}]}, "x.min_shape'"),
    ],
)
def test_what_is_wrong_in_mmdeploys_section_is_named(backend, message):
    with pytest.raises(ConfigError, match=message):
        _backend(**backend)


def test_an_engine_of_mmdeploy_that_is_not_ours():
    with pytest.raises(MissingBackendError, match="unknown backend 'torchscript'"):
        _backend(type="torchscript").engines()


def test_targets_and_backend_config_exclude_each_other(place):
    _write(main='out = "out"\ninputs = ["x=1"]\nmodel = {factory = "m:f"}\nbackend_config = {type = "reference"}\n')
    assert _from_flags("main.toml").engines() == [Target("reference")]
    assert _from_flags("main.toml", "--target", "onnxruntime").engines() == [Target()]
    assert _from_flags("main.toml", "--precision", "fp16").engines() == [Target("reference", "fp16")]
    with pytest.raises(ConfigError, match="--opset has no effect beside backend_config"):
        _from_flags("main.toml", "--opset", "18")
    with pytest.raises(ConfigError, match="main.toml: 'targets' and 'backend_config' are two ways"):
        _from_flags("main.toml", "--set", "targets=[{backend = 'reference'}]")


def test_options_reach_the_engine_that_has_them_and_the_rest_is_said():
    common = {"max_workspace_size": 1 << 30, "log_level": 2}
    config = _backend(common_config=common, use_vulkan=True, mo_options={"args": {}}, model_inputs=[{}, {}])
    assert config.engines() == [Target()]
    said = {f.message.split("'")[1].removeprefix("backend_config."): f.message for f in config.findings()}
    assert said.keys() == {"common_config.max_workspace_size", "common_config.log_level", "use_vulkan", "mo_options",
        "model_inputs.1"}  # fmt: skip
    assert "'onnxruntime' has no such option" in said["common_config.log_level"]
    if not backends.get("tensorrt-rtx").availability().ok:
        pytest.skip("tensorrt-rtx is not installed")
    config = _backend(type="tensorrt-rtx", common_config=common)
    assert config.engines() == [Target("tensorrt-rtx", options={"max_workspace_size": 1 << 30})]
    assert [f.message.split("'")[1] for f in config.findings()] == ["backend_config.common_config.log_level"]
