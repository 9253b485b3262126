"""From a dotted name to what it names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Found:
    """What a dotted name leads to.

    Attributes:
        parent: The module, class or namespace that the last part was looked up on.
        attribute: The last part.
        value: As it is stored: a ``staticmethod`` or ``property`` object, not what it gives.
        inherited: It stands on a base of ``parent``, a class, and not on ``parent`` itself.
    """

    parent: Any
    attribute: str
    value: Any
    inherited: bool = False


@dataclass(frozen=True)
class Missing:
    """Why a dotted name leads nowhere.

    Attributes:
        reason: What is missing where.
        suggestion: The nearest name that exists; empty if none is near.
    """

    reason: str
    suggestion: str = ""


def find(name: str) -> Found | Missing:
    """Look a dotted name up, importing the modules in it."""
    top, *rest = name.split(".")
    try:
        value: Any = sys.modules.get(top) or importlib.import_module(top)
        path, found = top, None
        for part in rest:
            step = _step(value, path, part)
            if isinstance(step, Missing):
                return step
            found, value, path = step, step.value, f"{path}.{part}"
    except Exception as exc:  # noqa: BLE001 - importing a library may raise anything; it is said, not hidden
        if isinstance(exc, ModuleNotFoundError) and exc.name == top:
            return Missing(f"'{top}' is not installed", suggestion=_near(top, sys.modules))
        return Missing(f"importing it failed: {type(exc).__name__}: {exc}")
    return found or Missing(f"'{name}' is a module")


def _step(parent: Any, path: str, part: str) -> Found | Missing:
    if isinstance(parent, type):
        try:
            return Found(parent, part, inspect.getattr_static(parent, part), part not in vars(parent))
        except AttributeError:
            return _missing(parent, path, part)
    if not hasattr(parent, part) and hasattr(parent, "__path__") and importlib.util.find_spec(f"{path}.{part}"):
        importlib.import_module(f"{path}.{part}")
    if not hasattr(parent, part):
        return _missing(parent, path, part)
    return Found(parent, part, getattr(parent, part))


def _missing(parent: Any, path: str, part: str) -> Missing:
    near = _near(part, dir(parent))
    return Missing(f"'{path}' has no '{part}'", suggestion=f"{path}.{near}" if near else "")


def _near(name: str, known: Any) -> str:
    return next(iter(difflib.get_close_matches(name, [k for k in known if "." not in k], n=1)), "")
