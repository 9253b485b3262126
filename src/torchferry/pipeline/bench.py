"""The verb ``bench``: engines, and PyTorch, on the same inputs side by side."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torchferry import backends
from torchferry.core.engine import RECORD_FILE, Engine
from torchferry.core.errors import BackendError, ConfigError, MissingFileError, ModelError, did_you_mean
from torchferry.core.target import Target
from torchferry.package import MANIFEST_FILE, Package, load
from torchferry.pipeline.bench_driver import Contender, Plan, measure
from torchferry.pipeline.bench_report import BenchReport
from torchferry.pipeline.environment import machine, usable_cores
from torchferry.pipeline.inputs import read_inputs
from torchferry.pipeline.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.core.engine import Array
    from torchferry.core.signature import Signature
    from torchferry.pipeline.steps import Watcher

TorchMode = Literal["eager", "compile"]
TORCH_MODES: tuple[TorchMode, ...] = ("eager", "compile")
EVERY = "all"  # in place of backends: every one that is general and runs here
_ROWS = {"eager": "torch", "compile": "torch.compile"}


def bench(
    subjects: Any,
    inputs: Mapping[str, Array] | None = None,
    *,
    targets: Sequence[Target] = (),
    model: Any = None,
    torch_modes: Sequence[TorchMode] = TORCH_MODES,
    sizes: Mapping[str, int] | None = None,
    threads: int | None = None,
    rounds: int = 20,
    runs: int | None = None,
    warm_up: int = 5,
    profile: bool = False,
    watcher: Watcher | None = None,
) -> BenchReport:
    """Measure latency, throughput, memory and cold start of engines, interleaved, each in a process of its own.

    Args:
        subjects: One or several of: a ``Package`` or its folder, an ``Engine`` or its folder, and whatever ``compile``
            takes, such as the path of an ONNX file.
        inputs: Arrays by input name. Those that are missing are made: random, and the same at every call.
        targets: For a graph, what it is compiled for; ONNX Runtime if empty. For a package, which of its engines take
            part; all if empty.
        model: The PyTorch model to compare with: an ``nn.Module``, ``file.py:factory``, or a ``ModelSection``.
        torch_modes: How that model takes part.
        sizes: Of dynamic dimensions, for the inputs that are made.
        threads: Threads of each contender; the number of cores that this process may use if None.
        rounds: How often each contender is asked for some runs.
        runs: Runs a round; as many as take a tenth of a second if None.
        warm_up: Runs before the first round.
        profile: Also measure the layers, where an engine tells them.
        watcher: Told of every step.

    Returns:
        A row for each contender; one that fails has the reason in its row. Ratios are to the first that did not.

    Raises:
        ConfigError: If a number, size, input or target cannot be used, or there is nothing to measure.
        MissingFileError, FormatError, IntegrityError: If a subject cannot be read.
        ModelError: If the PyTorch model cannot be built.
        MissingBackendError: If an engine's name is not known.
    """
    subjects = list(subjects) if isinstance(subjects, list | tuple) else [subjects]
    _check_numbers(subjects, threads=threads, rounds=rounds, runs=runs, warm_up=warm_up)
    for target in targets:
        backends.get(target.backend)
    plan = Plan(threads or usable_cores(), rounds, runs, warm_up, profile)
    busy = {name: value for name, value in machine().items() if name in ("cpu", "cores", "load")}
    steps = Steps(watcher)
    with tempfile.TemporaryDirectory(prefix="torchferry-", ignore_cleanup_errors=True) as folder:
        found = [
            _contenders(subject, targets, Path(folder) / str(place), steps) for place, subject in enumerate(subjects)
        ]
        _check_known(dict(inputs or {}), dict(sizes or {}), [signature for signature, _ in found])
        contenders: list[Contender] = []
        for subject, (signature, specs) in zip(subjects, found, strict=True):
            arrays = made_inputs(signature, inputs or {}, sizes or {})
            before = f"{_name(subject)}/" if len(subjects) > 1 else ""
            contenders += [replace(spec, name=before + spec.name, inputs=arrays) for spec in specs]
        if model is not None:
            first = contenders[0].inputs
            contenders += [replace(spec, inputs=first) for spec in _torch(model, torch_modes, Path(folder))]
        rows = measure(contenders, plan, steps)
    shown = {shown_inputs(contender.inputs): None for contender in contenders}
    return BenchReport(rows, tuple(shown), plan.threads, busy)


def made_inputs(signature: Signature, given: Mapping[str, Array], sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return an array for every input: the one given, or a random one of the sizes given or seen in the others.

    Floats are between 0 and 1, as in a picture, whole numbers 0 or 1, which most indices may be.

    Raises:
        ConfigError: If a size is not known.
    """
    sizes = {**_sizes_seen(signature, given), **sizes}
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for spec in signature.inputs:
        if spec.name in given:
            arrays[spec.name] = given[spec.name]
            continue
        shape = spec.shape_at(sizes)
        if shape is None or None in shape:
            free = [name for name in signature.dims if name not in sizes]
            hint = f"--size {','.join(f'{name}=…' for name in free)}, or --input" if free else f"--input {spec.name}=…"
            raise ConfigError(f"the sizes of '{spec}' are not known, so no input can be made", hint=hint)
        try:
            dtype = np.dtype(spec.dtype)
        except TypeError as exc:
            raise ConfigError(f"no input can be made for '{spec}'", hint=f"--input {spec.name}=…") from exc
        drawn = rng.random(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)  # type: ignore[arg-type]
        arrays[spec.name] = np.asarray(drawn).astype(dtype)
    return arrays


