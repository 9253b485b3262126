"""Registering rewriters of functions and methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torchferry.core.errors import ConfigError
from torchferry.rewrite.checkers import as_checkers
from torchferry.rewrite.registry import DEFAULT, Record, Registry
from torchferry.rewrite.state import current_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torchferry.rewrite.checkers import Checker
    from torchferry.rewrite.state import FunctionContext

    Function = TypeVar("Function", bound=Callable[..., Any])


class FunctionRewriter(Registry):
    """A registry of rewriters of functions and methods.

    >>> rewriters = FunctionRewriter()
    >>> @rewriters.register_rewriter("torch.Tensor.repeat", backend="an_engine")
    ... def repeat_static(input, *size):
    ...     ctx = rewriters.get_context()
    ...     return ctx.origin_func(input, *size)
    >>> rewriters.records()[0].name
    'torch.Tensor.repeat'
    """

    def register_rewriter(
        self,
        func_name: str,
        backend: str = DEFAULT,
        ir: str = DEFAULT,
        extra_checkers: Checker | Iterable[Checker] | None = None,
        *,
        changes_outputs: bool = False,
        **kwargs: Any,
    ) -> Callable[[Function], Function]:
        """Register the decorated function as a rewriter; it stays as it is, and can be decorated again.

        It takes the arguments of what it replaces: of a method also ``self``, of a class method ``cls``, of a property
        only ``self``. If its own first parameter is named ``ctx``, the context comes before them, whatever the
        parameters of the original are named.

        Args:
            func_name: The dotted name of a function, method or property. See ``targets`` for what can be named.
            backend: The backend that it is for.
            ir: The intermediate representation that it is for.
            extra_checkers: Conditions, such as ``LibVersionChecker``; all must hold.
            changes_outputs: Its results differ from the original's on purpose, so they are not compared.
            **kwargs: Further attributes of the context.

        Raises:
            ConfigError: If the name is not text, the decorated is not callable or a checker is none.
        """
        checkers = as_checkers(extra_checkers)

        def register(function: Function) -> Function:
            if not callable(function):
                raise ConfigError(f"the rewriter of '{func_name}' is a {type(function).__name__}, not a function")
            self.add(Record(func_name, function, backend, ir, checkers, changes_outputs, kwargs))
            return function

        return register

    def get_context(self, key: str | None = None) -> FunctionContext:  # noqa: ARG002 - old code gives it
        """Return what the rewriter is told from which this is called.

        Args:
            key: Not needed: the rewriter that is running is known.

        Raises:
            ConfigError: If no rewriter is running.
        """
        return current_context()


FUNCTION_REWRITER = FunctionRewriter()
"""The registry that is used where none is named."""
