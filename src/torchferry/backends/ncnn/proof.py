"""The engine against the graph, at several sizes: pnnx and ncnn may both be wrong without a word."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.backends.trial_run import sizes_to_try
from torchferry.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from torchferry.core.engine import Array
    from torchferry.core.signature import Signature

_TOLERANCE = 1e-3  # of the largest number of an output; what is wrong in kind is off by far more
_LARGER = 7  # how much larger pictures' sides are where the graph fails at the usual ones
_HINT = "export it with fixed sizes, leave the operator out with `torchferry partition`, or use another backend"


@dataclass(frozen=True)
class Case:
    """What the graph gives for random numbers at certain sizes.

    Attributes:
        sizes: Of the named dimensions.
        feeds: For every input, in order.
        expected: For every output, in order, from onnx's evaluator.
    """

    sizes: dict[str, int]
    feeds: tuple[Array, ...]
    expected: tuple[Array, ...]


def make_cases(model: ir.Model, signature: Signature) -> list[Case]:
    """Run the graph in onnx's evaluator, at sizes of our choice.

    Args:
        model: The graph; its inputs and outputs are those of the signature, in order.
        signature: Names, shapes and ranges.

    Raises:
        BackendError: If the graph itself fails at one of them, which ncnn would not notice.
    """
    evaluator = _evaluator(model)
    try:
        return [_case(evaluator, signature, sizes, seed) for seed, sizes in enumerate(sizes_to_try(signature))]
    except BackendError:
        larger = sizes_to_try(signature, _LARGER)
        if larger == sizes_to_try(signature):
            raise
    return [_case(evaluator, signature, sizes, seed) for seed, sizes in enumerate(larger)]


def _evaluator(model: ir.Model) -> Any:
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    try:
        return ReferenceEvaluator(ir.to_proto(model))
    except Exception as exc:
        raise BackendError(
            f"onnx's evaluator, which ncnn is compared with, cannot load the graph: {type(exc).__name__}: {exc}"
        ) from exc


def _case(evaluator: Any, signature: Signature, sizes: dict[str, int], seed: int) -> Case:
    feeds = tuple(_feeds(signature, sizes, seed))
    return Case(sizes, feeds, _reference(evaluator, sizes, feeds))


def prove(cases: Sequence[Case], signature: Signature, folder: Path, scratch: Path) -> None:
    """Run the engine in a process of its own and compare it with the graph.

    Args:
        cases: From ``make_cases``.
        signature: The same.
        folder: The engine's.
        scratch: A folder for arrays.

    Raises:
        BackendError: If the engine crashes, fails or differs.
    """
    (scratch / "signature.json").write_text(signature.to_json())
    given: dict[str, Any] = {f"{n}/{place}": a for n, case in enumerate(cases) for place, a in enumerate(case.feeds)}
    np.savez(scratch / "in.npz", **given)
    command = [sys.executable, "-m", "torchferry.backends.ncnn.once", str(folder), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise BackendError(
            f"ncnn breaks while running the graph: {last}", hint="export it with fixed sizes, or use another backend"
        )
    with np.load(scratch / "out.npz") as file:
        got = dict(file)
    for number, case in enumerate(cases):
        if f"{number}/error" in got:
            raise BackendError(f"{got[f'{number}/error']}{_at(case.sizes)}", hint=_HINT)
        for place, (spec, want) in enumerate(zip(signature.outputs, case.expected, strict=True)):
            problem = _problem(want, got[f"{number}/{place}"])
            if problem:
                wrong = f"ncnn gives wrong numbers for '{spec.name}'{_at(case.sizes)}: {problem}"
                raise BackendError(wrong, hint=_HINT)


def _feeds(signature: Signature, sizes: dict[str, int], seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    for spec in signature.inputs:
        shape = [size or 1 for size in spec.shape_at(sizes) or ()]
        # Numbers above zero now and then, for graphs that take roots or logarithms.
        yield rng.random(shape, np.float32) if seed % 2 else rng.standard_normal(shape, np.float32)


def _reference(evaluator: Any, sizes: dict[str, int], feeds: Sequence[Array]) -> tuple[Array, ...]:
    try:
        with np.errstate(all="ignore"):
            outputs = evaluator.run(None, dict(zip(evaluator.input_names, feeds, strict=True)))
    except Exception as exc:
        reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
        raise BackendError(
            f"the graph itself fails{_at(sizes)} ({reason}), and ncnn would not notice",
            hint="give the dimensions the ranges in which it is right, or fixed sizes",
        ) from exc
    return tuple(np.asarray(output) for output in outputs)


def _problem(want: Array, got: Array) -> str:
    if want.shape != got.shape:
        return f"the shape is {list(got.shape)}, expected {list(want.shape)}"
    finite = np.isfinite(want)
    if not np.array_equal(want[~finite], got[~finite], equal_nan=True):
        return "it gives numbers in place of NaN or infinities"
    if not finite.any():
        return ""
    scale = float(np.abs(want[finite]).max())
    error = np.abs(got[finite] - want[finite])
    worst = float(error.max()) if np.isfinite(error).all() else float("nan")
    if worst <= _TOLERANCE * max(scale, 1e-3):
        return ""
    return f"off by {worst:.3g}, the largest number being {scale:.3g}"


def _at(sizes: dict[str, int]) -> str:
    return f" at {', '.join(f'{name}={size}' for name, size in sizes.items())}" if sizes else ""
