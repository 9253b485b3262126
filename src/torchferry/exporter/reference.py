"""From ``module:factory`` or ``file.py:factory`` to a module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.errors import ModelError, TorchferryError, did_you_mean
from torchferry.core.files import require_file
from torchferry.graph.provenance import is_library

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

# What a user's code may end with besides Ctrl-C; a script without a guard for __main__ likes to call sys.exit.
_ENDS = (Exception, SystemExit)


def load_model(reference: str, arguments: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """Build a module from a reference. This imports and runs the code that the reference names.

    Args:
        reference: ``package.module:factory`` or ``path/to/file.py:factory``; the factory is a function or class that
            returns a ``torch.nn.Module``, or such a module itself.
        arguments: Keyword arguments of the factory.

    Raises:
        ModelError: If the reference cannot be resolved, the factory raises, or its result is not a module.
        MissingFileError: If the file does not exist.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ModelError(
            f"model reference '{reference}' must be 'module:factory' or 'file.py:factory'",
            hint="name the function or class that builds the model after a colon",
        )
    module = _import_file(place) if place.endswith(".py") else _import_module(place)
    if not hasattr(module, name):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ModelError(f"'{place}' has no '{name}'", hint=did_you_mean(name, known))
    factory = getattr(module, name)
    if isinstance(factory, torch.nn.Module):
        return factory
    if not callable(factory):
        raise ModelError(
            f"'{reference}' is of type {type(factory).__name__}, not a function or class that builds a model"
        )
    try:
        model = factory(**(arguments or {}))
    except _ENDS as exc:
        raise _users_failure(f"the factory '{reference}' raised", exc) from exc
    if not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"the factory '{reference}' returned a {type(model).__name__}, expected a torch.nn.Module",
            hint="return the model from the factory",
        )
    return model


def _import_file(place: str) -> ModuleType:
    path = require_file(place, "model file").resolve()
    name = f"torchferry_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up there
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # its neighbours can be imported, as when it is run as a script
    try:
        spec.loader.exec_module(module)
    except _ENDS as exc:
        del sys.modules[name]
        raise _users_failure(f"importing '{place}' raised", exc) from exc
    return module


def _import_module(place: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (place == exc.name or place.startswith(f"{exc.name}.")):
            raise ModelError(
                f"there is no module '{exc.name}'", hint="install it, or run from the folder that holds it"
            ) from exc
        raise _users_failure(f"importing '{place}' raised", exc) from exc
    except _ENDS as exc:
        raise _users_failure(f"importing '{place}' raised", exc) from exc


def _users_failure(what: str, exc: BaseException) -> TorchferryError:
    """Word the user's own exception with the frames of their traceback that are theirs."""
    if isinstance(exc, TorchferryError):
        return exc
    machinery = str(Path(importlib.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not is_library(frame.filename) and not frame.filename.startswith(machinery)
    ]
    lines = "".join(traceback.format_list(frames)).rstrip()
    return ModelError(
        f"{what} {type(exc).__name__}: {exc}" + (f"\n{lines}" if lines else ""), hint="make it work in Python first"
    )