def _sizes_seen(signature: Signature, given: Mapping[str, Array]) -> dict[str, int]:
    seen: dict[str, int] = {}
    for spec in signature.inputs:
        if spec.name in given and spec.shape is not None:
            for entry, size in zip(spec.shape, given[spec.name].shape, strict=False):
                if isinstance(entry, str):
                    seen.setdefault(entry, size)
    return seen


def _check_numbers(subjects: list[Any], **numbers: int | None) -> None:
    if not subjects:
        raise ConfigError("there is nothing to measure", hint="give a package or an ONNX file")
    for name, number in numbers.items():
        least = 0 if name == "warm_up" else 1
        if number is not None and number < least:
            raise ConfigError(f"{name.replace('_', '-')} must be at least {least}, got {number}")


def _check_known(inputs: dict[str, Array], sizes: dict[str, int], signatures: list[Signature]) -> None:
    names = {name for signature in signatures for name in signature.input_names}
    dims = {name for signature in signatures for name in signature.dims}
    for name in inputs:
        if name not in names:
            raise ConfigError(f"no model has an input '{name}'", hint=did_you_mean(name, names))
    for name in sizes:
        if name not in dims:
            raise ConfigError(f"no model has a dynamic dimension '{name}'", hint=did_you_mean(name, dims))


def _contenders(
    subject: Any, targets: Sequence[Target], scratch: Path, steps: Steps
) -> tuple[Signature, list[Contender]]:
    """Return a subject's signature, and what there is to measure of it."""
    if isinstance(subject, str | os.PathLike):
        path = Path(subject)
        if (path / MANIFEST_FILE).is_file():
            subject = load(path)
        elif (path / RECORD_FILE).is_file():
            subject = Engine.load(path)
        elif path.is_dir():
            raise MissingFileError(f"'{path}' is neither a package nor a compiled engine", hint="give an ONNX file")
    if isinstance(subject, Package):
        return subject.signature, _of_package(subject, targets)
    if isinstance(subject, Engine):
        spec = {"kind": "engine", "folder": str(subject.folder.absolute())}
        return subject.signature, [Contender(str(subject.target), spec)]
    return _of_graph(subject, targets or (Target(),), scratch, steps)


