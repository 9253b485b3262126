"""Importing OpenMMLab's libraries, in silence and beside a current torch and numpy.

Each of them asks for something that is not there any more. What is put in its place is there for the time of the import
and taken away again:

==============  ==================================================================================================
``mmcv``        The lite build has no compiled operators: ``mmcv._ext`` is ``OperatorsInPython`` while ``mmcv.ops`` is
                imported, which keeps it.
``mmocr``       imgaug reads ``numpy.sctypes``, which numpy 2 does not have; mmocr refuses mmdet from 3.2 on, and
                imports torchvision, whose wheel wants another torch.
``mmpretrain``  Its multi-modal models fail on current transformers, and are taken for not installed; torchvision again.
``mmagic``      ``mmagic.models`` fails on current diffusers: its packages are empty while a single file is imported.
==============  ==================================================================================================
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.codebases.openmmlab.operators import OperatorsInPython
from torchferry.core.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

# What is imported of each library to have its models and, where they import, its transforms.
_PARTS = {
    "mmdet": ("mmdet.models", "mmdet.datasets.transforms"),
    "mmocr": ("mmocr.models", "mmocr.datasets.transforms"),
    "mmseg": ("mmseg.models", "mmseg.datasets.transforms"),
    "mmpretrain": ("mmpretrain.models",),  # its transforms are torchvision's, whose wheel wants another torch
    "mmagic": ("mmagic.registry",),
}
_NOTHING = object()


def names() -> tuple[str, ...]:
    """Return the names of the libraries that models may come from."""
    return tuple(_PARTS)


def is_model_reference(reference: str) -> bool:
    """Tell ``mmdet:yolo/x`` from ``module:factory`` and from ``file.py:factory``."""
    name, colon, _ = reference.partition(":")
    return bool(colon) and name in _PARTS


def installed(name: str) -> bool:
    """Tell whether a library can be found; it is not imported."""
    return importlib.util.find_spec(name) is not None


def library(name: str) -> ModuleType:
    """Import a library with its models and transforms, and return it.

    Raises:
        ModelError: If there is no such library, it is not installed, or it cannot be imported.
    """
    if name not in _PARTS:
        raise ModelError(f"OpenMMLab's '{name}' is not known", hint=did_you_mean(name, _PARTS))
    _require(name)
    with quiet(), _stand_ins(name):
        for part in _PARTS[name]:
            _import(part)
    return sys.modules[name]


def mmengine(part: str = "mmengine") -> Any:
    """Import mmengine or a part of it.

    Raises:
        ModelError: If it is not installed or cannot be imported.
    """
    _require("mmengine")
    with quiet():
        return _import(part)


def leaf(path: str) -> ModuleType:
    """Import one file of a library without running its packages' ``__init__``, such as mmagic's of one model.

    Args:
        path: The module's dotted name. Its top package is imported as it is.

    Raises:
        ModelError: If the library is not installed or the file cannot be imported.
    """
    top, *between, _ = path.split(".")
    folder = Path(library(top).__path__[0])
    with quiet(), ExitStack() as stack:
        for depth, part in enumerate(between, 1):
            folder /= part
            name = ".".join([top, *between[:depth]])
            if name not in sys.modules:
                empty = ModuleType(name)
                empty.__path__ = [str(folder)]
                stack.enter_context(_entry(name, empty))
        return _import(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of OpenMMLab's code."""
    previous = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def _require(name: str) -> None:
    if not installed(name):
        raise ModelError(
            f"OpenMMLab's '{name}' is not installed",
            hint="run scripts/openmmlab, which installs what works beside this torch",
        )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as exc:  # whatever their code does while it is imported
        raise ModelError(
            f"OpenMMLab's '{name}' cannot be imported: {type(exc).__name__}: {exc}",
            hint="run scripts/openmmlab, which installs versions that work together",
        ) from exc


@contextmanager
def _stand_ins(name: str) -> Iterator[None]:
    """Put in place what a library misses, for the time of its import."""
    with ExitStack() as stack:
        if "mmcv._ext" not in sys.modules and not installed("mmcv._ext"):
            stack.enter_context(_entry("mmcv._ext", OperatorsInPython()))
        if name == "mmocr":
            mmdet = library("mmdet")
            stack.enter_context(_without_torchvision("torchvision.transforms"))
            kinds = {"float": [np.float16, np.float32, np.float64]}
            kinds["int"] = [np.int8, np.int16, np.int32, np.int64]  # type: ignore[list-item]
            kinds["uint"] = [np.uint8, np.uint16, np.uint32, np.uint64]  # type: ignore[list-item]
            stack.enter_context(replaced(np, "sctypes", kinds))
            stack.enter_context(replaced(mmdet, "__version__", "3.1.0"))
        if name == "mmpretrain":
            stack.enter_context(replaced(_import("mmpretrain.utils.dependency"), "WITH_MULTIMODAL", False))
            stack.enter_context(_without_torchvision("torchvision.ops", "torchvision.ops.boxes"))
        yield


@contextmanager
def _without_torchvision(*parts: str) -> Iterator[None]:
    """Let parts of torchvision be imported, with nothing in them, where it is not installed: few classes use them."""
    with ExitStack() as stack:
        if not installed("torchvision"):
            for part in ("torchvision", *parts):
                stack.enter_context(_entry(part, ModuleType(part)))
        yield


@contextmanager
def _entry(name: str, module: ModuleType) -> Iterator[None]:
    """Let a name be imported as this module inside the block."""
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        parent, _, attribute = name.rpartition(".")
        if vars(sys.modules.get(parent, module)).get(attribute) is module:
            delattr(sys.modules[parent], attribute)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value inside the block."""
    before = vars(owner).get(name, _NOTHING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _NOTHING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
