"""Loading weights into a module, without running what is in the file."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.errors import CheckpointError
from torchferry.core.files import require_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Where the usual training frameworks keep the weights inside a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "params_ema", "params", "net", "module", "weights")
_SHOWN = 8


def load_checkpoint(model: torch.nn.Module, path: str | Path, *, unsafe: bool = False) -> list[str]:
    """Copy a checkpoint's weights into a module.

    A state dict nested under a usual key is found, and a common prefix of its keys (``module.``, ``generator.``) is
    stripped when that makes it fit.

    Args:
        model: Changed in place.
        path: A safetensors file, or one that ``torch.save`` wrote.
        unsafe: Let a pickled checkpoint run the code that it holds. Only for files whose author you trust.

    Returns:
        What was done besides copying, one sentence each.

    Raises:
        MissingFileError: If there is no file.
        CheckpointError: If it cannot be read, would run code, or does not fit; lists the keys.
    """
    path = require_file(path, "checkpoint")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, unsafe)
    wanted = model.state_dict()
    notes: list[str] = []
    best: tuple[int, str, dict[str, torch.Tensor]] | None = None
    for label, weights in _candidates(loaded):
        common = len(weights.keys() & wanted.keys())
        if best is None or common > best[0]:
            best = (common, label, weights)
        if wanted.keys() == weights.keys():
            break
    if best is None:
        raise CheckpointError(f"checkpoint '{path}' holds no tensors", hint="save model.state_dict()")
    common, label, weights = best
    _require_fit(path, wanted, weights)
    if label:
        notes.append(f"checkpoint: {label}")
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as exc:
        raise CheckpointError(f"checkpoint '{path}' does not fit the model: {exc}") from exc
    return notes


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"'{path}' is not a whole safetensors file: {exc}", hint="save or download it again") from exc


def _read_torch(path: Path, unsafe: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not unsafe, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as exc:
        if "weights_only" not in str(exc).lower() and "Unsupported" not in str(exc):
            raise CheckpointError(f"'{path}' is not a whole checkpoint: {exc}") from exc
        raise CheckpointError(
            f"checkpoint '{path}' is pickled with code in it, which loading would run; refused",
            hint="save model.state_dict() or safetensors instead; or, if you trust its author, say --unsafe-checkpoint",
        ) from exc
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, ImportError) as exc:
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise CheckpointError(f"'{path}' is not a whole checkpoint: {reason}", hint="save or download it again") from exc


def _candidates(loaded: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield state dicts that the file may mean, the plainest first, each with what was done to get it."""
    for where, weights in _state_dicts(loaded):
        nested = f"weights found under '{where}'" if where else ""
        yield nested, weights
        heads = dict.fromkeys(key.partition(".")[0] for key in weights if "." in key)
        for head in heads:
            inner = {key.removeprefix(f"{head}."): value for key, value in weights.items() if key.startswith(f"{head}.")}
            left = len(weights) - len(inner)
            said = f"prefix '{head}.' stripped" + (f", {left} other keys left out" if left else "")
            yield ", ".join(filter(None, [nested, said])), inner


def _state_dicts(loaded: Any, where: str = "") -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    if isinstance(loaded, torch.nn.Module):
        loaded = loaded.state_dict()
    if not isinstance(loaded, dict):
        return
    tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield where, tensors
    for key in _NESTED:
        if isinstance(loaded.get(key), dict | torch.nn.Module):
            yield from _state_dicts(loaded[key], f"{where}.{key}" if where else key)


def _require_fit(path: Path, wanted: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    problems = []
    missing = [key for key in wanted if key not in weights]
    unexpected = [key for key in weights if key not in wanted]
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, the model has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in weights and weights[key].shape != wanted[key].shape
    ]
    for what, keys in (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes)):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            problems.append(f"{what}: {', '.join(keys[:_SHOWN])}{more}")
    if problems:
        raise CheckpointError(
            f"checkpoint '{path}' does not fit the model; " + "; ".join(problems),
            hint="check that the factory builds the architecture that the checkpoint was saved from",
        )
