"""Compiled artefacts, their sessions, and what a backend must offer.

A backend is a folder under ``backends/`` with a module whose name ``BACKEND`` satisfies ``Backend``. It writes files
in ``compile`` and returns a ``Session`` from ``open``; everything about names, shapes, ranges and packages is done
here, once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import platform
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from torchferry.core.errors import BackendError, FormatError, InputError, IntegrityError, UnsupportedError
from torchferry.core.files import require_file, write_text
from torchferry.core.signature import Signature  # noqa: TC001 - pydantic reads the annotations
from torchferry.core.target import Target

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]


RECORD_FILE = "engine.json"


@dataclass(frozen=True)
class Availability:
    """Whether an engine can be used on this machine.

    Attributes:
        ok: True if it can.
        version: The engine's version, if installed.
        reason: Why not, with the command that mends it.
        can_run: False if it can only compile here, for other machines; ``reason`` says why.
    """

    ok: bool
    version: str | None = None
    reason: str = ""
    can_run: bool = True


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do here.

    Attributes:
        precisions: The precisions it really computes in on this machine.
        max_opset: The newest opset of the default ONNX domain that it reads.
        dynamic_shapes: True if one compiled engine runs at many sizes.
        general: False if it takes some graphs only, so that nothing is run on it unless somebody named it.
        proves: True if ``compile`` has run what it wrote, or wrote the graph itself.
        devices: The names that ``Target.device`` may have besides the default, or how they begin.
        options: The names that ``Target.options`` may have.
        fast: False if it is there to check others by, so that no search for the fastest tries it.
        symmetric_int8: True if what it computes in int8 must be signed, with 0 for zero.
    """

    precisions: tuple[str, ...]
    max_opset: int
    dynamic_shapes: bool
    general: bool = True
    proves: bool = False
    devices: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    fast: bool = True
    symmetric_int8: bool = False


def check_capable(target: Target, able: Capabilities) -> None:
    """Check that an engine can do here what a target asks.

    Raises:
        UnsupportedError: If it does not compute in this precision, or not on this device.
    """
    if target.precision not in able.precisions:
        raise UnsupportedError(
            f"'{target.backend}' does not compute in {target.precision} here; it offers {', '.join(able.precisions)}",
            hint=f"choose precision {' or '.join(able.precisions)}, or another backend",
        )
    if target.device != Target.device and not target.device.startswith(able.devices or ("\0",)):
        known = " or ".join(f"'{name}'" for name in able.devices or (Target.device,))
        raise UnsupportedError(f"'{target.backend}' runs on {known} here, not on '{target.device}'")


@dataclass(frozen=True)
class LayerTime:
    """What one layer of a loaded engine takes.

    Attributes:
        name: As the engine calls it; where it keeps the graph's names, the node's.
        kind: The operator, or the engine's own kernel.
        seconds: Median wall time a run.
    """

    name: str
    kind: str
    seconds: float


def layer_times(runs: Sequence[Mapping[tuple[str, str], float]]) -> tuple[LayerTime, ...]:
    """Return the median of every layer over some runs, in the order in which they ran first.

    Args:
        runs: For each run the seconds by name and kind; a layer that is missing in one took none.
    """
    keys = dict.fromkeys(key for run in runs for key in run)
    return tuple(LayerTime(*key, statistics.median(run.get(key, 0.0) for run in runs)) for key in keys)


class Graph(Protocol):
    """What a backend may ask of an exported model."""

    @property
    def signature(self) -> Signature:
        """Names, dtypes, shapes and valid sizes."""
        ...

    @property
    def model(self) -> Any:
        """The graph itself, an ``onnx_ir.Model``."""
        ...

    def save(self, path: Path) -> None:
        """Write the ONNX file, with external data beside it where it is large."""
        ...

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some of these changed."""
        ...


class Backend(Protocol):
    """One inference engine."""

    name: str

    def availability(self) -> Availability:
        """Tell whether the engine is installed, without importing it if that can be helped."""
        ...

    def load(self) -> None:
        """Import the engine's library, so that a broken installation shows.

        Raises:
            MissingBackendError: If it is not installed; also for other failures of its import, as their cause.
        """
        ...

    def capabilities(self) -> Capabilities:
        """Tell what the engine can do here; needs the engine."""
        ...

    def compile(self, graph: Graph, target: Target, folder: Path) -> tuple[str, ...]:
        """Write everything that ``open`` needs into an empty folder.

        Returns:
            What was done to the graph to make it fit, in order; empty if nothing was.

        Raises:
            BackendError: If the engine refuses the graph.
        """
        ...

    def trial(self, graph: Graph, folder: Path) -> Session:
        """Load a graph as it is, to run it a few times in the caller's own thread.

        Weights are shared with the graph where the engine can do that.

        Args:
            graph: The graph.
            folder: An empty folder that lives as long as the session.

        Raises:
            BackendError: If the engine refuses the graph, or does not run here.
        """
        ...

    def open(self, engine: Engine, **options: Any) -> Session:
        """Load a compiled engine.

        Args:
            engine: What ``compile`` wrote.
            **options: The engine's own; those that several have are ``threads``, and ``profile=True`` for
                ``Session.profile``. ``open_options`` tells which it takes.

        Raises:
            BackendError: If the engine cannot load it.
        """
        ...


def open_options(backend: Backend) -> frozenset[str]:
    """Return the names of the options that a backend's ``open`` takes."""
    return frozenset(inspect.signature(backend.open).parameters) - {"engine"}


