"""Repairing a module by its weights: scales written into parameters, buffers and the eps of norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchferry.precision.apply import SMALLEST
from torchferry.precision.prepare import MASK_BECOMES, MASK_FROM

if TYPE_CHECKING:
    from collections.abc import Collection

    from torchferry.precision.modules.numbers import Number
    from torchferry.precision.planning import Plan


def write_weights(model: torch.nn.Module, parameters: Collection[str], found: Plan) -> None:
    """Divide parameters and buffers by ``2**k`` in place, and bound those that are masks."""
    assert found.solution is not None  # the caller looked
    scales = found.solution.scales
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    done: set[int] = set()
    with torch.no_grad():
        for name in sorted(parameters):
            tensor = own[name]
            if tensor.data_ptr() in done or not tensor.is_floating_point():
                continue
            done.add(tensor.data_ptr())
            if name in found.prepared.masks:
                tensor.masked_fill_(tensor <= MASK_FROM, MASK_BECOMES)
            if scales.get(name):
                tensor.mul_(2.0 ** -scales[name])


def write_epsilons(model: torch.nn.Module, epsilons: list[Number], found: Plan) -> None:
    """Set what the eps of each norm has to be."""
    for each in epsilons:
        setattr(model.get_submodule(each.owner), each.name, each.scaled(found))


def keep_epsilons_above_zero(model: torch.nn.Module, epsilons: list[Number]) -> None:
    """Raise an eps that a module's own code adds, and FP16 would hold as 0; a norm of torch's adds its own in FP32."""
    for each in epsilons:
        module = model.get_submodule(each.owner)
        if each.constant and 0 < getattr(module, each.name) < SMALLEST:
            setattr(module, each.name, SMALLEST)
