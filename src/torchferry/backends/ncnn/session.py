"""Running an ncnn engine; needs neither torch nor onnx."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.engine import Session
from torchferry.core.errors import BackendError, MissingBackendError
from torchferry.core.files import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torchferry.core.engine import Array
    from torchferry.core.signature import Signature
    from torchferry.core.target import Precision

PARAM_FILE = "model.param"
WEIGHTS_FILE = "model.bin"
RECORD_FILE = "model.json"
NO_BATCH = 233  # ncnn's own number for "no axis is the batch"


def ncnn() -> Any:
    """Import ncnn.

    Raises:
        MissingBackendError: If it is not installed.
    """
    try:
        return importlib.import_module("ncnn")
    except ImportError as exc:
        raise MissingBackendError("the engine 'ncnn' is not installed", hint="pip install 'torchferry[ncnn]'") from exc


@dataclass(frozen=True)
class Blob:
    """What ncnn calls an input or output, and where its batch is.

    Attributes:
        tensor: Its name in the signature.
        blob: Its name in ncnn.
        batch: The axis that ncnn keeps apart from the others; ``NO_BATCH`` for none.
    """

    tensor: str
    blob: str
    batch: int


@dataclass(frozen=True)
class Record:
    """What ncnn's own files do not say.

    Attributes:
        inputs: The inputs that have an effect.
        outputs: All outputs, in the signature's order.
        digests: SHA-256 of ncnn's files, which it would read to the point of crashing where they are damaged.
    """

    inputs: tuple[Blob, ...]
    outputs: tuple[Blob, ...]
    digests: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2))

    @staticmethod
    def load(path: Path) -> Record:
        """Read it, and check the files beside it.

        Raises:
            BackendError: If it is damaged, or one of them is.
        """
        try:
            values = json.loads(path.read_bytes())
            inputs, outputs = (tuple(Blob(**blob) for blob in values[key]) for key in ("inputs", "outputs"))
            record = Record(inputs, outputs, values["digests"])
            changed = [name for name, digest in record.digests.items() if sha256(path.with_name(name)) != digest]
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as exc:
            raise BackendError(f"ncnn cannot load '{path}': it is damaged", hint="compile it again") from exc
        if changed:
            raise BackendError(
                f"ncnn cannot load '{path.with_name(changed[0])}': it has changed", hint="compile it again"
            )
        return record


class NcnnSession(Session):
    """A loaded ncnn network.

    Args:
        signature: Names, dtypes, shapes and valid sizes.
        folder: Where the three files are.
        precision: ``fp32``, or ``bf16`` to keep weights and everything between two layers in bfloat16.
        threads: Threads for one layer; None for the number of cores that this process may use.
    """

    def __init__(self, signature: Signature, folder: Path, precision: Precision, threads: int | None) -> None:
        super().__init__(signature)
        self._record = Record.load(folder / RECORD_FILE)
        self._specs = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
        self._library = ncnn()
        self._net = self._library.Net()
        _set_options(self._net.opt, precision, threads)
        for load, file in ((self._net.load_param, PARAM_FILE), (self._net.load_model, WEIGHTS_FILE)):
            if load(str(folder / file)) != 0:
                raise BackendError(f"ncnn cannot load '{folder / file}'", hint="compile it again")

    def _execute(self, feeds: dict[str, Array]) -> Sequence[Array]:
        for name, array in feeds.items():
            if not array.size:
                raise BackendError(f"ncnn cannot run the model: '{name}' is empty, which ncnn does not know")
        arrays = {blob.tensor: _as_given(feeds[blob.tensor]) for blob in self._record.inputs}
        extractor = self._net.create_extractor()
        for blob in self._record.inputs:
            # A Mat refers to the array's memory; the clone has memory of its own, laid out as ncnn wants it.
            mat = self._library.Mat(arrays[blob.tensor], batch_index=blob.batch).clone()
            if extractor.input(blob.blob, mat) != 0:
                raise BackendError(f"ncnn cannot run the model: it does not take the input '{blob.tensor}'")
        sizes = self.signature.sizes_of(feeds)
        return [self._extracted(extractor, blob, sizes) for blob in self._record.outputs]

    def _extracted(self, extractor: Any, blob: Blob, sizes: Mapping[str, int]) -> Array:
        status, mat = extractor.extract(blob.blob)
        if status != 0 or not mat.total():
            raise BackendError(f"ncnn cannot run the model: a layer before the output '{blob.tensor}' fails")
        array = np.array(mat.numpy(batch_index=blob.batch), np.float32)
        expected = self._specs[blob.tensor].shape_at(sizes)
        if expected == () and array.size == 1:
            return array.reshape(())
        fits = expected is None or (
            len(expected) == array.ndim
            and all(want in (None, got) for want, got in zip(expected, array.shape, strict=True))
        )
        if not fits:
            raise BackendError(
                f"ncnn cannot run the model: it gives the output '{blob.tensor}' the shape {list(array.shape)}, "
                f"expected {list(expected or ())}",
                hint="compile it for these sizes alone, or use another backend",
            )
        return array

    def _release(self) -> None:
        self._net.clear()
        self._net = None


def _set_options(options: Any, precision: Precision, threads: int | None) -> None:
    options.num_threads = threads or _usable_cores()
    options.use_vulkan_compute = False
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
        setattr(options, name, False)
    for name in ("use_bf16_packed", "use_bf16_storage"):
        setattr(options, name, precision == "bf16")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere a process may use every core
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _as_given(array: Array) -> Array:
    """Return the numbers in one piece of memory, with an axis at least."""
    return np.ascontiguousarray(array).reshape(array.shape or (1,))
