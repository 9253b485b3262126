"""Data, flags and targets that cannot be used, by every command that takes them: one clear error each."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def files(place):
    (place / "text.png").write_text("hello")
    (place / "empty.png").touch()
    (place / "short.png").write_bytes((place / "picture.png").read_bytes()[:-40])
    (place / "empty.npz").touch()
    (place / "empty.npy").touch()
    ones = np.ones((1, 3, 6, 8), np.float32)
    np.save(place / "ones.npy", ones)
    np.savez(place / "none.npz")
    np.savez(place / "double.npz", x=ones.astype(np.float64))
    np.savez(place / "rank.npz", x=ones[0, 0])
    np.savez(place / "channels.npz", x=ones[:, :2])
    np.savez(place / "text.npz", x=np.array(["a", "b"]))
    np.savez(place / "objects.npz", x=np.array([{}], object))
    np.savez(place / "swapped.npz", x=ones.astype(">f4"))
    np.savez(place / "two.npz", a=ones, b=ones)
    (place / "one.npz").write_bytes((place / "ones.npy").read_bytes())
    (place / "archive.npy").write_bytes((place / "two.npz").read_bytes())
    whole = (place / "double.npz").read_bytes()
    (place / "short.npz").write_bytes(whole[: len(whole) // 2])
    (place / "damaged.npz").write_bytes(whole[:100] + b"\xff" * 50 + whole[150:])


UNREADABLE = [
    ("x=missing.png", 1, "picture 'missing.png' does not exist"),
    ("x=missing.npz", 1, "input 'missing.npz' does not exist"),
    ("x=missing.npy", 1, "input 'missing.npy' does not exist"),
    ("x=text.png", 1, "'text.png' is not a picture"),
    ("x=empty.png", 1, "'empty.png' is not a picture"),
    ("x=short.png", 1, "picture 'short.png' cannot be read"),
    ("x=net.py", 1, "'net.py' is not a picture"),
    ("x=.", 1, "'.' is a folder"),
    ("x=empty.npz", 1, "'empty.npz' is not a whole .npz file"),
    ("x=short.npz", 1, "'short.npz' is not a whole .npz file"),
    ("x=damaged.npz", 1, "'damaged.npz' is not a whole .npz file"),
    ("x=none.npz", 1, "'none.npz' holds no arrays"),
    ("x=objects.npz", 1, "'objects.npz' is not a whole .npz file of plain arrays"),
    ("x=two.npz", 2, "'two.npz' holds a, b, none of them 'x'"),
    ("x=one.npz", 1, "'one.npz' holds one array"),
    ("x=empty.npy", 1, "'empty.npy' is not a whole .npy file"),
    ("x=archive.npy", 1, "'archive.npy' is an archive of arrays"),
    ("x=1,2:int65", 2, "did you mean 'int64'"),
    ("x=1.5:int64", 2, "int64 cannot hold these numbers"),
]


@pytest.mark.parametrize(("item", "status", "fragment"), UNREADABLE)
def test_unreadable_data_to_deploy(deploy, place, item, status, fragment):
    ran = deploy(inputs=[item])
    assert fragment in ran.refusal
    assert ran.status == status
    assert not (place / "out").exists()


@pytest.mark.parametrize(("item", "status", "fragment"), UNREADABLE)
def test_unreadable_data_to_run(ferry, package, place, item, status, fragment):
    ran = ferry("run", package, "--input", item, "--output", "y.npz")
    assert fragment in ran.refusal
    assert ran.status == status
    assert not (place / "y.npz").exists()


@pytest.mark.parametrize("command", ["deploy", "export", "verify"])
def test_missing_files_are_named_by_every_command_that_takes_a_model(ferry, package, command):
    start = [command, package] if command == "verify" else [command, "-o", "new"]
    assert "config 'no.toml' does not exist" in ferry(*start, "no.toml").refusal
    given = ["--model", "net.py:net", "--input", "picture.png"]
    assert "checkpoint 'no.pt' does not exist" in ferry(*start, *given, "--checkpoint", "no.pt").refusal
    assert "model file 'no.py' does not exist" in ferry(*start, *given, "--model", "no.py:net").refusal
    assert "picture 'no.png' does not exist" in ferry(*start, *given, "--input", "no.png").refusal


@pytest.mark.parametrize(
    ("items", "fragment"),
    [
        (["picture.png", "y=1"], "no parameter 'y'"),
        (["double.npz", "z=picture.png"], "no parameter 'z'"),
        (["x=1", "picture.png"], "'picture.png' belongs to no input: all of them are named"),
    ],
)
def test_inputs_that_the_model_does_not_have(deploy, items, fragment):
    ran = deploy(inputs=items)
    assert fragment in ran.refusal
    assert ran.status == 2


def test_missing_input(deploy):
    assert "missing a required argument: 'factor'" in deploy(model="net.py:scaled").refusal


@pytest.mark.parametrize(
    ("item", "fragment"),
    [
        ("rank.npz", "RuntimeError"),
        ("channels.npz", "3 channels"),
        ("double.npz", "(double)"),
        ("text.npz", "input 'x' of dtype <U1 cannot be a tensor"),
        ("swapped.npz", "input 'x' of dtype >f4 cannot be a tensor"),
    ],
)
def test_arrays_that_the_model_does_not_take(deploy, item, fragment):
    assert fragment in deploy(inputs=[item]).refusal


@pytest.mark.parametrize(
    ("item", "fragment"),
    [
        ("rank.npz", "'x' must have 4 dimensions (x: float32[n, 3, h, w]), got 2"),
        ("channels.npz", "axis 1 of 'x' must be 3, got 2"),
        ("double.npz", "'x' must be float32, got float64"),
        ("text.npz", "'x' must be float32"),
        ("two.npz", "unknown input 'a'"),
        ("y=1", "unknown input 'y'"),
        ("x=1", "'x' must have 4 dimensions"),
    ],
)
def test_arrays_that_the_package_does_not_take(ferry, package, item, fragment):
    ran = ferry("run", package, "--input", item, "--output", "y.npz")
    assert fragment in ran.refusal
    assert ran.status == 1


@pytest.mark.parametrize(
    ("flags", "status", "fragment"),
    [
        (["--target", "onnxrutime"], 1, "unknown backend 'onnxrutime'\n  hint: did you mean 'onnxruntime'?"),
        (["--precision", "fp16"], 1, "'onnxruntime' does not compute in fp16 here; it offers fp32"),
        (["--precision", "fp17"], 2, "'targets.0.precision'"),
        (["--opset", "0"], 2, "opset must be a positive number, got 0"),
        (["--set", "targets=[{device='gpu'}]"], 1, "runs on 'cpu' here, not on 'gpu'"),
        (["--set", "targets=[]"], 2, "'targets'"),
        (["--set", "targets=[{}, {}]"], 2, "two targets are alike: onnxruntime-fp32, onnxruntime-fp32"),
        (["--set", "targets=[{}, {backend='reference', opset=18}]"], 2, "the same opset"),
        (["--dynamic", "x:2"], 2, "--dynamic 'x:2' must look like"),
        (["--dynamic", "2=h"], 2, "--dynamic '2=h' must look like"),
        (["--dynamic", "x:height=2"], 2, "must look like image:0=batch"),
        (["--dynamic", "x:7=h"], 2, "'x' has 4 dimensions, no axis 7"),
        (["--dynamic", "z:2=h"], 2, "unknown input 'z'"),
        (["--dynamic", "x:2=h=8"], 2, "'h=8' cannot name a dimension"),
        (["--dynamic", "x:2=2h"], 2, "'2h' cannot name a dimension"),
        (["--dynamic", "x:2=h,3=h"], 2, "'h' is 6 at axis 2 of 'x' but 8 at axis 3"),
        (["--set", "verify.sizes=3"], 2, "'verify.sizes'"),
        (["--set", "verify.atol"], 2, "--set 'verify.atol' must be KEY=VALUE"),
        (["--set", "verify.atol=-1"], 2, "'verify.atol'"),
        (["--budget", "relative"], 2, "--budget 'relative' must look like"),
        (["--budget", "0.01"], 2, "--budget '0.01' must look like"),
        (["--budget", "relative=1%"], 2, "'budget.relative': Input should be a valid number"),
        (["--budget", "max_abs=-1"], 2, "'budget.max_abs'"),
        (["--budget", "max_abs=nan"], 2, "'budget.max_abs'"),
        (["--budget", "maxabs=1"], 2, "unknown key 'budget.maxabs' (did you mean 'max_abs'?)"),
        (["--set", "budget={}"], 2, "'budget': needs max_abs, relative or both"),
        (["--budget", "max_abs=1", "--set", "verify.rtol=1"], 2, "'budget' and 'verify.atol' or 'verify.rtol' both"),
        (["--set", "preprocess.z={}"], 2, "no parameter 'z'"),
        (["--input-names", "a,b"], 1, "2 input names for 1 tensors"),
        (["--output-names", "a,b"], 1, "2 output names for 1 outputs"),
        (["--set", "model.arguments.depth=3"], 1, "unexpected keyword argument 'depth'"),
    ],
)
def test_flags_that_cannot_be_used(deploy, place, flags, status, fragment):
    ran = deploy(*flags)
    assert fragment in ran.refusal
    assert ran.status == status
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "required: COMMAND"),
        (["deplay"], "invalid choice: 'deplay'"),
        (["deploy", "--modell", "x:y"], "unrecognized arguments: --modell"),
        (["deploy", "--opset", "new"], "invalid int value: 'new'"),
        (["run", "somewhere"], "--input"),
        (["compile"], "MODEL.onnx"),
    ],
)
def test_usage(ferry, arguments, fragment):
    ran = ferry(*arguments)
    assert ran.status == 2
    assert fragment in ran.err
    assert "Traceback" not in ran.err


def test_nothing_given(ferry):
    refusal = ferry("deploy").refusal
    for key in ("model", "inputs", "out"):
        assert f"'{key}' is missing" in refusal


def test_what_is_not_a_package(ferry, place):
    assert "package 'nowhere' does not exist" in ferry("run", "nowhere", "--input", "x=1", "--output", "y.npz").refusal
    (place / "folder").mkdir()
    assert "it has no deploy.json" in ferry("run", "folder", "--input", "x=1", "--output", "y.npz").refusal
    assert "it has no deploy.json" in ferry("verify", "folder").refusal
