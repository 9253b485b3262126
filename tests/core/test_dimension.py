"""Dimensions as users write them."""

import pytest

from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch", Dimension("batch")),
        ("batch=1..8", Dimension("batch", 1, 8)),
        ("batch=1..4..8", Dimension("batch", 1, 8, opt=4)),
        ("h=5..5..5", Dimension("h", 5, 5, opt=5)),
        ("of another=tool=0..3", Dimension("of another=tool", 0, 3)),
        ("batch=1-8", Dimension("batch=1-8")),
    ],
)
def test_what_is_read_is_written_again(text: str, expected: Dimension) -> None:
    assert Dimension.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["batch=8..1", "batch=1..9..8", "batch=2..1..8"])
def test_sizes_must_rise(text: str) -> None:
    with pytest.raises(ConfigError, match="sizes of 'batch' must rise.*got min"):
        Dimension.parse(text)


def test_half_a_range() -> None:
    assert (str(Dimension("n", min=3)), str(Dimension("n", max=3)), str(Dimension("n", opt=3))) == (
        "n=3..",
        "n=..3",
        "n=..3..",
    )
    assert 3 in Dimension("n", min=3)
    assert 4 not in Dimension("n", max=3)
