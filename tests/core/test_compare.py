"""Comparing arrays: numpy's rule on finite floats, exact on everything else."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from torchferry.core.compare import TOLERANCES, Budget, Tolerance, compare
from torchferry.core.errors import ConfigError

LOOSE = Tolerance(1e40, 1)  # holds every pair of finite float32
EXACT = Tolerance(0, 0)
nan, inf = np.nan, np.inf


def pairs(**floats: object) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Two arrays of one shape and dtype, often equal or close."""

    def build(dtype_and_shape: tuple[np.dtype, tuple[int, ...]]) -> st.SearchStrategy:
        dtype, shape = dtype_and_shape
        values = st.floats(width=8 * dtype.itemsize, **floats) | st.sampled_from([0.0, 1.0, 1.0009765625, -1.0])
        array = npst.arrays(dtype, shape, elements=values)
        return st.tuples(array, array)

    dtypes = st.sampled_from([np.dtype("float16"), np.dtype("float32")])
    return st.tuples(dtypes, npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)).flatmap(build)


@given(
    pair=pairs(allow_nan=False, allow_infinity=False),
    tolerance=st.builds(Tolerance, st.sampled_from([0, 1e-6, 1e-3, 1]), st.sampled_from([0, 1e-6, 1e-3, 1])),
)
def test_agrees_with_numpy_on_finite_floats(pair: tuple[np.ndarray, np.ndarray], tolerance: Tolerance) -> None:
    expected, actual = pair
    want, got = expected.astype(np.float64), actual.astype(np.float64)
    close = np.isclose(got, want, rtol=tolerance.rtol, atol=tolerance.atol)
    result = compare(expected, actual, tolerance)
    assert result.passed == bool(close.all()) == (result.reason == "")
    assert result.mismatched == np.count_nonzero(~close)
    assert result.max_abs == np.abs(got - want).max(initial=0)
    assert result.mean_abs == (pytest.approx(np.abs(got - want).mean()) if want.size else 0)
    assert (result.shape, result.dtype, result.elements) == (actual.shape, actual.dtype.name, actual.size)


@given(pair=pairs())
def test_specials_must_match_and_the_histogram_holds_the_finite_elements(pair: tuple[np.ndarray, np.ndarray]) -> None:
    expected, actual = pair
    result = compare(expected, actual, LOOSE)
    finite = np.isfinite(expected) & np.isfinite(actual)
    same = np.isclose(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert result.mismatched == np.count_nonzero(~finite & ~same)
    assert sum(result.histogram) == np.count_nonzero(finite)
    assert all(np.isfinite([result.max_abs, result.mean_abs, result.max_rel]))


@pytest.mark.parametrize(
    ("expected", "actual"),
    [(1, nan), (nan, 1), (1, inf), (inf, 1), (inf, -inf), (-inf, inf), (nan, inf), (inf, nan)],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, ml_dtypes.bfloat16])
def test_a_special_on_one_side_fails_whatever_the_tolerance(expected: float, actual: float, dtype: type) -> None:
    want, got = (np.array([0, value, 0], dtype) for value in (expected, actual))
    result = compare(want, got, LOOSE, name="y")
    assert not result.passed
    assert result.mismatched == 1
    assert "(1,)" in result.reason
    assert "1 with NaN or Inf on one side only" in result.reason
    assert "DIFFERS" in str(result)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (complex(nan, 1), complex(nan, 2)),
        (complex(1, nan), complex(nan, 1)),
        (complex(inf, 1), complex(inf, nan)),
        (complex(inf, 0), complex(0, inf)),
    ],
)
def test_both_parts_of_a_complex_special_must_match(expected: complex, actual: complex) -> None:
    want, got = (np.array([value], np.complex64) for value in (expected, actual))
    assert compare(want, want.copy(), EXACT).passed
    assert not compare(want, got, LOOSE).passed


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_the_same_specials_agree(dtype: type) -> None:
    array = np.array([nan, inf, -inf, 1], dtype)
    result = compare(array, array.copy(), EXACT)
    assert result.passed
    assert sum(result.histogram) == 1


@pytest.mark.parametrize(
    ("dtype", "expected", "actual"),
    [
        (np.int8, 1, 2),
        (np.int64, 2**62, 2**62 + 1),  # equal once they are float64
        (np.uint64, 2**64 - 1, 2**64 - 2),
        (np.uint8, 255, 0),
        (np.bool_, True, False),
        (ml_dtypes.int4, 1, 2),
        (ml_dtypes.uint4, 1, 2),
    ],
)
def test_whole_numbers_and_booleans_are_exact(dtype: type, expected: object, actual: object) -> None:
    want, got = (np.array([0, value], dtype) for value in (expected, actual))
    result = compare(want, got, LOOSE)
    assert not result.passed
    assert result.mismatched == 1
    assert f"worst at (1,): expected {expected}, got {actual}" in result.reason
    assert compare(want, want.copy(), EXACT).passed


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.complex128, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_tolerance_applies_to_every_kind_of_float(dtype: type) -> None:
    want, got = np.array([1, 2], dtype), np.array([1, 2.5], dtype)
    assert compare(want, got, Tolerance(0.5, 0)).passed
    assert compare(want, got, Tolerance(0, 0.25)).passed
    result = compare(want, got, Tolerance(0.4, 0))
    assert not result.passed
    assert (result.max_abs, result.mean_abs, result.max_rel, result.mismatched) == (0.5, 0.25, 0.25, 1)
    assert result.relative == pytest.approx(0.5 / 5**0.5)
    assert "worst at (1,)" in result.reason


