"""Running an engine where it may take the whole process down.

Engines are seldom run on inputs of size 0, and some crash on them (ONNX Runtime 1.31: Einsum divides by zero, LSTM
aborts). A forked child finds out without any harm, and shares the weights with its parent.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import select
import signal
import warnings
from typing import TYPE_CHECKING, Any

from torchferry.core.errors import BackendError, TorchferryError

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMEOUT = 120.0  # seconds; what takes longer hangs


def run_isolated(run: Callable[[], Any]) -> Any:
    """Return what a function returns, having run it in a forked child.

    Args:
        run: Uses no threads, for a forked child has none but its own; its result can be pickled.

    Raises:
        BackendError: If it crashes or hangs, if it raises a ``TorchferryError``, or if this system cannot fork.
    """
    if not hasattr(os, "fork"):
        raise BackendError("it is not run, since this system cannot fork and the engine might crash")
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads; the child uses none of them
        child = os.fork()
    if child == 0:
        os.close(receiver)
        _answer(run, sender)
    os.close(sender)
    try:
        answer = _read(receiver)
    finally:
        os.close(receiver)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        raise BackendError("the engine crashes")
    result, message = pickle.loads(answer)  # noqa: S301 - from our own child
    if message is not None:
        raise BackendError(message)
    return result


def _answer(run: Callable[[], Any], sender: int) -> None:
    """Run in the child, send the result, and end without any of the parent's clean-up."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)  # a crash talks
        try:
            answer: tuple[Any, str | None] = (run(), None)
        except TorchferryError as exc:
            answer = (None, exc.message)
        with os.fdopen(sender, "wb") as file:
            pickle.dump(answer, file)
    finally:
        os._exit(0)


def _read(receiver: int) -> bytes:
    """Read until the child closes its end; nothing if that takes too long."""
    parts: list[bytes] = []
    while select.select([receiver], [], [], _TIMEOUT)[0]:
        part = os.read(receiver, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return b""