def _of_package(package: Package, targets: Sequence[Target]) -> list[Contender]:
    wanted = {(target.backend, target.precision) for target in targets}
    found = [
        Contender(entry.id, {"kind": "package", "folder": str(package.folder.absolute()), "id": entry.id})
        for entry in package.manifest.engines
        if not wanted or (entry.target.backend, entry.target.precision) in wanted
    ]
    has = {(entry.target.backend, entry.target.precision) for entry in package.manifest.engines}
    return found + [
        Contender(str(target), failed=f"package '{package.folder}' has no engine '{target}'")
        for target in targets
        if (target.backend, target.precision) not in has
    ]


def _of_graph(graph: Any, targets: Sequence[Target], scratch: Path, steps: Steps) -> tuple[Signature, list[Contender]]:
    from torchferry.graph import as_exported

    scratch.mkdir()
    contenders = []
    for target in targets:
        exported = as_exported(graph, target)
        started = time.perf_counter()
        try:
            with steps.step(f"compile for {target}"):
                engine = backends.compile(exported, target, scratch / str(target))
        except BackendError as exc:
            contenders.append(Contender(str(target), failed=exc.message))
            continue
        spec = {"kind": "engine", "folder": str(engine.folder)}
        contenders.append(Contender(str(target), spec, compile_seconds=time.perf_counter() - started))
    return exported.signature, contenders


def _name(subject: Any) -> str:
    """Return what a subject's rows begin with where there are several."""
    if isinstance(subject, Package | Engine):
        return subject.folder.name
    return Path(subject).stem if isinstance(subject, str | os.PathLike) else type(subject).__name__


def shown_inputs(inputs: Mapping[str, Array]) -> str:
    """Return names, dtypes and shapes of inputs for a report."""
    return ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in inputs.items())


def every_target() -> tuple[Target, ...]:
    """Return a target for every engine and precision that runs any graph here."""
    found = []
    for name in backends.running():
        capabilities = backends.get(name).capabilities()
        found += [Target(name, p) for p in capabilities.precisions if capabilities.general]  # type: ignore[arg-type]
    return tuple(found)


def _torch(model: Any, modes: Sequence[TorchMode], folder: Path) -> list[Contender]:
    """Describe a PyTorch model for its workers: in a file where that is possible, else how to build it."""
    import torch

    from torchferry.pipeline.config import ModelSection
    from torchferry.pipeline.loading import build_model

    if isinstance(model, str):
        model = ModelSection(factory=model)
    section = model if isinstance(model, ModelSection) else None
    module = build_model(section)[0] if section is not None else model
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, got {type(module).__name__}")
    saved = folder / "model.pt"
    spec: dict[str, Any] = {"kind": "torch"}
    try:
        torch.save(module, saved)
    except Exception as exc:  # noqa: BLE001 - whatever keeps a user's class from being pickled
        if section is None:
            reason = f"the model cannot be sent to another process: {exc}"
            return [Contender(_ROWS[mode], failed=reason) for mode in modes]
        spec["section"] = section.model_dump(mode="json")
    else:
        files = {name: getattr(found, "__file__", None) for name, found in sys.modules.items()}
        spec["file"] = str(saved)
        spec["modules"] = {n: f for n, f in files.items() if f and n.startswith("torchferry_model_")}
    return [Contender(_ROWS[mode], {**spec, "compiled": mode == "compile"}) for mode in modes]


def inputs_of(subject: str, items: Sequence[str]) -> dict[str, Array]:
    """Read ``--input`` as a package declares its pictures, or under the names of an ONNX file.

    Raises:
        ConfigError: If an item cannot be understood, or an input has several.
        MissingFileError, FormatError: If a file is missing or is not what its name says.
    """
    if (Path(subject) / MANIFEST_FILE).is_file():
        package = load(subject)
        data = read_inputs(items, package.signature.input_names, package.manifest.preprocess)
    else:
        from torchferry.graph import as_exported

        is_engine = (Path(subject) / RECORD_FILE).is_file()
        signature = Engine.load(subject).signature if is_engine else as_exported(subject).signature
        data = read_inputs(items, signature.input_names, {})
    calls = data.calls()
    if len(calls) > 1:
        raise ConfigError("several sets of data are given, and one is measured", hint="give each input once")
    return calls[0]