@pytest.mark.parametrize(
    ("expected", "actual", "words"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), ["(3, 2)", "(2, 3)"]),
        (np.zeros((0, 3)), np.zeros((0, 4)), ["(0, 4)", "(0, 3)"]),
        (np.zeros(()), np.zeros(1), ["(1,)", "()"]),
        (np.zeros(2, np.float32), np.zeros(2), ["float64", "float32"]),
        (np.zeros(2, ml_dtypes.bfloat16), np.zeros(2, np.float16), ["float16", "bfloat16"]),
        (np.zeros(0, np.int32), np.zeros(0, np.int64), ["int64", "int32"]),
    ],
)
def test_another_shape_or_dtype_fails(expected: np.ndarray, actual: np.ndarray, words: list[str]) -> None:
    result = compare(expected, actual, LOOSE)
    assert not result.passed
    assert result.mismatched == actual.size
    assert all(word in result.reason for word in words)


def test_empty_arrays_agree() -> None:
    result = compare(np.zeros((0, 3)), np.zeros((0, 3)), EXACT, name="boxes", case="nothing seen")
    assert result.passed
    assert (result.elements, result.histogram) == (0, ())
    assert str(result) == "boxes [nothing seen] max abs 0, mean abs 0, relative 0: agrees"


def test_a_scalar_is_compared() -> None:
    result = compare(np.array(1.0), np.array(2.0), EXACT)
    assert result.reason == "1 of 1 elements, worst at (): expected 1, got 2"


def test_the_reference_is_the_expected_side() -> None:
    small, large = np.array([1.0]), np.array([2.0])
    assert compare(large, small, Tolerance(0, 0.5)).passed
    assert not compare(small, large, Tolerance(0, 0.5)).passed


def test_extreme_values_give_figures_without_a_warning() -> None:
    huge = np.finfo(np.float64).max
    result = compare(np.array([1e-300, huge]), np.array([1e300, -huge]), EXACT)
    assert result.mismatched == 2
    assert (result.max_abs, result.max_rel, result.relative) == (inf, inf, inf)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (0, 0),
        (1e-300, 1),
        (9.9e-11, 1),
        (1e-10, 2),
        (9.9e-10, 2),
        (1e-9, 3),
        (3e-5, 7),
        (1, 12),
        (50, 13),
        (100, 14),
        (500, 14),
        (5e3, 14),
    ],
)
def test_histogram_has_zero_below_twelve_decades_and_above(error: float, place: int) -> None:
    counts = compare(np.zeros(3), np.array([0.0, error, 0.0]), LOOSE).histogram
    assert len(counts) == 15
    expected = [0] * 15
    expected[0] += 2
    expected[place] += 1
    assert list(counts) == expected


def test_inputs_are_not_changed() -> None:
    want, got = np.array([1, nan]), np.array([2.0, 3.0])
    compare(want, got, TOLERANCES["fp32"])
    assert want[0] == 1
    assert np.isnan(want[1])
    assert got.tolist() == [2, 3]


@given(pair=pairs(allow_nan=False, allow_infinity=False), limit=st.sampled_from([0, 1e-6, 1e-3, 1]))
def test_a_budget_of_the_largest_error_is_an_absolute_tolerance(
    pair: tuple[np.ndarray, np.ndarray], limit: float
) -> None:
    budget, tolerance = (compare(*pair, asked) for asked in (Budget(max_abs=limit), Tolerance(limit, 0)))
    assert (budget.passed, budget.mismatched, budget.reason) == (
        tolerance.passed,
        tolerance.mismatched,
        tolerance.reason,
    )


@given(pair=pairs(allow_nan=False, allow_infinity=False))
def test_a_relative_budget_is_about_the_whole_output(pair: tuple[np.ndarray, np.ndarray]) -> None:
    want, got = (array.astype(np.longdouble) for array in pair)  # where no square of a float32 overflows or vanishes
    error, size = np.sqrt(((got - want) ** 2).sum()), np.sqrt((want**2).sum())
    relative = float(error / size) if size else float(inf if error else 0)
    result = compare(*pair, Budget(relative=0.5))
    assert result.relative == pytest.approx(relative, rel=1e-6)
    assert result.passed == (result.relative <= 0.5) == (result.reason == "")


def test_a_budget_says_what_was_too_much() -> None:
    want, got = np.float32([3, 4, 0]), np.float32([3, 4, 1])
    assert compare(want, got, Budget(relative=0.2)).passed
    relative = compare(want, got, Budget(relative=0.1))
    assert relative.reason == "relative error 0.2, allowed 0.1, worst at (2,): expected 0, got 1"
    assert relative.mismatched == 0
    both = compare(want, got, Budget(max_abs=0.5, relative=0.1))
    assert both.reason.startswith("relative error 0.2, allowed 0.1; 1 of 3 elements, worst at (2,)")
    assert not compare(want, got, Budget(max_abs=0.5, relative=1)).passed
    assert not compare(want, got, Budget(max_abs=2, relative=0.1)).passed


def test_a_budget_says_nothing_of_specials_and_whole_numbers() -> None:
    wide = Budget(relative=1e9)
    assert compare(np.float32([nan, inf, 1]), np.float32([nan, inf, 2]), wide).passed
    assert not compare(np.float32([nan, 1]), np.float32([0, 1]), wide).passed
    assert not compare(np.float32([nan]), np.float32([inf]), wide).passed
    assert not compare(np.int64([1, 2]), np.int64([1, 3]), wide).passed
    assert compare(np.zeros((0, 3)), np.zeros((0, 3)), Budget(relative=0)).passed


@pytest.mark.parametrize(
    "limits", [{}, {"max_abs": -1}, {"relative": nan}, {"max_abs": inf}, {"max_abs": 1, "relative": "1%"}]
)
def test_a_budget_of_nonsense(limits: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget(**limits)
