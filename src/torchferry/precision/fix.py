"""The verb ``fix``: measure, solve, write, prove."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from torchferry.core.errors import ConfigError, InputError
from torchferry.exporter.inputs import to_numpy
from torchferry.graph.reading import as_exported
from torchferry.precision.certificate import Certificate, Evidence
from torchferry.precision.checks import with_checks
from torchferry.precision.emulate import as_array_calls
from torchferry.precision.modules.fix import fix_module
from torchferry.precision.planning import certificate_of, plan, repair, split_data

if TYPE_CHECKING:
    from torchferry.core.signature import Signature
    from torchferry.exporter.inputs import Call
    from torchferry.graph import Exported


@overload
def fix(model: torch.nn.Module, calibration: Any, headroom_bits: int = 2) -> tuple[torch.nn.Module, Certificate]: ...
@overload
def fix(
    model: Any, calibration: Any, headroom_bits: int = 2, *, keep_io_types: bool = False
) -> tuple[Exported, Certificate]: ...
def fix(
    model: Any, calibration: Any, headroom_bits: int = 2, *, keep_io_types: bool = False
) -> tuple[Any, Certificate]:
    """Repair a model so that FP16 cannot overflow in it, by scales that are powers of two.

    Every float tensor t is stored as t / 2**k with an integer k of its own, chosen by measuring the model on data. The
    scales are absorbed by weights where that is possible; else by few multiplications, which are exact; only where no
    scale does, a node stays FP32. The certificate lists all of it, and proves it.

    Args:
        model: A graph (an ``Exported``, a path, a ``ModelProto``, an ``ir.Model``, an ``ONNXProgram``) in FP32, or a
            module. It is not changed.
        calibration: One tuple or dict of inputs, or an iterable of them: representative data. With several calls, the
            last quarter is kept back to judge the result by.
        headroom_bits: The result holds up to ``2**headroom_bits`` times the calibration inputs.
        keep_io_types: Let the graph's inputs and outputs stay FP32; by default they become FP16.

    Returns:
        The repaired model and its certificate. Of a graph, an ``Exported`` whose tensors are FLOAT16, apart from
        islands and from inputs and outputs whose true values leave FP16's range, which are listed. Of a module, one in
        FP32 that does the same, whose ``.half()`` is safe: a copy with scaled parameters where these do, else a
        ``GraphModule`` of its ATen calls with the nodes that the certificate lists. Parameters keep their names.

    Raises:
        ModelError: If a repaired module does not do what the module does.
        ExportError: If a module cannot be exported.
        InputError: If the calibration data does not fit.
        FormatError: If the graph is in FP16 already.
    """
    if not 0 <= headroom_bits <= _MOST_HEADROOM:
        raise ConfigError(f"headroom_bits must be from 0 to {_MOST_HEADROOM}, got {headroom_bits}")
    if isinstance(model, torch.nn.Module):
        return fix_module(model, calibration, headroom_bits)
    return _fix_exported(as_exported(model), calibration, headroom_bits, keep_io_types)


_MOST_HEADROOM = 12


def _fix_exported(
    exported: Exported, calibration: Any, headroom_bits: int, keep_io_types: bool
) -> tuple[Exported, Certificate]:
    data = [feeds_of(call, exported.signature) for call in as_array_calls(calibration)]
    solved_on, held_out, how = split_data(data)
    started = time.perf_counter()
    found = plan(exported, solved_on, headroom_bits)
    repaired = repair(exported, found, keep_io_types=keep_io_types)
    seconds = time.perf_counter() - started
    certificate = certificate_of(exported.model.graph.name or "a graph", found, repaired, headroom_bits, how, seconds)
    evidence = Evidence(exported, repaired.exported, solved_on, held_out)
    return repaired.exported, with_checks(certificate, evidence)


def feeds_of(call: Call, signature: Signature) -> dict[str, Any]:
    """Return the arrays of a call by the graph's input names.

    Raises:
        InputError: If the call does not fit the graph.
    """
    args, kwargs = call
    if len(args) > len(signature.inputs):
        raise InputError(f"{len(args)} inputs for a graph with {len(signature.inputs)}")
    given = {**dict(zip(signature.input_names, args, strict=False)), **kwargs}
    feeds = {k: to_numpy(v) if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in given.items()}
    signature.check(feeds)
    return feeds
