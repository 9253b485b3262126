"""Comparing a rewriter with what it replaces, on the calls that are really made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from torchferry.core.compare import TOLERANCES, compare

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchferry.rewrite.tally import Tally

DIFFERS = "rewrite-differs"
STRUCTURE = "rewrite-structure"
MUTATES = "rewrite-mutates-input"

_TOLERANCES = {torch.float16: TOLERANCES["fp16"], torch.bfloat16: TOLERANCES["bf16"]}
_NUMPY_HAS = (torch.float16, torch.float32, torch.float64)


def compared_call(
    original: Callable[..., Any],
    replacement: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tally: Tally,
    place: str,
) -> Any:
    """Call the original on copies of the inputs, then the replacement on the inputs, and note how they differ.

    Both draw the same random numbers. Tensors are copied, parameters and all other objects are not: what the original
    changes in a module or another object happens once more than without the comparison.

    Args:
        original: Runs first.
        replacement: Its result is the result of the call.
        args: Positional arguments.
        kwargs: Keyword arguments.
        tally: Where the outcome is noted.
        place: The user's line.

    Returns:
        What the replacement returns; what it raises is raised.
    """
    reason = _incomparable((args, kwargs))
    if reason:
        tally.not_compared = reason
        return replacement(*args, **kwargs)
    copied_args, copied_kwargs = pytree.tree_map(_copy, (args, kwargs))
    random = torch.get_rng_state()
    expected = None
    try:
        expected = original(*copied_args, **copied_kwargs)
    except Exception as exc:  # noqa: BLE001 - the rewriter may be there because the original fails
        reason = f"the original raises {type(exc).__name__}: {exc}"
    finally:
        torch.set_rng_state(random)
    actual = replacement(*args, **kwargs)
    reason = reason or _incomparable(actual) or _incomparable(expected)
    if reason:
        tally.not_compared = reason
        return actual
    tally.compared += 1
    _compare_outputs(expected, actual, tally, place)
    _compare_inputs((copied_args, copied_kwargs), (args, kwargs), tally, place)
    return actual


def _compare_outputs(expected: Any, actual: Any, tally: Tally, place: str) -> None:
    wanted, wanted_spec = pytree.tree_flatten(expected)
    got, spec = pytree.tree_flatten(actual)
    if spec != wanted_spec:
        tally.problem(STRUCTURE, f"returns {_shape_of(actual)}, the original {_shape_of(expected)}", place)
        return
    for index, (want, have) in enumerate(zip(wanted, got, strict=True)):
        where = f" in output {index}" if len(wanted) > 1 else ""
        if isinstance(want, torch.Tensor) != isinstance(have, torch.Tensor) or _kind(want) is not _kind(have):
            message = f"returns {_shape_of(have)}{where}, the original {_shape_of(want)}"
            tally.problem(STRUCTURE, message, place)
            continue
        reason = _difference(want, have, tally)
        if reason:
            tally.problem(DIFFERS, f"differs from the original{where}: {reason}", place)


def _compare_inputs(expected: Any, actual: Any, tally: Tally, place: str) -> None:
    """Compare what both left of their inputs."""
    leaves, _ = pytree.tree_flatten_with_path(actual)
    for want, (path, have) in zip(pytree.tree_leaves(expected), leaves, strict=True):
        if isinstance(have, torch.Tensor) and want is not have:
            reason = _difference(want, have, None)
            if reason:
                name = pytree.keystr(path[1:])
                tally.problem(MUTATES, f"leaves argument {name} changed, unlike the original: {reason}", place)


def _difference(want: Any, have: Any, tally: Tally | None) -> str:
    if isinstance(want, torch.Tensor):
        if want.dtype != have.dtype:
            return f"dtype {have.dtype}, expected {want.dtype}"
        tolerance = _TOLERANCES.get(want.dtype, TOLERANCES["fp32"])
        result = compare(_array(want), _array(have), tolerance)
    elif isinstance(want, int | float | complex):
        result = compare(np.asarray(want), np.asarray(have), TOLERANCES["fp32"])
    elif isinstance(want, str | bytes | torch.dtype | torch.device):
        return "" if want == have else f"{have!r}, expected {want!r}"
    else:
        return ""
    if tally is not None:
        tally.max_abs = max(tally.max_abs, result.max_abs)
    return result.reason


def _array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.is_floating_point() and tensor.dtype not in _NUMPY_HAS else tensor).numpy()


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and not isinstance(leaf, torch.nn.Parameter):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return leaf


def _incomparable(tree: Any) -> str:
    """Return why values cannot be compared; empty if they can."""
    if torch.compiler.is_compiling():
        return "no values while exporting"
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            if isinstance(leaf, FakeTensor) or leaf.is_meta:
                return "no values in a tensor without data"
            if leaf.layout is not torch.strided or leaf.is_quantized:
                return f"tensors of layout {leaf.layout} are not compared"
        elif hasattr(leaf, "__next__"):
            return "an iterator can be read only once"
    return ""


def _kind(value: Any) -> type:
    return torch.Tensor if isinstance(value, torch.Tensor) else type(value)


def _shape_of(value: Any) -> str:
    """Name a value's structure: ``tuple[Tensor, None]``."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[{', '.join(_shape_of(item) for item in value)}]"
    if isinstance(value, dict):
        return "dict[" + ", ".join(f"{key}: {_shape_of(item)}" for key, item in value.items()) + "]"
    return "None" if value is None else "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__
