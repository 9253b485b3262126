"""Registering rewriters of module classes, and rewriting a model by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from torchferry.core.errors import ConfigError
from torchferry.rewrite.checkers import as_checkers
from torchferry.rewrite.registry import DEFAULT, Record, Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torchferry.rewrite.checkers import Checker

    ModuleClass = TypeVar("ModuleClass", bound=type[torch.nn.Module])


class ModuleRewriter(Registry):
    """A registry of rewriters of module classes.

    >>> rewriters = ModuleRewriter()
    >>> @rewriters.register_rewrite_module("torch.nn.Upsample", backend="an_engine")
    ... class Nothing(torch.nn.Module):
    ...     def __init__(self, module, cfg):
    ...         super().__init__()
    ...
    ...     def forward(self, x):
    ...         return x
    >>> rewriters.records()[0].name
    'torch.nn.Upsample'
    """

    def register_rewrite_module(
        self,
        module_type: str,
        backend: str = DEFAULT,
        ir: str = DEFAULT,
        extra_checkers: Checker | Iterable[Checker] | None = None,
        *,
        changes_outputs: bool = False,
        **kwargs: Any,
    ) -> Callable[[ModuleClass], ModuleClass]:
        """Register the decorated class as what takes the place of every instance of a module class.

        It is built as ``cls(module, cfg, **kwargs)`` with those keywords of the registration and of the context that
        its ``__init__`` takes. ``module`` is a copy that shares parameters and buffers, so it may be changed.

        Args:
            module_type: The dotted name of the class. Subclasses are replaced too, unless a nearer base is registered.
            backend: The backend that it is for.
            ir: The intermediate representation that it is for.
            extra_checkers: Conditions, such as ``LibVersionChecker``; all must hold.
            changes_outputs: Its results differ from the original's on purpose, so they are not compared.
            **kwargs: Keywords for ``__init__``.

        Raises:
            ConfigError: If the name is not text, the decorated is no module class or a checker is none.
        """
        checkers = as_checkers(extra_checkers)

        def register(cls: ModuleClass) -> ModuleClass:
            if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
                raise ConfigError(f"what replaces '{module_type}' must be a class of torch.nn.Module, got {cls!r}")
            self.add(Record(module_type, cls, backend, ir, checkers, changes_outputs, kwargs))
            return cls

        return register


MODULE_REWRITER = ModuleRewriter()
"""The registry that is used where none is named."""
