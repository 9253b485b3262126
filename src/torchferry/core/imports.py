"""Importing a library that would otherwise use another one."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def import_without(name: str, absent: str) -> Any:
    """Import a module as if a package that it makes use of were not installed.

    A module that is imported already is returned as it is.

    Args:
        name: The module.
        absent: The package; whoever has imported it already keeps it.

    Raises:
        ImportError: If the module cannot be imported.
    """
    if sys.modules.get(name) is not None:
        return sys.modules[name]
    seen = {other: module for other, module in sys.modules.items() if other.split(".")[0] == absent}
    for other in seen:
        del sys.modules[other]
    sys.modules[absent] = None  # type: ignore[assignment] # the documented way to make an import fail
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[absent]
        sys.modules.update(seen)
