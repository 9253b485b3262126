"""What rewriters are registered, and which of them a target asks for."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchferry.core.errors import ConfigError
from torchferry.rewrite.checkers import objection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.rewrite.checkers import Checker

DEFAULT = "default"
"""Registered for any backend or IR; given to a context, none in particular."""


@dataclass(frozen=True, eq=False)
class Record:
    """One registered rewriter.

    Attributes:
        name: The dotted name of what it replaces.
        replacement: The function or class that takes its place.
        backend: The backend that it is for, or ``default``.
        ir: The intermediate representation that it is for, or ``default``.
        checkers: All must agree.
        changes_outputs: Its results differ from the original's on purpose; they are not compared.
        kwargs: Extra attributes of the context.
    """

    name: str
    replacement: Any
    backend: str = DEFAULT
    ir: str = DEFAULT
    checkers: tuple[Checker, ...] = ()
    changes_outputs: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The replacement's module and qualified name."""
        replacement = self.replacement
        return f"{getattr(replacement, '__module__', '?')}.{getattr(replacement, '__qualname__', repr(replacement))}"

    @property
    def is_own_rule(self) -> bool:
        """Whether it is one of the rules that come with Torchferry."""
        return self.title.startswith("torchferry.rewrite.rules.")

    @property
    def place(self) -> str:
        """The replacement's ``file:line``; only the module's name for one that has no source."""
        code = getattr(self.replacement, "__code__", None)
        if code is not None:
            return f"{code.co_filename}:{code.co_firstlineno}"
        return _class_place(self.replacement)

    @functools.cached_property
    def takes_context(self) -> bool:
        """Whether the replacement takes the context as its first argument: one that is named ``ctx``."""
        try:
            parameters = inspect.signature(self.replacement).parameters
        except (TypeError, ValueError):  # written in C
            return False
        return next(iter(parameters), None) == "ctx"

    @property
    def rank(self) -> tuple[bool | int, ...]:
        """How specific it is: for a backend, then for an IR, then under conditions."""
        return self.backend != DEFAULT, self.ir != DEFAULT, bool(self.checkers)

    def objection(self, env: Mapping[str, Any]) -> str | None:
        """Return why it does not apply to a target, or None if it does."""
        for what, wanted in (("backend", self.backend), ("ir", self.ir)):
            if wanted not in (DEFAULT, env[what]):
                return f"for {what} '{wanted}', not '{env[what]}'"
        return objection(self.checkers, env)

    def replaces(self, other: Record) -> bool:
        """Tell whether this is the other one registered again: a module reloaded, a notebook's cell run twice."""
        names = [getattr(r.replacement, "__qualname__", "<") for r in (self, other)]
        return (
            "<" not in names[0]  # neither a lambda nor local to a function
            and names[0] == names[1]
            and self.replacement.__module__ == other.replacement.__module__
            and (self.name, self.backend, self.ir) == (other.name, other.backend, other.ir)
            and (self.checkers == other.checkers or self.place == other.place)
        )


class Registry:
    """Rewriters in the order in which they were registered."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def records(self) -> tuple[Record, ...]:
        """Return all that are registered."""
        return tuple(self._records)

    def add(self, record: Record) -> None:
        """Register one, in the place of itself if it was registered before.

        Raises:
            ConfigError: If its name is not text.
        """
        if not isinstance(record.name, str):
            raise ConfigError(
                f"a rewriter's target is named by text, got {type(record.name).__name__}",
                where=record.place,
                hint="write it as 'package.module.function'",
            )
        self._records = [*(r for r in self._records if not record.replaces(r)), record]


def most_specific(rivals: Sequence[Record], env: Mapping[str, Any]) -> Record:
    """Return the one of several rewriters of the same thing that is chosen; all of them fit.

    Raises:
        ConfigError: If two fit equally well; names both.
    """
    best = max(rivals, key=lambda record: record.rank)
    for other in rivals:
        if other is not best and other.rank == best.rank:
            raise ConfigError(
                f"two rewriters of '{best.name}' fit backend '{env['backend']}' and IR '{env['ir']}' equally well: "
                f"{best.title} ({best.place}) and {other.title} ({other.place})",
                hint="register one of them for a backend, an IR or with a checker, or leave one out",
            )
    return best


def _class_place(cls: Any) -> str:
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return str(getattr(cls, "__module__", "?"))
