"""Dynamic dimensions as the user declares them, and as torch.export takes them."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.exporter.inputs import Call, InputNames


Dynamic = dict[str, dict[int, Dimension]]  # by input name, then axis


def declared_dimensions(dynamic_shapes: Any, names: InputNames, tensors: Mapping[str, torch.Tensor]) -> Dynamic:
    """Read the user's ``dynamic_shapes``.

    Args:
        dynamic_shapes: By input name (the chosen one or the parameter's), or a sequence in their order. A value is
            ``{axis: dim}`` or one entry an axis; a dim is a name, ``name=min..max``,
            ``name=min..opt..max``, a ``Dimension``, a ``torch.export.Dim``, ``Dim.AUTO``, ``Dim.DYNAMIC``, or None for
            a fixed size.
        names: The inputs' names.
        tensors: The example.

    Raises:
        ConfigError: If an input, an axis or a name does not exist or cannot be used, one name has two sizes or two
            ranges, or the example lies outside a range.
    """
    if dynamic_shapes is None:
        return {}
    if not isinstance(dynamic_shapes, dict):
        dynamic_shapes = dict(zip(names.names, dynamic_shapes, strict=False))
    alias = dict(zip(names.parameter_names, names.names, strict=True))
    declared: Dynamic = {}
    sizes: dict[str, tuple[int, str]] = {}
    ranges: dict[str, Dimension] = {}
    for key, axes in dynamic_shapes.items():
        name = alias.get(key, key) if key not in names.names else key
        if name not in names.names:
            raise ConfigError(f"dynamic_shapes names an unknown input '{key}'", hint=did_you_mean(key, names.names))
        shape = tensors[name].shape
        for axis, dim in _axes(axes, len(shape), name).items():
            if (entry := _declared(dim, name, axis)) is None:
                continue
            size = shape[axis]
            known, place = sizes.setdefault(entry.name, (size, f"axis {axis} of '{name}'"))
            if known != size:
                raise ConfigError(
                    f"'{entry.name}' is {known} at {place} but {size} at axis {axis} of '{name}' in the example",
                    hint="give the two axes different names, or an example in which they agree",
                )
            ranges[entry.name] = _same_range(ranges.get(entry.name, entry), entry)
            if size not in entry:
                raise ConfigError(
                    f"axis {axis} of '{name}' is {size} in the example, outside of {entry}",
                    hint="give an example of a size that the graph is for",
                )
            declared.setdefault(name, {})[axis] = entry
    return {name: {axis: ranges[entry.name] for axis, entry in axes.items()} for name, axes in declared.items()}


def _same_range(known: Dimension, other: Dimension) -> Dimension:
    if other.is_bare or known == other:
        return known
    if known.is_bare:
        return other
    raise ConfigError(
        f"one dimension has two ranges, {known} and {other}", hint="give the axes different names, or say it once"
    )


def _axes(axes: Any, rank: int, name: str) -> dict[int, Any]:
    if axes is None:
        return {}
    if isinstance(axes, list | tuple):
        if len(axes) != rank:
            raise ConfigError(f"'{name}' has {rank} dimensions, dynamic_shapes gives {len(axes)}")
        axes = dict(enumerate(axes))
    if not isinstance(axes, dict):
        raise ConfigError(f"dynamic_shapes of '{name}' must be {{axis: name}}, got {axes!r}")
    for axis in axes:
        if not isinstance(axis, int) or not -rank <= axis < rank:
            raise ConfigError(f"dynamic_shapes: '{name}' has {rank} dimensions, no axis {axis!r}")
    return {axis % rank: dim for axis, dim in axes.items()}


def _declared(dim: Any, name: str, axis: int) -> Dimension | None:
    if dim is None or dim is Dim.STATIC or isinstance(dim, int):
        return None
    if dim is Dim.AUTO or dim is Dim.DYNAMIC:
        return Dimension(re.sub(r"\W", "_", f"{name}_dim_{axis}"))
    if isinstance(dim, Dimension):
        return dim
    if isinstance(dim, Dim):
        upper = dim.max if isinstance(dim.max, int) and dim.max < sys.maxsize - 1 else None
        return Dimension(dim.__name__, min=dim.min or None, max=upper)
    if isinstance(dim, str):
        declared = Dimension.parse(dim)
        if not declared.name.isidentifier():
            hint = "use letters, digits and _, such as 'batch', and sizes such as 'batch=1..8' or 'batch=1..4..8'"
            raise ConfigError(f"'{dim}' cannot name a dimension", hint=hint)
        return declared
    raise ConfigError(f"dynamic_shapes: {dim!r} is neither a name nor a torch.export.Dim")


def torch_dynamic_shapes(model: torch.nn.Module, call: Call, names: InputNames, declared: Dynamic) -> Any:
    """Return the ``dynamic_shapes`` for torch.export: ``Dim.AUTO`` wherever the user wants a dynamic size.

    A named ``Dim`` would make torch raise where the model bounds it; ``AUTO`` lets it through, and we read the bounds.
    """
    in_order = iter(names.names)

    def axes(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return dict.fromkeys(declared.get(next(in_order), {}), Dim.AUTO)

    args, kwargs = pytree.tree_map(axes, call)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def traceable(tensors: Mapping[str, torch.Tensor], declared: Dynamic) -> dict[str, torch.Tensor]:
    """Return the example as it should be traced.

    Every dynamic axis of size 1 is repeated once, since torch treats size 1 as special; and a tensor that was given for
    two inputs is copied, since torch would take the inputs for one.
    """
    seen: set[int] = set()

    def prepared(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in seen:
            tensor = tensor.clone()
        seen.add(id(tensor))
        for axis in declared.get(name, {}):
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], dim=axis)
        return tensor

    return {name: prepared(name, tensor) for name, tensor in tensors.items()}
