"""Sections of config files: what is wrong with one, by the names of its keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from torchferry.core.errors import ConfigError, did_you_mean

_Read = TypeVar("_Read", bound=BaseModel)


def read_section(section: type[_Read], values: Mapping[str, Any], origin: str, *, also: Iterable[str] = ()) -> _Read:
    """Check a dictionary against the fields of a section.

    Args:
        section: Its class.
        values: The dictionary.
        origin: Where it came from, for the message.
        also: Keys of its outermost table that are read elsewhere, for the hint.

    Raises:
        ConfigError: If a key is unknown (the nearest valid one is named), missing, or has a wrong value.
    """
    try:
        return section.model_validate(values)
    except ValidationError as exc:
        problems = [_word(error, section, also) for error in exc.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(problems)) from exc


def _word(error: Any, section: type[BaseModel], also: Iterable[str]) -> str:
    *parents, last = error["loc"] or ("",)
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _fields_at(section, parents) + ([] if parents else list(also))
        return f"unknown key '{key}' ({did_you_mean(str(last), known)})"
    if error["type"] == "missing":
        return f"'{key}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], Mapping):  # what is wrong with a whole table, the message says itself
        return f"'{key}': {message}" if key else message
    return f"'{key}': {message}, got {error['input']!r}"


def _fields_at(section: type[BaseModel], location: list[Any]) -> list[str]:
    """Return the valid keys at a place in a section."""
    current = section
    for part in location:
        field = current.model_fields.get(part)
        if field is not None:  # else a name or number inside a table or list
            current = next(_models(field.annotation), current)
    return sorted(current.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
