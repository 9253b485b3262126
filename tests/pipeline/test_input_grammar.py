"""What ``--input`` may say."""

import numpy as np
import pytest
from PIL import Image

from torchferry.core.errors import ConfigError, FormatError, MissingFileError
from torchferry.package import Preprocess
from torchferry.pipeline.inputs import read_inputs

RED = np.float32([1, 0, 0])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 2), (255, 0, 0)).save("red.png")
    Image.new("RGB", (3, 5), (0, 0, 255)).save("blue.jpg", quality=100)
    np.save("ramp.npy", np.arange(6, dtype=np.int64).reshape(2, 3))
    np.savez("one.npz", anything=np.float32([7]))
    np.savez("both.npz", image=np.zeros((1, 3, 2, 2), np.float32), factor=np.float32([2]))
    return tmp_path


def _read(*items, names=("image", "factor"), how=None, aliases=None):
    return read_inputs(items, names, how or {}, aliases)


def test_a_picture_without_a_name_belongs_to_the_first_input_that_no_other_item_names(place):
    for items, name in (
        (["red.png"], "image"),
        (["red.png", "image=1"], "factor"),
        (["factor=1", "red.png"], "image"),
    ):
        data = _read(*items)
        assert data.pictures == (name,)
        [array] = data.arrays[name]
        assert (array.shape, array.dtype) == ((1, 3, 2, 4), np.float32)
        np.testing.assert_array_equal(array[0, :, 0, 0], RED)


def test_a_picture_is_made_as_declared(place):
    how = {"image": Preprocess(channels="BGR", layout="NHWC", scale=1.0)}
    [array] = _read("image=red.png", how=how).arrays["image"]
    assert array.shape == (1, 2, 4, 3)
    np.testing.assert_array_equal(array[0, 0, 0], [0, 0, 255])


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("factor=1,1,3,3", np.float32([1, 1, 3, 3])),
        ("factor=2", np.float32([2])),
        ("factor=1.5,-2e-3", np.float32([1.5, -2e-3])),
        ("factor= 1, 2", np.float32([1, 2])),
        ("factor=64,65:int64", np.int64([64, 65])),
        ("factor=9007199254740993:int64", np.int64([9007199254740993])),
        ("factor=1,0:bool", np.array([True, False])),
        ("factor=255:uint8", np.uint8([255])),
        ("factor=0.1:float64", np.float64([0.1])),
        ("factor=nan,inf", np.float32([np.nan, np.inf])),
        ("factor=ramp.npy", np.arange(6, dtype=np.int64).reshape(2, 3)),
        ("factor=one.npz", np.float32([7])),
        ("factor=both.npz", np.float32([2])),
    ],
)
def test_a_named_array(place, item, expected):
    data = _read(item)
    assert data.pictures == ()
    [array] = data.arrays["factor"]
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_an_npz_without_a_name_names_its_own(place):
    data = _read("both.npz")
    assert {name: values[0].shape for name, values in data.arrays.items()} == {"image": (1, 3, 2, 2), "factor": (1,)}


@pytest.mark.parametrize("items", [["x=red.png", "f=3"], ["image=red.png", "factor=3"]])
def test_other_names(place, items):
    data = _read(*items, aliases={"x": "image", "f": "factor"})
    assert data.arrays.keys() == {"image", "factor"}
    assert data.pictures == ("image",)


def test_other_names_inside_an_npz(place):
    data = _read("both.npz", names=("x", "f"), aliases={"image": "x", "factor": "f"})
    assert data.arrays.keys() == {"x", "f"}


def test_several_pictures_are_several_sets_and_what_is_given_once_serves_all(place):
    calls = _read("red.png", "blue.jpg", "factor=3").calls()
    assert [call["image"].shape for call in calls] == [(1, 3, 2, 4), (1, 3, 5, 3)]
    assert [call["factor"].tolist() for call in calls] == [[3], [3]]


def test_several_of_each_are_taken_side_by_side(place):
    calls = _read("image=red.png", "image=blue.jpg", "factor=3", "factor=4").calls()
    assert [(call["image"].shape[2], call["factor"].item()) for call in calls] == [(2, 3.0), (5, 4.0)]


def test_unequally_many_are_refused(place):
    data = _read("image=red.png", "image=blue.jpg", "image=red.png", "factor=3", "factor=4")
    with pytest.raises(ConfigError, match="'image' 3 times, 'factor' 2 times"):
        data.calls()


@pytest.mark.parametrize("item", ["a=b.png", "image=a=b.png"])
def test_an_equals_sign_in_a_file_name(place, item):
    (place / "red.png").rename(place / "a=b.png")
    assert _read(item).pictures == ("image",)


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (["image=1", "factor=2", "red.png"], ConfigError, "'red.png' belongs to no input"),
        (["factor=one.png"], MissingFileError, "picture 'one.png' does not exist"),
        (["factor="], MissingFileError, "is a folder"),
        (["none.npz"], MissingFileError, "input 'none.npz' does not exist"),
        (["image=1,x"], MissingFileError, "picture '1,x' does not exist"),
        (["image=1:complex64"], ConfigError, "unknown dtype 'complex64'"),
        (["image=1:float23"], ConfigError, "unknown dtype 'float23'"),
        (["image=0.5:int32"], ConfigError, "int32 cannot hold"),
        (["image=-1:uint8"], ConfigError, "uint8 cannot hold"),
        (["image=2:bool"], ConfigError, "bool cannot hold"),
        ([f"image={10**30}:int64"], ConfigError, "int64 cannot hold"),
        (["image=ramp.npy", "factor=none.npy"], MissingFileError, "input 'none.npy' does not exist"),
    ],
)
def test_refused(place, items, error, message):
    with pytest.raises(error, match=message):
        _read(*items)


def test_nothing_in_an_array_file_is_run(place):
    class Payload:
        def __reduce__(self):
            return (place / "ran").touch, ()

    for name in ("evil.npy", "evil.npz"):
        save = np.save if name.endswith("y") else np.savez
        save(name, np.array([Payload()], object), allow_pickle=True)
        with pytest.raises(FormatError, match=f"'{name}' is not a whole"):
            _read(f"image={name}")
    assert not (place / "ran").exists()
