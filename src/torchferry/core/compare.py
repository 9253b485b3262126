"""Comparing two arrays with explicit tolerances, in the way that a report can show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.errors import ConfigError

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


@dataclass(frozen=True)
class Budget:
    """The error that an output may have as a whole, whatever the precision that it was computed in.

    Attributes:
        max_abs: The largest absolute error of any element, in the output's unit; None for no limit.
        relative: The L2 norm of the error ÷ that of the expected output, so that 0.01 is one percent; None for no
            limit.

    Raises:
        ConfigError: If neither is given, or one is not a finite number from 0 up.

    >>> str(Budget(relative=0.01))
    'budget relative 0.01'
    """

    max_abs: float | None = None
    relative: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ConfigError("a budget needs max_abs, relative or both")
        for name, value in given.items():
            if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
                raise ConfigError(f"{name} of a budget must be a finite number from 0 up, got {value!r}")

    def __str__(self) -> str:
        limits = [f"{name} {value:g}" for name, value in vars(self).items() if value is not None]
        return f"budget {', '.join(limits)}"


Criterion = Tolerance | Budget
"""What may be asked of an output."""

TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(atol=1e-4, rtol=1e-4),
    "fp16": Tolerance(atol=1e-2, rtol=1e-2),
    "bf16": Tolerance(atol=5e-2, rtol=5e-2),
}
"""What is asked of a precision unless the user says otherwise; int8 has none, for its error is the model's own."""


def usual_tolerance(precision: Precision) -> Tolerance:
    """Return what is asked of a precision where the user does not say.

    Raises:
        ConfigError: For int8, whose error depends on the model and the data.
    """
    if precision not in TOLERANCES:
        raise ConfigError(
            f"{precision} has no usual tolerance: how much error is allowed has to be said",
            hint="give a budget: --budget relative=0.05 (the L2 error, here 5 percent), in Python "
            "ferry.Budget(relative=0.05)",
        )
    return TOLERANCES[precision]


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
        relative: L2 norm of the error ÷ that of the expected output; 0 where both are, infinite where only the latter
            is.
        mismatched: Number of elements that do not agree; none of them decides about a relative budget.
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
    relative: float
    mismatched: int
    elements: int
    tolerance: Criterion
    reason: str = ""
    histogram: tuple[int, ...] = ()

    def __str__(self) -> str:
        verdict = "agrees" if self.passed else f"DIFFERS: {self.reason}"
        figures = f"max abs {self.max_abs:.3g}, mean abs {self.mean_abs:.3g}, relative {self.relative:.3g}"
        return f"{self.name} [{self.case}] {figures}: {verdict}"


def compare(
    expected: Array, actual: Array, tolerance: Criterion, *, name: str = "output", case: str = ""
) -> Comparison:
    """Compare an output with what it should be.

    Shapes and dtypes must be equal. Integers and booleans must be equal. NaN must stand where NaN is expected, and an
    infinity where the same infinity is expected, whatever the tolerance.

    Args:
        expected: The reference.
        actual: The array under test.
        tolerance: See ``Tolerance`` and ``Budget``.
        name: The output's name.
        case: What was run.

    Returns:
        The figures, and whether they are within the tolerance.

    >>> compare(np.float32([1, 2]), np.float32([1, 2.5]), Tolerance(1e-4, 1e-4)).reason
    '1 of 2 elements, worst at (1,): expected 2, got 2.5'
    """

    def result(passed: bool, reason: str, **figures: Any) -> Comparison:
        zero = {"max_abs": 0.0, "mean_abs": 0.0, "max_rel": 0.0, "relative": 0.0, "mismatched": 0}
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
        agree = np.where(finite, error <= _allowed(tolerance, np.where(finite, want, 0)), same_special)
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
            "relative": _relative(within, scale),
            "histogram": _histogram(within),
        }
    limit = tolerance.relative if isinstance(tolerance, Budget) and not exact else None
    beyond = limit is not None and figures.get("relative", 0.0) > limit
    reason = f"relative error {figures['relative']:.3g}, allowed {limit:g}" if beyond else ""
    if bad or beyond:
        excess = np.where(agree, -1.0, error) if bad else error
        worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
        at = tuple(int(i) for i in worst)
        shown = [str(a[worst]) if exact else f"{a[worst].item():.7g}" for a in (expected, actual)]
        counted = f"{bad} of {agree.size} elements" if bad else ""
        reason = "; ".join(filter(None, (reason, counted))) + f", worst at {at}: expected {shown[0]}, got {shown[1]}"
        special = int(np.count_nonzero(~finite & ~same_special))
        if special:
            reason += f"; {special} with NaN or Inf on one side only"
    return result(not reason, reason, **figures)


def _allowed(tolerance: Criterion, want: Array) -> Array | float:
    if isinstance(tolerance, Budget):
        return math.inf if tolerance.max_abs is None else tolerance.max_abs
    allowed: Array = tolerance.atol + tolerance.rtol * np.abs(want)
    return allowed


def _relative(error: Array, size: Array) -> float:
    """Return the quotient of two L2 norms, of which no square overflows or vanishes."""
    largest, most = float(error.max()), float(size.max())
    if largest == 0:
        return 0.0
    if most == 0 or not math.isfinite(largest):
        return math.inf
    quotient = np.linalg.norm(error / largest) / np.linalg.norm(size / most)
    return float(quotient) * largest / most


def _same(want: Array, got: Array) -> Array:
    same: Array = (np.isnan(want) & np.isnan(got)) | (want == got)
    return same


def _histogram(error: Array) -> tuple[int, ...]:
    positive = error[error > 0]
    first, last = HISTOGRAM_DECADES.start, HISTOGRAM_DECADES.stop
    decade = np.clip(np.floor(np.log10(positive)), first - 1, last).astype(np.int64)
    counts = np.bincount(decade - (first - 1), minlength=last - first + 2)
    return (int(error.size - positive.size), *(int(n) for n in counts))