def get_backend(name: str) -> Backend:
    """Find a backend by name in the table ``torchferry.backends``.

    The table stands in a higher layer and is looked up by its name, so that opening an engine needs no caller to carry
    the table around.

    Raises:
        MissingBackendError: If no backend has this name.
    """
    backend: Backend = importlib.import_module("torchferry.backends").get(name)
    return backend


@dataclass(frozen=True)
class Engine:
    """A compiled model on disk.

    Attributes:
        folder: Where its files are; ``files`` are relative to it.
        target: What it was compiled for.
        signature: Names, dtypes, shapes and valid sizes.
        versions: Of the engine and everything that made the files.
        files: Relative paths, in order.
        adaptations: What was done to the graph to make it fit the engine, in order.
    """

    folder: Path
    target: Target
    signature: Signature
    versions: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    adaptations: tuple[str, ...] = ()

    def save(self) -> None:
        """Write ``engine.json`` into the folder, so that ``Engine.load`` finds everything again.

        Raises:
            OutputError: If it cannot be written.
        """
        write_text(self.folder / RECORD_FILE, _adapter().dump_json(self, exclude={"folder"}, indent=2).decode())

    @staticmethod
    def load(folder: str | Path) -> Engine:
        """Read an engine that ``compile`` wrote.

        Raises:
            MissingFileError: If there is none.
            FormatError: If its record cannot be read.
        """
        path = require_file(Path(folder) / RECORD_FILE, "engine")
        try:
            values = json.loads(path.read_bytes())
            engine: Engine = _adapter().validate_python({**values, "folder": Path(folder)})
        except (ValueError, TypeError) as exc:
            raise FormatError(f"'{path}' is not the record of an engine: {exc}", hint="compile it again") from exc
        return engine

    def path(self, file: str) -> Path:
        """Return the path of one of its files.

        Raises:
            IntegrityError: If the engine does not list the file, or it is not there.
        """
        if file not in self.files or not (self.folder / file).is_file():
            raise IntegrityError(f"the engine in '{self.folder}' has no file '{file}'", hint="compile it again")
        return self.folder / file

    def open(self, **options: Any) -> Session:
        """Load it; use the result as a context manager.

        Args:
            **options: The backend's own, such as ``threads=2``.

        Raises:
            MissingBackendError: If the engine is not installed here.
            UnsupportedError: If it is, and does not do here what it was compiled for.
            BackendError: If it cannot load the files; says so if another version of the engine wrote them.
        """
        backend = get_backend(self.target.backend)
        if (self.target.precision, self.target.device) != ("fp32", Target.device) and backend.availability().ok:
            check_capable(self.target, backend.capabilities())  # what every engine does needs no asking
        try:
            return backend.open(self, **options)
        except BackendError as exc:
            name, installed = self.target.backend, backend.availability().version
            recorded = self.versions.get(name, installed)
            # A subclass says what is missing here, whatever the version.
            if type(exc) is not BackendError or recorded == installed:
                raise
            raise BackendError(
                f"{exc.message}; it was compiled with {name} {recorded}, and {installed} is installed",
                where=exc.where,
                hint=f"compile it again, or install {name} {recorded}",
            ) from exc


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Engine)


class Session(ABC):
    """A loaded engine. Checks every call against the signature, so that a backend only has to run.

    A session may be used from several threads at once, and must be closed, best by ``with``.
    """

    _KNOWN_SHAPES = 64  # checked shapes to remember; a server sees few

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._names = signature.input_names
        self._output_names = signature.output_names
        self._checked: set[Any] = set()
        self._closed = False

    @abstractmethod
    def _execute(self, feeds: dict[str, Array]) -> Sequence[Array]:
        """Run on checked inputs; return the outputs in the signature's order."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of the engine's memory; called once."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: For every input name a numpy array of the signature's dtype and shape.

        Returns:
            For every output name a numpy array, in the graph's order.

        Raises:
            InputError: If an input is missing, unknown, or of a dtype, rank or size that the model does not take.
            BackendError: If the engine fails, or the session is closed.
        """
        if self._closed:
            raise BackendError("the session is closed", hint="open the engine again")
        if not isinstance(inputs, Mapping):
            raise InputError(f"inputs must be a dictionary of arrays by name, got {type(inputs).__name__}")
        feeds = dict(inputs)
        try:
            key = (len(feeds), *[(type(a), a.shape, a.dtype) for a in map(feeds.__getitem__, self._names)])
        except (KeyError, AttributeError):
            key = None
        if key not in self._checked:
            self.signature.check(feeds)
            if len(self._checked) >= self._KNOWN_SHAPES:
                self._checked.clear()
            self._checked.add(key)
        return dict(zip(self._output_names, self._execute(feeds), strict=True))

    def profile(self) -> tuple[LayerTime, ...]:
        """Return the time of every layer over the runs so far, and stop measuring them.

        Empty if the engine does not tell, or was not opened with ``profile=True``.
        """
        return ()

    def close(self) -> None:
        """Release the engine; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def platform_versions() -> dict[str, str]:
    """Versions of Python, the system and numpy, for manifests and reports."""
    return {"python": platform.python_version(), "platform": platform.platform(), "numpy": np.__version__}
