"""Signatures: every input that the graph was not exported for is refused, and named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError, InputError
from torchferry.core.signature import DimRange, Relation, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(
        TensorSpec("image", "float32", ("batch", 3, "height", None)),
        TensorSpec("twice", "int64", ("2*batch", "height")),
        TensorSpec("scale", "float32", ()),
        TensorSpec("extra", "bool", None),
    ),
    outputs=(TensorSpec("big", "float32", ("batch", 3, "3*height", None)), TensorSpec("any", "float32", None)),
    dims={
        "batch": DimRange(min=1, max=8, excluded={4: "PyTorch and the graph differ there"}, where="net.py:7: if b > 8"),
        "height": DimRange(min=2),
    },
    relations=(
        Relation("height % 4 == 0", where="net.py:9: x.view(4, -1)"),
        Relation("height > batch"),
    ),
)


def arrays(batch: int = 2, height: int = 8, **changed: object) -> dict[str, object]:
    good = {
        "image": np.zeros((batch, 3, height, 5), np.float32),
        "twice": np.zeros((2 * batch, height), np.int64),
        "scale": np.zeros((), np.float32),
        "extra": np.zeros((1, 2), np.bool_),
    }
    return {name: value for name, value in {**good, **changed}.items() if value is not None}


def test_good_arrays_give_their_sizes() -> None:
    assert SIGNATURE.check(arrays()) == {"batch": 2, "height": 8}
    assert SIGNATURE.input_names == ("image", "twice", "scale", "extra")
    assert SIGNATURE.output_names == ("big", "any")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": None}, ["input 'image' is missing", "image, twice, scale, extra"]),
        ({"imag": np.zeros(1)}, ["unknown input 'imag'", "did you mean 'image'?"]),
        ({"image": [[1.0]]}, ["'image' must be a numpy array", "list"]),
        ({"image": np.zeros((2, 3, 8, 5))}, ["'image' must be float32, got float64", "astype('float32')"]),
        ({"twice": np.zeros((4, 8), np.int32)}, ["'twice' must be int64, got int32"]),
        ({"image": np.zeros((2, 3, 8, 5), ">f4")}, ["'image'"]),
        ({"image": np.zeros((3, 8, 5), np.float32)}, ["'image' must have 4 dimensions", "got 3", "(3, 8, 5)"]),
        ({"scale": np.zeros(1, np.float32)}, ["'scale' must have 0 dimensions", "got 1"]),
        ({"image": np.zeros((2, 4, 8, 5), np.float32)}, ["axis 1 of 'image' must be 3, got 4"]),
        ({"twice": np.zeros((4, 9), np.int64)}, ["'height' is 8 at axis 2 of 'image' but 9 at axis 1 of 'twice'"]),
        ({"twice": np.zeros((5, 8), np.int64)}, ["axis 0 of 'twice' must be 2*batch = 4, got 5"]),
    ],
)
def test_a_bad_array_is_refused_and_named(changed: dict[str, object], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        SIGNATURE.check(arrays(**changed))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "height", "words"),
    [
        (0, 8, ["'batch' = 0", "batch: 1..8 without 4", "net.py:7"]),
        (9, 8, ["'batch' = 9", "net.py:7"]),
        (4, 8, ["'batch' = 4", "PyTorch and the graph differ there"]),
        (1, 1, ["'height' = 1", "height: 2.."]),
        (1, 6, ["{'height': 6}", "'height % 4 == 0'", "net.py:9"]),
        (5, 4, ["{'batch': 5, 'height': 4}", "'height > batch'"]),
    ],
)
def test_sizes_outside_the_exported_ones_are_refused(batch: int, height: int, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        SIGNATURE.check(arrays(batch, height))
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(InputError):
        SIGNATURE.check_sizes({"batch": batch, "height": height})


@pytest.mark.parametrize("expression", ["8 % n == 0", "sqrt(n - 1) >= 0", "int(1e308 * 10**8) > n"])
def test_a_relation_that_is_undefined_does_not_hold(expression: str) -> None:
    assert not Relation(expression).holds({"n": 0})


@given(
    low=st.integers(0, 9),
    high=st.none() | st.integers(0, 9),
    excluded=st.dictionaries(st.integers(0, 9), st.text(max_size=3)),
    size=st.integers(0, 10),
)
def test_range(low: int, high: int | None, excluded: dict[int, str], size: int) -> None:
    allowed = DimRange(low, high, excluded)
    expected = size in set(range(low, 11 if high is None else high + 1)) - set(excluded)
    assert (size in allowed) == expected


def test_text() -> None:
    assert [str(spec) for spec in SIGNATURE.inputs] == [
        "image: float32[batch, 3, height, ?]",
        "twice: int64[2*batch, height]",
        "scale: float32[]",
        "extra: bool[...]",
    ]
    assert str(DimRange(2, None, {0: "", 1: "", 3: ""})) == "2.. without 3"


def test_json_round_trip() -> None:
    again = Signature.from_json(SIGNATURE.to_json())
    assert again == SIGNATURE
    assert again.inputs[0].shape == ("batch", 3, "height", None)
    assert 4 not in again.dims["batch"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"inputs": [{"name": 1}], "outputs": []}', SIGNATURE.to_json()[:-1]])
def test_other_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Signature.from_json(text)


class TestNarrowed:
    signature = Signature((TensorSpec("x", "float32", ("n", "m")),), (), {"n": DimRange(2), "m": DimRange(1, 8)})

    def test_both_ends_move_inwards_only(self):
        narrowed = self.signature.narrowed(map(Dimension.parse, ("n=1..16", "m=3..4..99")))
        assert narrowed.dims == {"n": DimRange(2, 16), "m": DimRange(3, 8, opt=4)}
        assert self.signature.dims["n"].max is None

    @pytest.mark.parametrize(
        ("wanted", "message"), [("k=1..2", "no dynamic dimension 'k'"), ("m=9..12", "no size of 'm' is in m=9..12")]
    )
    def test_what_leaves_nothing_is_refused(self, wanted, message):
        with pytest.raises(ConfigError, match=message):
            self.signature.narrowed([Dimension.parse(wanted)])


class TestUsualSizes:
    def test_they_come_with_the_smallest_and_the_largest(self):
        dims = {"n": DimRange(1, 8, opt=4), "h": DimRange(16, 16, opt=16), "w": DimRange(2), "k": DimRange(0, opt=5)}
        profile = Signature((), (), dims).profile()
        assert profile == [{"n": 1, "h": 16, "k": 5}, {"n": 4, "h": 16, "k": 5}, {"n": 8, "h": 16, "k": 5}]
        assert Signature((), (), {"n": DimRange(1, 8)}).profile() == []
        assert Signature((), (), {"n": DimRange(4, 4, opt=4)}).profile() == [{"n": 4}]

    def test_they_are_kept_and_shown(self):
        signature = Signature((TensorSpec("x", "float32", ("n",)),), (), {"n": DimRange(1, 8, opt=4)})
        assert Signature.from_json(signature.to_json()) == signature
        assert str(signature.dims["n"]) == "1..4..8"
