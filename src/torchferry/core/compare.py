"""Comparing two arrays with explicit tolerances, in the way that a report can show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torchferry.core.target import Precision

    Array = np.ndarray[Any, np.dtype[Any]]

HISTOGRAM_DECADES = range(-10, 2)
"""The decades of ``Comparison.histogram``: ``-10`` stands for errors from 1e-10 to below 1e-9."""


@dataclass(frozen=True)
class Tolerance:
    """Values agree where ``|actual - expected| <= atol + rtol * |expected|`` (numpy's and torch's rule).

    Attributes:
        atol: Absolute part, in the output's unit.
        rtol: Relative part.
    """

    atol: float
    rtol: float

    def __str__(self) -> str:
        return f"atol {self.atol:g}, rtol {self.rtol:g}"


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(atol=1e-4, rtol=1e-4),
    "fp16": Tolerance(atol=1e-2, rtol=1e-2),
    "bf16": Tolerance(atol=5e-2, rtol=5e-2),
    "int8": Tolerance(atol=1e-1, rtol=1e-1),
}
"""What is asked of each precision unless the user says otherwise."""


@dataclass(frozen=True)
class Comparison:
    """How far one output lies from what it should be.

    Errors are taken over the elements that are finite on both sides; everything else must match exactly.

    Attributes:
        name: The output's name.
        case: What was run: the data, or the sizes.
        shape: The shape of the actual output.
        dtype: The dtype of the actual output, numpy's name.
        passed: True if every element agrees.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        max_rel: Largest error relative to the expected value, where that is not zero.
        mismatched: Number of elements that do not agree.
        elements: Number of elements.
        tolerance: What was asked.
        reason: Why it failed, with the worst element and both values; empty if it passed.
        histogram: Number of elements whose absolute error is zero, then below 1e-10, then in each of
            ``HISTOGRAM_DECADES``, then from 1e2 up.
    """

    name: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    passed: bool
    max_abs: float
    mean_abs: float
    max_rel: float
    mismatched: int
    elements: int
    tolerance: Tolerance
    reason: str = ""
    histogram: tuple[int, ...] = ()

    def __str__(self) -> str:
        verdict = "agrees" if self.passed else f"DIFFERS: {self.reason}"
        return f"{self.name} [{self.case}] max abs {self.max_abs:.3g}, mean abs {self.mean_abs:.3g}: {verdict}"


def compare(
    expected: Array, actual: Array, tolerance: Tolerance, *, name: str = "output", case: str = ""
) -> Comparison:
    """Compare an output with what it should be.

    Shapes and dtypes must be equal. Integers and booleans must be equal. NaN must stand where NaN is expected, and an
    infinity where the same infinity is expected, whatever the tolerance.

    Args:
        expected: The reference.
        actual: The array under test.
        tolerance: See ``Tolerance``.
        name: The output's name.
        case: What was run.

    Returns:
        The figures, and whether they are within the tolerance.

    >>> compare(np.float32([1, 2]), np.float32([1, 2.5]), Tolerance(1e-4, 1e-4)).reason
    '1 of 2 elements, worst at (1,): expected 2, got 2.5'
    """

    def result(passed: bool, reason: str, **figures: Any) -> Comparison:
        zero = {"max_abs": 0.0, "mean_abs": 0.0, "max_rel": 0.0, "mismatched": 0}
        return Comparison(
            name=name, case=case, shape=actual.shape, dtype=actual.dtype.name, passed=passed, reason=reason,
            elements=actual.size, tolerance=tolerance, **{**zero, **figures},
        )  # fmt: skip

    if expected.shape != actual.shape:
        return result(False, f"shape {actual.shape}, expected {expected.shape}", mismatched=actual.size)
    if expected.dtype != actual.dtype:
        return result(False, f"dtype {actual.dtype.name}, expected {expected.dtype.name}", mismatched=actual.size)
    if actual.size == 0:
        return result(True, "")

    is_complex = expected.dtype.kind == "c"
    want, got = (array.astype(np.complex128 if is_complex else np.float64) for array in (expected, actual))
    finite = np.isfinite(want) & np.isfinite(got)
    same_special = _same(want.real, got.real) & _same(want.imag, got.imag) if is_complex else _same(want, got)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(finite, np.abs(got - want), np.where(same_special, 0.0, np.inf))
    exact = "int" in expected.dtype.name or expected.dtype.kind == "b"
    if exact:
        agree = expected == actual
    else:
        allowed = tolerance.atol + tolerance.rtol * np.abs(np.where(finite, want, 0))
        agree = np.where(finite, error <= allowed, same_special)
    bad = int(agree.size - np.count_nonzero(agree))
    figures: dict[str, Any] = {"mismatched": bad}
    within = error[finite]
    if within.size:
        scale = np.abs(want[finite])
        with np.errstate(over="ignore"):
            relative = within[scale > 0] / scale[scale > 0]
        figures |= {
            "max_abs": float(within.max()),
            "mean_abs": float(within.mean()),
            "max_rel": float(relative.max()) if relative.size else 0.0,
            "histogram": _histogram(within),
        }
    reason = ""
    if bad:
        excess = np.where(agree, -1.0, error)
        worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
        at = tuple(int(i) for i in worst)
        shown = [str(a[worst]) if exact else f"{a[worst].item():.7g}" for a in (expected, actual)]
        reason = f"{bad} of {agree.size} elements, worst at {at}: expected {shown[0]}, got {shown[1]}"
        special = int(np.count_nonzero(~finite & ~same_special))
        if special:
            reason += f"; {special} with NaN or Inf on one side only"
    return result(bad == 0, reason, **figures)


def _same(want: Array, got: Array) -> Array:
    same: Array = (np.isnan(want) & np.isnan(got)) | (want == got)
    return same


def _histogram(error: Array) -> tuple[int, ...]:
    positive = error[error > 0]
    first, last = HISTOGRAM_DECADES.start, HISTOGRAM_DECADES.stop
    decade = np.clip(np.floor(np.log10(positive)), first - 1, last).astype(np.int64)
    counts = np.bincount(decade - (first - 1), minlength=last - first + 2)
    return (int(error.size - positive.size), *(int(n) for n in counts))
