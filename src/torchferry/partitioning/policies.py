"""Cuts that have a name, such as that of two-stage detectors. Codebases register them; there are none by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_POLICIES: dict[tuple[str, str], tuple[Mapping[str, Any], ...]] = {}


def register_policy(codebase: str, name: str, partition_cfg: Sequence[Mapping[str, Any]]) -> None:
    """Give a cut a name, under which a config finds it; a cut of the same codebase and name is replaced.

    Args:
        codebase: Whose models it is for, such as the name of the library that has them.
        name: Of the cut.
        partition_cfg: What a config would say in ``partition_config.partition_cfg``.
    """
    _POLICIES[codebase, name] = tuple(partition_cfg)


def find_policy(name: str, codebase: str | None = None) -> tuple[Mapping[str, Any], ...]:
    """Return the parts of a cut.

    Args:
        name: As it was registered.
        codebase: Whose; None where only one has a cut of this name.

    Raises:
        ConfigError: If there is none of this name, or several codebases have one.
    """
    asked = [key for key in _POLICIES if codebase in (None, key[0])]
    found = [key for key in asked if key[1] == name]
    if len(found) == 1:
        return _POLICIES[found[0]]
    if found:
        owners = ", ".join(f"'{owner}'" for owner, _ in found)
        raise ConfigError(f"'{name}' is a partition of several codebases: {owners}", hint="say which codebase is meant")
    of = f" of '{codebase}'" if codebase else ""
    raise ConfigError(f"there is no partition '{name}'{of}", hint=did_you_mean(name, {known for _, known in asked}))
