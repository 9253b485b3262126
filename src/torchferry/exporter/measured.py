"""The sizes of what a Function gives, learnt by running its forward for real at several sizes and on several data.

For forwards that fake tensors cannot run, such as those written in C++. A size of an output is known only if every run
agrees: it is constant, or a size of the inputs scaled, shifted or strided; and it does not change with the data.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What is added to a size: small steps for strides inside the Function, large ones for those before it.
_STEPS = (1, 2, 3, 32, 64)
_FACTORS = (1, 2, 3, 4)
# In how many values a size must have been tried: forward may refuse some.
_ENOUGH = 3


def measured_sizes(
    run: Callable[[list[Any]], Sequence[torch.Tensor]], inputs: Sequence[Any], tensors: Sequence[torch.Tensor]
) -> list[list[Any]] | None:
    """Return the sizes of each output: a number, a size made of the inputs' sizes, or None where it is unknown.

    Args:
        run: The forward, of real inputs.
        inputs: Fake inputs: tensors, then sizes.
        tensors: The real tensors of the same call in the model's run on its example.

    Returns:
        The sizes; None if they cannot be measured, such as where forward refuses other sizes or data.
    """
    roots = _roots(inputs, tensors)
    if roots is None:
        return None
    samples = [roots]
    samples += [{**roots, root: value + step} for root, value in roots.items() for step in _STEPS]
    # Some must change together, such as the sizes of two tensors that are added.
    samples += [{root: value + step for root, value in roots.items()} for step in _STEPS]
    samples.append({root: value + 5 + 2 * index for index, (root, value) in enumerate(roots.items())})
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        seen_at = {index: _shapes(run, _resized(inputs, tensors, sample)) for index, sample in enumerate(samples)}
        tried = [_shapes(run, _with_data(_resized(inputs, tensors, roots), make)) for make in _DATA]
    samples = [sample for index, sample in enumerate(samples) if seen_at[index] is not None]
    seen = [shapes for shapes in seen_at.values() if shapes is not None]
    other = [shapes for shapes in tried if shapes is not None]
    if seen_at[0] is None or not other or len({tuple(map(len, shapes)) for shapes in [*seen, *other]}) != 1:
        return None
    dims = {str(size): size for size in _flat(inputs) if isinstance(size, torch.SymInt)}
    known = {name: (size, [_value(size, sample) for sample in samples]) for name, size in dims.items()}
    if any(len(set(at)) < _ENOUGH for _, at in known.values()):
        return None
    return [
        [
            None
            if any(shapes[output][axis] != shape[axis] for shapes in other)
            else _fitted([shapes[output][axis] for shapes in seen], list(known.values()))
            for axis in range(len(shape))
        ]
        for output, shape in enumerate(seen[0])
    ]


def _fitted(values: list[int], known: Sequence[tuple[Any, list[int]]]) -> Any:
    """Return the number, or the expression of an input's size, that gives a size in every run; None if none does."""
    if len(set(values)) == 1:
        return values[0]
    for (divisor, factor), (size, at) in itertools.product(itertools.product(_FACTORS, _FACTORS), known):
        low = max(divisor * value - factor * n for value, n in zip(values, at, strict=True))
        high = min(divisor * value + divisor - 1 - factor * n for value, n in zip(values, at, strict=True))
        if low == high:
            return (factor * size + low) // divisor if divisor > 1 else factor * size + low
    return None


def _roots(inputs: Sequence[Any], tensors: Sequence[torch.Tensor]) -> dict[Any, int] | None:
    """Return the symbols of the inputs' sizes with their values on the example; None if one is not known."""
    roots: dict[Any, int] = {}
    for fake, real in zip(inputs, tensors, strict=False):
        for size, value in zip(fake.shape, real.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                roots[size.node.expr] = value
    for size in _flat(inputs):
        if isinstance(size, torch.SymInt):
            for symbol in size.node.expr.free_symbols - set(roots):
                value = size.node.shape_env.backed_var_to_val.get(symbol)
                if value is None:
                    return None
                roots[symbol] = int(value)
    fits = all(
        [_value(size, roots) for size in fake.shape] == list(real.shape)
        for fake, real in zip(inputs, tensors, strict=False)
    )
    return roots if fits else None


def _resized(inputs: Sequence[Any], tensors: Sequence[torch.Tensor], sample: dict[Any, int]) -> list[Any]:
    """Return real inputs of the sizes of a sample; their values are the example's, repeated."""
    resized: list[Any] = []
    for fake, real in zip(inputs, tensors, strict=False):
        value = real.detach()
        for axis, size in enumerate(fake.shape):
            wanted = _value(size, sample)
            if wanted != value.shape[axis]:
                value = value.index_select(axis, torch.arange(wanted, device=value.device) % value.shape[axis])
        resized.append(value.clone())
    return resized + [_value(size, sample) for size in inputs[len(tensors) :]]


_DATA: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.zeros_like,
    torch.rand_like,
    lambda tensor: 100 * torch.randn_like(tensor),
)


def _with_data(inputs: list[Any], make: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    return [make(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]


def _flat(inputs: Sequence[Any]) -> list[Any]:
    return [size for value in inputs for size in (value.shape if isinstance(value, torch.Tensor) else (value,))]


def _value(size: Any, sample: dict[Any, int]) -> int:
    return size if isinstance(size, int) else int(size.node.expr.xreplace(sample))


def _shapes(run: Callable[[list[Any]], Sequence[torch.Tensor]], inputs: list[Any]) -> list[tuple[int, ...]] | None:
    try:
        return [tuple(output.shape) for output in run(inputs)]
    except Exception:  # noqa: BLE001 - forward may refuse anything that is not the example
        return None
