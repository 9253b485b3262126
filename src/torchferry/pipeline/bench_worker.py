"""One contender of a benchmark, in a process of its own.

It reads lines of JSON and answers each with one, on what was its standard output; whatever else prints there goes to
standard error:

==================================================  ==========================================================
``{"open": contender, "inputs": "in.npz",           ``{"open_seconds": …, "first_seconds": …, "version": …}``
``"outputs": "out.npz", "threads": 2}``
``{"run": 10, "within": 0.5}``                      ``{"seconds": […], "cpu_seconds": …}``
``{"peak": true}``                                  ``{"mib": …}``
``{"profile": 10}``                                 ``{"layers": [[name, kind, seconds], …]}``
whatever fails                                      ``{"error": "what"}``
==================================================  ==========================================================

``within`` may be left out; else no run begins later than these seconds after the first.
It ends with its standard input, so that no worker outlives the process that started it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.errors import InputError, TorchferryError
from torchferry.pipeline.steps import peak_mib

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torchferry.core.engine import Array, Engine, LayerTime, Session


class Opened(ABC):
    """A contender that is ready to run.

    Attributes:
        version: Of what runs it.
    """

    version = ""

    @abstractmethod
    def run(self) -> Any:
        """Run once on the inputs that it was opened with."""

    @abstractmethod
    def outputs(self, given: Any) -> list[Array]:
        """Return what ``run`` gave as arrays."""

    def profile(self, runs: int) -> tuple[LayerTime, ...]:  # noqa: ARG002 - most have none
        """Run some more, and return the time of every layer; empty if it cannot be told."""
        return ()


class _EngineContender(Opened):
    def __init__(self, engine: Engine, inputs: dict[str, Array], threads: int) -> None:
        from torchferry.core.engine import get_backend, open_options

        self._engine = engine
        self._inputs = inputs
        self._options = {"threads": threads, "profile": True}
        known = open_options(get_backend(engine.target.backend))
        self._options = {name: value for name, value in self._options.items() if name in known}
        self._session = self._opened(profile=False)
        self.version = engine.versions.get(engine.target.backend, "")

    def _opened(self, *, profile: bool) -> Session:
        return self._engine.open(**{k: v for k, v in self._options.items() if profile or k != "profile"})

    def run(self) -> dict[str, Array]:
        return self._session.run(self._inputs)

    def outputs(self, given: Mapping[str, Array]) -> list[Array]:
        return list(given.values())

    def profile(self, runs: int) -> tuple[LayerTime, ...]:
        if "profile" not in self._options:
            return ()
        self._session.close()
        self._session = self._opened(profile=True)
        for _ in range(runs):
            self.run()
        return self._session.profile()


class _TorchContender(Opened):
    def __init__(self, spec: dict[str, Any], inputs: dict[str, Array], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.version = torch.__version__
        model = _built(spec)
        names = _parameters(model)
        if set(inputs) <= set(names):
            self._call = {name: torch.from_numpy(array) for name, array in inputs.items()}
        else:  # the graph's inputs have names of their own, in the order of forward's parameters
            self._call = dict(zip(names, map(torch.from_numpy, inputs.values()), strict=False))
        if len(self._call) != len(inputs):
            raise InputError(f"the model takes {len(names)} inputs by name, got {len(inputs)}: {', '.join(inputs)}")
        self._model: Any = torch.compile(model) if spec["compiled"] else model
        self._mode = torch.inference_mode

    def run(self) -> Any:
        with self._mode():
            return self._model(**self._call)

    def outputs(self, given: Any) -> list[Array]:
        import torch
        from torch.utils._pytree import tree_leaves

        leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        # numpy has no bfloat16
        return [(leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy() for leaf in leaves]


def _built(spec: dict[str, Any]) -> Any:
    """Return the model that the driver has saved, or build it from its reference.

    Building needs all that exporting does, in time and memory, so a saved model is preferred. What it is read from is
    the driver's own file.
    """
    if "section" in spec:
        from torchferry.pipeline.config import ModelSection
        from torchferry.pipeline.loading import build_model

        return build_model(ModelSection.model_validate(spec["section"]))[0].eval()
    import torch

    for name, file in spec["modules"].items():  # of a model from file.py:factory, which cannot be imported by name
        found = importlib.util.spec_from_file_location(name, file)
        assert found is not None
        assert found.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules[name])
    return torch.load(spec["file"], weights_only=False).eval()


def _parameters(model: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def open_contender(spec: dict[str, Any], inputs: dict[str, Array], threads: int) -> Opened:
    """Open what ``bench`` describes: a compiled engine, an engine of a package, or a PyTorch model."""
    if spec["kind"] == "torch":
        return _TorchContender(spec, inputs, threads)
    if spec["kind"] == "engine":
        from torchferry.core.engine import Engine

        return _EngineContender(Engine.load(spec["folder"]), inputs, threads)
    from torchferry.package import load

    package = load(spec["folder"])
    engines = {entry.id: item for entry, item in zip(package.manifest.engines, package.engines, strict=True)}
    return _EngineContender(engines[spec["id"]], inputs, threads)


class Server:
    """Answers the driver's requests, one after the other.

    Args:
        opener: Makes a contender from its description, the inputs and the number of threads.
    """

    def __init__(self, opener: Callable[[dict[str, Any], dict[str, Array], int], Opened]) -> None:
        self._opener = opener
        self._opened: Opened | None = None

    def serve(self) -> None:
        """Answer until there is no more request."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its workers itself
        answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                answer = self.answer(json.loads(line))
            except TorchferryError as exc:
                answer = {"error": exc.message}
            except Exception as exc:  # noqa: BLE001 - an engine or a model may raise anything; its row says what
                answer = {"error": f"{type(exc).__name__}: {exc}"}
            print(json.dumps(answer), file=answers)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what one request asks for."""
        if "open" in request:
            return self._open(request)
        assert self._opened is not None
        if "run" in request:
            return self._run(self._opened, request["run"], request.get("within"))
        if "profile" in request:
            return {"layers": [astuple(layer) for layer in self._opened.profile(request["profile"])]}
        return {"mib": peak_mib()}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        with np.load(request["inputs"], allow_pickle=False) as file:
            inputs = dict(file)
        started = time.perf_counter()
        opened = self._opener(request["open"], inputs, request["threads"])
        ready = time.perf_counter()
        given = opened.run()
        done = time.perf_counter()
        self._opened = opened
        # By position, since names may differ between contenders; numbers alone can be compared.
        numbers = [array for array in opened.outputs(given) if array.dtype.kind in "biuf"]
        arrays = {str(place): array for place, array in enumerate(numbers)}
        np.savez(Path(request["outputs"]), **arrays)  # type: ignore[arg-type]
        return {"open_seconds": ready - started, "first_seconds": done - ready, "version": opened.version}

    def _run(self, opened: Opened, count: int, within: float | None) -> dict[str, Any]:
        """Time some runs, after one that brings the contender's data back into the caches."""
        opened.run()
        seconds: list[float] = []
        cpu, begun = time.process_time(), time.perf_counter()
        for _ in range(count):
            start = time.perf_counter()
            if seconds and within is not None and start - begun > within:
                break
            opened.run()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "cpu_seconds": (time.process_time() - cpu) / len(seconds)}


if __name__ == "__main__":
    Server(open_contender).serve()
