"""Every error that Torchferry raises on purpose.

::

    TorchferryError
    ├── ConfigError        (ValueError)          a deploy config or a flag that cannot be used
    ├── MissingFileError   (FileNotFoundError)   a path that leads nowhere
    ├── FormatError        (ValueError)          a file that is not what it should be
    ├── IntegrityError     (ValueError)          a package whose files are not the ones that were packed
    ├── OutputError        (OSError)             a folder or file that cannot be written
    ├── ModelError         (ValueError)          a model reference, factory or forward that fails
    ├── CheckpointError    (ValueError)          a checkpoint that does not fit or may not be read
    ├── InputError         (ValueError)          an array with the wrong name, type, rank or size
    ├── ExportError        (RuntimeError)        a model that cannot be turned into a graph
    │   ├── FrozenDimensionError                 a dimension declared dynamic that the model fixes
    │   └── OperatorError                        an operator without a translation, or a node that ONNX does not allow
    ├── BackendError       (RuntimeError)        an engine that refuses a graph or breaks while running
    │   ├── MissingBackendError                  an engine that is not installed or not known
    │   └── UnsupportedError                     something that this engine cannot do
    └── VerificationError  (RuntimeError)        a report with at least one finding of severity error

Each also subclasses the built-in that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class TorchferryError(Exception):
    """The root: what failed, where in the user's code or files, and what to do next.

    Args:
        message: What failed, with the 'subject' in quotes and expected against got.
        where: The user's own place: a ``file:line`` with its code, a file, a module path.
        hint: The next step.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  at {self.where}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


class ConfigError(TorchferryError, ValueError):
    """A deploy config or a flag cannot be used."""


class MissingFileError(TorchferryError, FileNotFoundError):
    """A path leads nowhere."""


class FormatError(TorchferryError, ValueError):
    """A file is not what it should be: not a picture, not ONNX, a newer package format."""


class IntegrityError(TorchferryError, ValueError):
    """A package's files are not the ones that were packed."""


class OutputError(TorchferryError, OSError):
    """A folder or file cannot be written."""


class ModelError(TorchferryError, ValueError):
    """A model reference cannot be resolved, or its factory or forward raises."""


class CheckpointError(TorchferryError, ValueError):
    """A checkpoint does not fit the model or may not be read."""


class InputError(TorchferryError, ValueError):
    """An array has the wrong name, type, rank or size."""


class ExportError(TorchferryError, RuntimeError):
    """A model cannot be turned into a graph."""


class FrozenDimensionError(ExportError):
    """A dimension that was declared dynamic is fixed by the model."""


class OperatorError(ExportError):
    """An operator has no translation, or its translation is not valid ONNX."""


class BackendError(TorchferryError, RuntimeError):
    """An engine refuses a graph or breaks while running it."""


class MissingBackendError(BackendError):
    """An engine is not installed or not known."""


class UnsupportedError(BackendError):
    """An engine cannot do what was asked."""


class VerificationError(TorchferryError, RuntimeError):
    """A report holds at least one finding of severity error."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Word the nearest known names as a hint, or list all of them when none is near.

    >>> did_you_mean("onnxrutime", ["onnxruntime", "reference"])
    "did you mean 'onnxruntime'?"
    >>> did_you_mean("x", ["onnxruntime", "reference"])
    "known: 'onnxruntime', 'reference'"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    return "known: " + (", ".join(f"'{n}'" for n in known) or "nothing")
