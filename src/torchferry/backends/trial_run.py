"""Running an engine once on made-up inputs, at sizes that its graph admits: some fail only then."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchferry.core.errors import BackendError, InputError, TorchferryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.core.engine import Array, Backend, Engine, Graph
    from torchferry.core.signature import DimRange, Signature

CASES = 3
_FIRST = (2, 3, 1, 5)  # sizes of a dimension that some input has as its first axis, as a rule the batch
_LATER = (32, 48, 40, 24, 64)  # of other dimensions, as a rule a picture's sides; onnx's evaluator is slow
_UNNAMED = 2  # of an axis that has no name
_ATTEMPTS = 20


def run_once(engine: Engine, graph: Graph, reference: Backend) -> None:
    """Open an engine and run it on made-up inputs until it succeeds once.

    Integers are zeros, which are valid indices, and ones where that fails. A failure is not held against the engine
    where the graph itself fails on all that was made up, nor where an input has one axis or none: it may hold sizes or
    scales, and the engine need not take those that nobody would give it.

    Args:
        engine: What was compiled.
        graph: From which.
        reference: Knows what the graph itself does.

    Raises:
        BackendError: If the engine does not open, or fails where the graph does not.
    """
    failures = []
    with engine.open() as session:
        for inputs in _attempts(engine.signature):
            try:
                session.run(inputs)
            except BackendError as exc:
                failures.append((inputs, exc))
            else:
                return
    if any(spec.shape is None or len(spec.shape) < 2 for spec in engine.signature.inputs):
        return
    for inputs, failure in failures:
        if _runs(graph, inputs, reference):
            shapes = ", ".join(f"'{name}' {list(array.shape)}" for name, array in inputs.items())
            raise BackendError(
                f"'{engine.target.backend}' compiles the graph and then fails at {shapes}: {failure.message}",
                hint="leave the operator out with `torchferry partition`, or use another backend",
            ) from failure


def _attempts(signature: Signature) -> list[dict[str, Array]]:
    """Return inputs to try one after the other; none where their shapes cannot be told."""
    try:
        sets = sizes_to_try(signature)
        attempts = [(sizes, fill) for fill in (0, 1) for sizes in sets]
        return [_made_up(signature, sizes, fill) for sizes, fill in attempts]
    except (BackendError, InputError, TypeError):  # no sizes, or a type that numpy has not
        return []


def _made_up(signature: Signature, sizes: Mapping[str, int], fill: int) -> dict[str, Array]:
    """Make up inputs: floating-point numbers between 0 and 1, anything else one number.

    Raises:
        InputError: If the signature does not take them, as where an input may have any number of axes.
    """
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in signature.inputs:
        shape = [_UNNAMED if size is None else size for size in spec.shape_at(sizes) or ()]
        dtype = np.dtype(spec.dtype)
        is_number = dtype.kind in "fV"  # numpy's own floating-point types, and those of ml_dtypes
        inputs[spec.name] = rng.random(shape).astype(dtype) if is_number else np.full(shape, fill, dtype)
    signature.check(inputs)
    return inputs


def _runs(graph: Graph, inputs: dict[str, Array], reference: Backend) -> bool:
    """Tell whether the graph itself takes these inputs."""
    try:
        with (
            tempfile.TemporaryDirectory(prefix="torchferry-") as folder,
            reference.trial(graph, Path(folder)) as session,
        ):
            session.run(inputs)
    except TorchferryError:
        return False
    return True


def sizes_to_try(signature: Signature, scale: int = 1) -> list[dict[str, int]]:
    """Choose sizes that the signature allows, all of them different where that can be.

    Args:
        signature: Ranges and conditions.
        scale: How much larger than usual the sizes of dimensions that are no input's first axis are.

    Returns:
        Up to ``CASES`` sets of sizes; one empty set where no size is free.

    Raises:
        BackendError: If none was found that fits all conditions.
    """
    first = {spec.shape[0] for spec in signature.inputs if spec.shape}
    chosen: list[dict[str, int]] = []
    for attempt in range(_ATTEMPTS):
        apart = attempt < _ATTEMPTS // 2  # different sizes first, then all alike, for models that want that
        sizes = {}
        for place, (name, allowed) in enumerate(signature.dims.items()):
            values = _FIRST if name in first else [size * scale for size in _LATER]
            sizes[name] = _nearest(values[(attempt + place * apart) % len(values)], allowed)
        try:
            signature.check_sizes(sizes)
        except InputError:
            continue
        if sizes not in chosen:
            chosen.append(sizes)
        if len(chosen) == CASES:
            break
    if not chosen:
        raise BackendError("no sizes were found to try the graph at", hint="export it with fixed sizes")
    return chosen


def _nearest(size: int, allowed: DimRange) -> int:
    size = max(size, allowed.min, 1)
    if allowed.max is not None:
        size = min(size, allowed.max)
    while size in allowed.excluded:
        size += 1
    return size
