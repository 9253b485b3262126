"""Checkpoints of OpenMMLab: from a path, or fetched once over https and checked by the digits in their names."""

from __future__ import annotations

import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from torchferry.core.errors import CheckpointError, ConfigError, IntegrityError
from torchferry.core.files import new_files, output_errors, sha256
from torchferry.exporter.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[int, int | None], None]

CACHE_VARIABLE = "TORCHFERRY_CACHE"
_DIGITS = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
_MOST_BYTES = 8 << 30
_SILENCE_SECONDS = 30  # without a byte
_MOST_SECONDS = 3600
_CHUNK = 1 << 20
# How numpy's parts are called in files that older and newer versions of it wrote.
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


def is_address(checkpoint: str) -> bool:
    """Tell an address from a path."""
    return "://" in checkpoint


def load_weights(model: torch.nn.Module, path: str | Path, *, unsafe: bool = False) -> list[str]:
    """Copy a checkpoint of OpenMMLab into a model, without running what is in the file.

    Besides tensors it may hold the training's history, as mmengine saves it, and numbers and arrays of numpy.

    Args:
        model: Changed in place.
        path: The file.
        unsafe: Let a pickled checkpoint run the code that it holds. Only for files whose author you trust.

    Returns:
        What was done besides copying.

    Raises:
        MissingFileError, CheckpointError: As ``load_checkpoint``.
    """
    import numpy as np
    from numpy._core import multiarray

    kinds: list[Any] = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    parts: list[Any] = [
        (getattr(multiarray, name), f"{home}.{name}") for name in ("_reconstruct", "scalar") for home in _NUMPY_MODULES
    ]
    history: list[Any] = [(_History, "mmengine.logging.history_buffer.HistoryBuffer"), (_nothing, "builtins.getattr")]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *kinds, *parts, *history]):
        return load_checkpoint(model, path, unsafe=unsafe)


class _History:
    """Takes the place of mmengine's ``HistoryBuffer``, whose state names its own methods, and keeps nothing."""

    def __setstate__(self, state: Any) -> None:
        """Drop it."""


def _nothing(*_: Any) -> None:
    """Take the place of ``getattr``, with which a pickle names a method."""


def fetch(
    address: str,
    folder: Path | None = None,
    *,
    progress: Progress | None = None,
    opener: urllib.request.OpenerDirector | None = None,
) -> Path:
    """Fetch a checkpoint, once, and check it by the digits in its name.

    Args:
        address: https, of a file called ``name-XXXXXXXX.pth``: the first digits of its SHA-256.
        folder: Where it is kept; by default ``$TORCHFERRY_CACHE``, else ``torchferry`` in the user's cache.
        progress: Told of the bytes so far, and of all if that is known.
        opener: In place of one that follows redirects to https alone.

    Returns:
        The file.

    Raises:
        ConfigError: If the address is not https, or its name has no digits to check it by.
        CheckpointError: If it cannot be fetched, or is too large.
        IntegrityError: If its digits are not the name's; nothing is kept.
        OutputError: If the folder cannot be written.
    """
    _require_https(address)
    name = Path(urlsplit(address).path).name
    digits = _DIGITS.search(name)
    if digits is None:
        raise ConfigError(
            f"'{name}' has no digits of its SHA-256 in its name, such as 'model-0123abcd.pth', to check it by",
            hint="download it yourself, check it, and give its path",
        )
    folder = folder or _cache_folder()
    kept = folder / name
    if kept.is_file() and sha256(kept).startswith(digits[1]):
        return kept
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with new_files(folder) as partial:
        got = _download(address, partial / name, progress, opener or _https_opener())
        if not got.startswith(digits[1]):
            (partial / name).unlink()
            raise IntegrityError(
                f"'{address}' is not the file that its name promises: its SHA-256 starts with {got[: len(digits[1])]}, "
                f"expected {digits[1]}",
                hint="nothing was kept; try again, or ask its author",
            )
    return kept


def _require_https(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme != "https" or not parts.hostname:
        raise ConfigError(
            f"checkpoint '{address}' must be an https address, got '{parts.scheme}'",
            hint="download it yourself and give its path",
        )


def _cache_folder() -> Path:
    told = os.environ.get(CACHE_VARIABLE)
    if told:
        return Path(told) / "checkpoints"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchferry" / "checkpoints"


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https and refuses others."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        try:
            _require_https(newurl)
        except ConfigError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _https_opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_OnlyHttps())


def _download(address: str, file: Path, progress: Progress | None, opener: urllib.request.OpenerDirector) -> str:
    """Write what an address gives, and return its SHA-256."""
    digest = hashlib.sha256()
    begun = time.monotonic()
    try:
        with opener.open(address, timeout=_SILENCE_SECONDS) as answer:
            length = answer.headers.get("Content-Length")
            total = int(length) if length and length.isdecimal() else None
            if total is not None and total > _MOST_BYTES:
                raise CheckpointError(f"'{address}' has {total >> 20} MiB, more than {_MOST_BYTES >> 20}")
            done = 0
            with file.open("wb") as out:
                while chunk := answer.read(_CHUNK):
                    done += len(chunk)
                    if done > _MOST_BYTES or time.monotonic() - begun > _MOST_SECONDS:
                        raise CheckpointError(
                            f"'{address}' does not end", hint="download it yourself and give its path"
                        )
                    digest.update(chunk)
                    out.write(chunk)
                    if progress is not None:
                        progress(done, total)
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as exc:
        if isinstance(exc, urllib.error.HTTPError):
            exc.close()
        reason = getattr(exc, "reason", None) or exc
        raise CheckpointError(
            f"'{address}' cannot be fetched: {reason}", hint="check the address and the network"
        ) from exc
    if total is not None and done != total:
        raise CheckpointError(f"'{address}' ended after {done} of {total} bytes", hint="try again")
    return digest.hexdigest()
