"""What is exported: a module, an example of its inputs, its dynamic dimensions and its names."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.errors import ModelError
from torchferry.exporter.inputs import Call, InputNames, as_call

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, eq=False)
class Source:
    """A model to deploy.

    Attributes:
        model: The module; it is left as it was found.
        args: Positional example inputs: a tuple, a dict of keyword arguments, or one tensor.
        kwargs: Keyword example inputs.
        dynamic_shapes: ``{input: {axis: name}}``; see ``ferry.export``.
        input_names: Names of the graph's inputs in order; ``forward``'s parameters where not given.
        output_names: Names of the graph's outputs in order.

    Raises:
        ModelError: If ``model`` is not a module.
    """

    model: torch.nn.Module
    args: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model, torch.nn.Module):
            raise ModelError(
                f"the model must be a torch.nn.Module, got {type(self.model).__name__}",
                hint="wrap a function in a module whose forward calls it",
            )

    @functools.cached_property
    def call(self) -> Call:
        """The example as positional and keyword arguments."""
        args, kwargs = as_call(self.args)
        return args, {**kwargs, **self.kwargs}

    def with_model(self, model: torch.nn.Module) -> Source:
        """Return the same example for another module that takes the same arguments; the tensors keep their names."""
        other = dataclasses.replace(self, model=model)
        other.__dict__["names"] = self.names
        return other

    @functools.cached_property
    def names(self) -> InputNames:
        """The names of the example's tensors."""
        return InputNames(self.model, self.call, self.input_names)
