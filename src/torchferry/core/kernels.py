"""Kernels in Python for operators that no engine has: the engines that can call them find them here.

A kernel belongs to a process, not to a package: code is never loaded from a package's folder. So a process that opens
an engine with such an operator imports the module that defines the kernel first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torchferry.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchferry.core.engine import Array

AttributeType = Literal["int", "float", "string"]
DTYPES = ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")


@dataclass(frozen=True)
class Kernel:
    """An operator computed by a function of numpy arrays.

    Attributes:
        name: ``domain::Operator``, as the graph's nodes have it.
        function: Takes the inputs as arrays in order and the attributes as keywords; returns an array or several.
        inputs: The dtype of each input.
        outputs: The dtype of each output.
        attributes: The type of each attribute.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("float32",)
    attributes: Mapping[str, AttributeType] = field(default_factory=dict)

    def __call__(self, *inputs: Any, **attributes: Any) -> list[Array]:
        """Compute it; what it gives has the dtypes that were declared."""
        returned = self.function(*inputs, **attributes)
        results = returned if isinstance(returned, tuple | list) else (returned,)
        return [np.asarray(array, dtype, order="C") for array, dtype in zip(results, self.outputs, strict=True)]


_KERNELS: dict[str, Kernel] = {}


def register_kernel(kernel: Kernel) -> None:
    """Let the engines of this process use a kernel, in the place of one of the same name.

    Raises:
        ConfigError: If a dtype is not one of ``DTYPES``, or the name has no domain.
    """
    if "::" not in kernel.name:
        raise ConfigError(f"the kernel '{kernel.name}' has no domain", hint="name it 'domain::Operator'")
    for dtype in (*kernel.inputs, *kernel.outputs):
        if dtype not in DTYPES:
            raise ConfigError(f"the kernel '{kernel.name}' has the dtype '{dtype}'", hint=f"use {', '.join(DTYPES)}")
    _KERNELS[kernel.name] = kernel


def kernels() -> tuple[Kernel, ...]:
    """Return all that are registered."""
    return tuple(_KERNELS.values())
