"""The tensors among a call's arguments, under the names that the graph gives them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchferry.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.core.engine import Array

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(inputs: Any) -> Call:
    """Return positional and keyword arguments for what a user may give as one call's inputs.

    Args:
        inputs: A tuple or list of positional arguments, a dict of keyword arguments, or a single tensor.

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise InputError(
        f"inputs must be a tuple of arguments, a dict by name, or a tensor, got {type(inputs).__name__}",
    )


def as_calls(inputs: Any) -> list[Call]:
    """Return the calls for one tuple/dict of tensors, or for an iterable of them."""
    if isinstance(inputs, torch.Tensor | dict):
        return [as_call(inputs)]
    if isinstance(inputs, tuple | list):
        many = bool(inputs) and all(isinstance(item, tuple | dict) for item in inputs)
        return [as_call(item) for item in inputs] if many and isinstance(inputs, list) else [as_call(inputs)]
    return [as_call(item) for item in inputs]


class InputNames:
    """The names of a call's tensors, in the order in which torch.export flattens them.

    A tensor is named after ``forward``'s parameter; inside lists, tuples and dicts the path follows: ``feats.0``,
    ``aux.k``.

    Args:
        model: The module, for its ``forward``'s parameters.
        call: Positional and keyword arguments.
        chosen: The user's own names for the tensors, in order; may be fewer.

    Attributes:
        names: One for each tensor, in order.
        parameter_names: The names that the tensors have without ``chosen``.
        sources: How torch's guards write each tensor (``L['feats'][0]``), by name.
        parameters: The signature of ``forward``.

    Raises:
        InputError: If there are more chosen names than tensors, or two are equal.
    """

    def __init__(self, model: torch.nn.Module, call: Call, chosen: Sequence[str] | None = None) -> None:
        self.parameters = inspect.signature(model.forward)
        self.parameter_names = [name for name, _ in _named_tensors(self.parameters, call)]
        chosen = list(chosen or ())
        if len(chosen) > len(self.parameter_names):
            raise InputError(
                f"{len(chosen)} input names for {len(self.parameter_names)} tensors ({', '.join(self.parameter_names)})"
            )
        self.names = [*chosen, *self.parameter_names[len(chosen) :]]
        if len(set(self.names)) < len(self.names):
            raise InputError(f"two inputs have the same name: {', '.join(self.names)}")
        self.sources = {
            name: "L" + "".join(f"[{part if part.isdigit() else repr(part)}]" for part in parameter.split("."))
            for name, parameter in zip(self.names, self.parameter_names, strict=True)
        }

    def tensors(self, call: Call) -> dict[str, torch.Tensor]:
        """Return the tensors of a call by name; it may give by keyword what the example gave by position.

        Raises:
            InputError: If the call gives other tensors than the example that gave the names.
        """
        by_parameter = dict(_named_tensors(self.parameters, call))
        if by_parameter.keys() != set(self.parameter_names):
            raise InputError(
                f"these inputs give {', '.join(by_parameter) or 'no tensors'}; "
                f"the model was exported with {', '.join(self.parameter_names)}",
            )
        return {name: by_parameter[own] for name, own in zip(self.names, self.parameter_names, strict=True)}

    def replace(self, call: Call, tensors: Mapping[str, torch.Tensor]) -> Call:
        """Return the example's call with other tensors in the places of its own."""
        leaves, spec = pytree.tree_flatten(call)
        fresh = iter([tensors[name] for name in self.names])
        changed = [next(fresh) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(changed, spec)
        return tuple(args), dict(kwargs)


def named_numbers(parameters: inspect.Signature, call: Call) -> list[tuple[str, int | float]]:
    """Return the numbers among a call's arguments, named as its tensors would be."""
    return [(name, leaf) for name, leaf in _named_leaves(parameters, call) if type(leaf) in (int, float)]


def _named_tensors(parameters: inspect.Signature, call: Call) -> list[tuple[str, torch.Tensor]]:
    return [(name, leaf) for name, leaf in _named_leaves(parameters, call) if isinstance(leaf, torch.Tensor)]


def _named_leaves(parameters: inspect.Signature, call: Call) -> list[tuple[str, Any]]:
    try:
        parameters.bind(*call[0], **call[1])
    except TypeError as exc:
        raise InputError(
            f"the inputs do not fit forward{parameters}: {exc}", hint="give one argument for each parameter"
        ) from exc
    positional = _positional_names(parameters, len(call[0]))
    leaves, _ = pytree.tree_flatten_with_path(call)
    return [(_path_name(path, positional), leaf) for path, leaf in leaves]


def _positional_names(parameters: inspect.Signature, count: int) -> list[str]:
    names: list[str] = []
    for parameter in parameters.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names


def _path_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    group, first, *rest = path
    head = parameters[first.idx] if group.idx == 0 else str(first.key)
    return ".".join([head, *(str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", key)))) for key in rest)])


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a tensor as a numpy array on the CPU; bfloat16 becomes ml_dtypes' type of that name."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = np.ascontiguousarray(tensor.numpy()) if tensor.ndim else tensor.numpy()
    return array


def flatten_outputs(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors among a forward's outputs, in the graph's order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
