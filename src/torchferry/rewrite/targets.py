"""How calls of a thing are caught, by what kind of thing it is.

==================================================  ==============================================================
what the name leads to                              how its calls are caught
==================================================  ==============================================================
a C function or operator of torch, a method or      ``TorchTarget``: by ``mode.RewriterMode``, whatever name it is
attribute of Tensor written in C                    reached by
a Python function, torch's own too; a method,       ``FunctionTarget``: its code object is swapped, so that every
class or static method or property of the class     reference to the function is caught
itself
a method that the class inherits                    ``AttributeTarget``: set on the class for the time, and caught in
                                                    the base's function where ``self`` is of the class
any other callable of a module                      ``AttributeTarget``: only calls through this name
==================================================  ==============================================================

Names lead to objects: ``torch.relu``, ``torch.Tensor.relu``, ``torch.nn.functional.relu`` and
``torch.ops.aten.relu.default`` are four functions, and each is rewritten where Python calls it. ``torch.einsum`` and
``torch.functional.einsum`` are one. ``torch.Tensor.__add__`` is what ``x + y`` and ``x.add(y)`` have in common.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, ModuleType, WrapperDescriptorType
from typing import TYPE_CHECKING, Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from torchferry.rewrite.names import Missing

if TYPE_CHECKING:
    from torchferry.rewrite.names import Found

COMPOSED = ("torch.nn.functional", "torch.functional", "torch._tensor", "torch.nn.init")
"""Where torch writes public functions in Python, in terms of others."""

_IMMUTABLE = 1 << 8  # CPython's Py_TPFLAGS_IMMUTABLETYPE

# Operators that torch reports under the name of the method that they share an implementation with.
_OPERATORS = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add_", "__sub__": "sub", "__isub__": "sub_",
    "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul_", "__truediv__": "div", "__itruediv__": "div_",
    "__div__": "div", "__idiv__": "div_", "__ifloordiv__": "floor_divide_", "__mod__": "remainder",
    "__imod__": "remainder_", "__matmul__": "matmul", "__lt__": "lt", "__le__": "le", "__gt__": "gt",
    "__ge__": "ge", "__ne__": "ne",
}  # fmt: skip


@dataclass(frozen=True)
class TorchTarget:
    """A function as torch hands it to a ``TorchFunctionMode``.

    Attributes:
        function: A function, a method descriptor, the getter of an attribute, or an operator.
    """

    function: Any


@dataclass(frozen=True)
class FunctionTarget:
    """A function or method that is caught by its code object.

    Attributes:
        function: A Python function.
        guarded: It hands its calls to torch's modes first, which then call it again.
    """

    function: Any
    guarded: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class AttributeTarget:
    """An attribute of a class or module that is set and taken back.

    Attributes:
        owner: The class or module.
        attribute: Its attribute.
        value: What is found there, as it is stored.
        base: The base's function that an inherited method comes from; None if there is none with a ``self`` or ``cls``.
    """

    owner: Any
    attribute: str
    value: Any = field(compare=False)
    base: Any = field(default=None, compare=False)


Target = TorchTarget | FunctionTarget | AttributeTarget


def target(found: Found) -> Target | Missing:
    """Return how to catch the calls of what a name led to, or why they cannot be caught."""
    parent, name, value = found.parent, found.attribute, found.value
    if isinstance(parent, type) and issubclass(torch.Tensor, parent):
        name = _OPERATORS.get(name, name)
        value = getattr(parent, name) if name != found.attribute else value
    seen = _as_torch_reports(value)
    if seen is not None:
        return TorchTarget(seen)
    if not isinstance(parent, type | ModuleType):
        return Missing("it is neither in a module nor on a class")
    function = python_function(value)
    if function is not None and not found.inherited:
        return FunctionTarget(function, _is_guarded(function))
    if isinstance(value, type):
        return Missing("it is a class; name one of its methods, or register a module rewriter")
    if function is None and not callable(value):
        return Missing(f"it is a {type(value).__name__}, which cannot be called")
    if isinstance(parent, type) and parent.__flags__ & _IMMUTABLE:
        return Missing(f"'{parent.__name__}' is a type of Python's own")
    has_self = isinstance(value, FunctionType | classmethod)
    return AttributeTarget(parent, found.attribute, value, function if has_self else None)


def python_function(value: Any) -> FunctionType | None:
    """Return the Python function in a method, static method, class method or property; None if there is none."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    return value if isinstance(value, FunctionType) else None


def _as_torch_reports(value: Any) -> Any:
    """Return a function of torch as a ``TorchFunctionMode`` sees it; None if it sees none."""
    if isinstance(value, CustomOpDef):
        return value._opoverload
    if isinstance(value, OpOverload | OpOverloadPacket):
        return value
    if not callable(value) and hasattr(value, "__get__") and value.__get__ in _attributes():
        return value.__get__
    if isinstance(value, BuiltinFunctionType | MethodDescriptorType | WrapperDescriptorType):
        home = getattr(value, "__objclass__", None) or getattr(value, "__self__", None)
        names = (getattr(value, "__module__", None), getattr(home, "__module__", None), getattr(home, "__name__", None))
        return value if str(next(filter(None, names), "")).split(".")[0] == "torch" else None
    return None


def _is_guarded(function: FunctionType) -> bool:
    return "handle_torch_function" in function.__code__.co_names or function.__module__ in COMPOSED


@functools.cache
def _attributes() -> frozenset[Any]:
    """The getters of Tensor's attributes."""
    values = [value for cls in torch.Tensor.__mro__ for value in vars(cls).values()]
    return frozenset(value.__get__ for value in values if hasattr(value, "__get__") and not callable(value))
