"""TensorRT itself: importing it, and what it logs."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchferry.core.errors import MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK = threading.Lock()  # one logger serves the whole process


@dataclass(frozen=True)
class Flavour:
    """One of the packages that go by the name of TensorRT.

    Attributes:
        name: The backend's.
        library: What to import.
        builds_ahead: True if it builds on a machine without a GPU, for the GPUs that it is told.
    """

    name: str
    library: str
    builds_ahead: bool

    def version(self) -> str | None:
        """Return the version that is installed; None if there is none."""
        if importlib.util.find_spec(self.library) is None:
            return None
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:  # installed under the name for one version of CUDA
            return str(self.load().__version__)

    def load(self) -> Any:
        """Import it.

        Raises:
            MissingBackendError: If it is not installed.
        """
        try:
            return importlib.import_module(self.library)
        except ImportError as exc:
            raise MissingBackendError(
                f"the engine '{self.name}' is not installed", hint=f"pip install 'torchferry[{self.name}]'"
            ) from exc

    @contextmanager
    def logger(self) -> Iterator[tuple[Any, list[str]]]:
        """Give TensorRT's logger, and the list to which it adds errors meanwhile. One user at a time."""
        with _LOCK:
            logger = _logger(self)
            logger.errors.clear()
            yield logger, logger.errors


@functools.cache
def _logger(flavour: Flavour) -> Any:
    """Return the one logger of a flavour, which TensorRT never lets go; its class needs the library."""
    library = flavour.load()

    class Logger(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()
