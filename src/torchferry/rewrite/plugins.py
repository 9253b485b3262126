"""Rewriters that other packages bring, by the entry-point group ``torchferry.rewriters``."""

from __future__ import annotations

import functools
import importlib.metadata

from torchferry.core.report import Finding

GROUP = "torchferry.rewriters"


@functools.cache
def load_plugins() -> tuple[Finding, ...]:
    """Import what every entry point of the group names, once; call it if it is a function.

    An entry point is a module whose import registers rewriters, or a function without parameters that does.

    Returns:
        A warning for each that fails; the others are loaded all the same.
    """
    troubles = []
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            loaded = point.load()
            if callable(loaded):
                loaded()
        except Exception as exc:  # noqa: BLE001 - it is somebody else's code; one plugin must not stop all work
            troubles.append(
                Finding(
                    "rewriter-plugin",
                    "warning",
                    f"the rewriters of '{point.name}' ({point.value}) cannot be loaded: {type(exc).__name__}: {exc}",
                    hint=f"repair or uninstall the package that declares it in the group {GROUP}",
                )
            )
    return tuple(troubles)
