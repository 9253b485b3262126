"""Conditions under which a rewriter applies: a library's version, or anything that the author can test."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch.torch_version import TorchVersion

from torchferry.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


class HasCheck(Protocol):
    """A checker written as an object."""

    def check(self, env: Mapping[str, Any]) -> bool:
        """Tell whether the rewriter applies; ``env`` holds ``backend``, ``ir``, ``target`` and ``cfg``."""


if TYPE_CHECKING:
    Checker = Callable[[Mapping[str, Any]], bool] | HasCheck


@dataclass(frozen=True)
class LibVersionChecker:
    """Applies where a library is installed in a range of versions, both ends included.

    A local part (``+cpu``) is left out of the comparison. A library that is not installed does not fit any range.

    Attributes:
        lib: The name of the distribution, such as ``torch``.
        min_version: The lowest version; None for any.
        max_version: The highest version; None for any.
    """

    lib: str
    min_version: str | None = None
    max_version: str | None = None

    def check(self, env: Mapping[str, Any]) -> bool:  # noqa: ARG002 - the versions do not depend on the target
        """Tell whether the installed version is in the range."""
        installed = self._installed()
        if installed is None:
            return False
        low = self.min_version is None or installed >= TorchVersion(self.min_version)
        return low and (self.max_version is None or installed <= TorchVersion(self.max_version))

    def __str__(self) -> str:
        return (
            f"{self.lib} {self.min_version or ''}..{self.max_version or ''} (installed: {self._installed() or 'none'})"
        )

    def _installed(self) -> TorchVersion | None:
        try:
            return TorchVersion(importlib.metadata.version(self.lib).split("+")[0])
        except importlib.metadata.PackageNotFoundError:
            return None


def as_checkers(given: Checker | Iterable[Checker] | None) -> tuple[Checker, ...]:
    """Return one checker, several or none as a tuple.

    Raises:
        ConfigError: If one is neither callable nor has a method ``check``.
    """
    if given is None:
        return ()
    checkers: Any = tuple(given) if isinstance(given, list | tuple) else (given,)
    for checker in checkers:
        if not callable(getattr(checker, "check", checker)):
            raise ConfigError(f"a checker must be callable or have a method 'check', got {checker!r}")
    return tuple(checkers)


def objection(checkers: Iterable[Checker], env: Mapping[str, Any]) -> str | None:
    """Return why the checkers decline, or None if all agree."""
    for checker in checkers:
        check: Any = getattr(checker, "check", checker)
        if not check(env):
            named = (
                str(checker) if isinstance(checker, LibVersionChecker) else getattr(checker, "__name__", repr(checker))
            )
            return f"checker {named} says no"
    return None
