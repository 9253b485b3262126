"""Loading weights into a module, without running what is in the file."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.errors import CheckpointError
from torchferry.core.files import new_files, require_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# Where the usual training frameworks keep the weights inside a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "params_ema", "params", "net", "module", "weights")
_SHOWN = 8
_MAX_DEPTH = 4  # of nesting and of prefixes; only a hostile file goes deeper
# How torch.load words that a pickle names or calls something besides tensors.
_NAMES_CODE = re.compile(r"GLOBAL|reduce for unrecognized|add_safe_globals|TorchScript")
_PLAIN_PICKLE = tuple(bytes([0x80, protocol]) for protocol in (3, 4, 5))  # by pickle.dump; torch.save writes 2


def load_checkpoint(model: torch.nn.Module, path: str | Path, *, unsafe: bool = False) -> list[str]:
    """Copy a checkpoint's weights into a module.

    A state dict nested under a usual key is found, and prefixes of its keys (``module.``, ``generator.``) are stripped
    when that makes it fit. Other dtypes are converted to the model's.

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
    others = {
        str(weights[key].dtype).removeprefix("torch.") for key in wanted if weights[key].dtype != wanted[key].dtype
    }
    if others:
        notes.append(f"checkpoint: {', '.join(sorted(others))} weights converted to the model's dtype")
    return notes


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write a module's ``state_dict`` as safetensors, whole or not at all; replaced if it exists.

    Raises:
        OutputError: If it cannot be written.
    """
    from safetensors.torch import save

    path = path.absolute()
    with new_files(path.parent) as partial:
        # A copy of each, since safetensors refuses tensors that share memory.
        weights = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
        (partial / path.name).write_bytes(save(weights))


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(
            f"checkpoint '{path}' is not a whole safetensors file: {exc}", hint="save or download it again"
        ) from exc


def _read_torch(path: Path, unsafe: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle's protocols; what matters comes as an exception
            return torch.load(path, map_location="cpu", weights_only=not unsafe, mmap=zipfile.is_zipfile(path) or None)
    except Exception as exc:  # torch's readers raise anything on damaged data; with `unsafe`, the file's code does too
        if not unsafe and _runs_code(path, exc):
            named = re.search(r"GLOBAL (\S+)", str(exc))
            code = f"code in it ({named[1]})" if named else "code in it"
            raise CheckpointError(
                f"checkpoint '{path}' is pickled with {code}, which loading would run; refused",
                hint="save model.state_dict() or safetensors; or, if you trust its author, say --unsafe-checkpoint",
            ) from exc
        reason = re.split(r"\.\s|\n", str(exc).strip())[0] if not isinstance(exc, pickle.UnpicklingError) else ""
        raise CheckpointError(
            f"checkpoint '{path}' cannot be read: {type(exc).__name__}" + (f": {reason}" if reason else ""),
            hint="it is no checkpoint, or damaged; save or download it again",
        ) from exc


def _runs_code(path: Path, exc: Exception) -> bool:
    """Tell a file that wants to run code from one that is merely damaged."""
    if _NAMES_CODE.search(str(exc)):
        return True
    with path.open("rb") as file:
        return isinstance(exc, pickle.UnpicklingError) and file.read(2) in _PLAIN_PICKLE


def _candidates(loaded: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield state dicts that the file may mean, the plainest first, each with what was done to get it."""
    for where, weights in _state_dicts(loaded):
        yield from _stripped(weights, f"weights found under '{where}'" if where else "", may_leave_out=True)


def _stripped(
    weights: dict[str, torch.Tensor], said: str, *, may_leave_out: bool, depth: int = 0
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the weights, then without their prefixes one after the other; keys of other prefixes are left out once."""
    yield said, weights
    if depth == _MAX_DEPTH:
        return
    for head in dict.fromkeys(key.partition(".")[0] for key in weights if "." in key):
        inner = {key.removeprefix(f"{head}."): value for key, value in weights.items() if key.startswith(f"{head}.")}
        left = len(weights) - len(inner)
        if left and not may_leave_out:
            continue
        note = f"prefix '{head}.' stripped" + (f", {left} other keys left out" if left else "")
        joined = f"{said}, {note}" if said else note
        yield from _stripped(inner, joined, may_leave_out=not left and may_leave_out, depth=depth + 1)


def _state_dicts(loaded: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    if isinstance(loaded, torch.nn.Module):
        loaded = loaded.state_dict()
    if not isinstance(loaded, dict) or depth > _MAX_DEPTH:
        return
    tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield where, tensors
    for key in _NESTED:
        if isinstance(loaded.get(key), dict | torch.nn.Module):
            yield from _state_dicts(loaded[key], f"{where}.{key}" if where else key, depth + 1)


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
