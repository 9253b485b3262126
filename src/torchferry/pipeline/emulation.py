"""The verb ``fp16.emulate``, for which a module is exported first; and ``fp16.watch`` on a list of calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from torchferry.precision.emulate import Emulation, Mode
    from torchferry.precision.watch_report import WatchReport


def emulate(model: Any, inputs: Any = None, *, mode: Mode = "acc32") -> Emulation:
    """Compute what true FP16 execution gives, on a CPU, and name the first tensor that goes wrong.

    The FP32 graph runs in the default engine with every float tensor rounded to FP16 where it is made. A graph that has
    FP16 tensors already, such as another tool's file, has these rounded and nothing else.

    Args:
        model: A ``torch.nn.Module``, a ``Source``, or whatever holds an ONNX graph: an ``Exported``, a path, a
            ``ModelProto``, an ``ir.Model``, an ``ONNXProgram``.
        inputs: One tuple or dict of tensors, or an iterable of them; run at once. A module needs them; the first is
            the example that it is exported with.
        mode: ``acc32``: every tensor is rounded, sums inside operators are FP32's. ``strict``: norms, means, softmax
            and the like are opened and every inner tensor is rounded too, as the most pessimistic engine would, and
            sums in convolutions and products are bounded. ``ideal``: 11 bits of mantissa and no limit of range: the
            error that remains whatever is scaled.

    Returns:
        The emulation: ``first_bad``, ``run(inputs)``, ``report(inputs)``.

    Raises:
        InputError: If a module comes without inputs, or inputs do not fit.
        ExportError: If the module cannot be exported.
        FormatError: If the graph cannot be read.
        ConfigError: If there is no such mode.
    """
    import torch

    from torchferry.exporter import Source
    from torchferry.graph import as_exported
    from torchferry.pipeline.export import export
    from torchferry.precision.emulate import Emulation, as_array_calls

    calls = [] if inputs is None else as_array_calls(inputs)
    if not isinstance(model, torch.nn.Module | Source):
        emulation = Emulation(as_exported(model), mode)
    else:
        if isinstance(model, Source):
            source = model
        elif calls:
            source = Source(model, *calls[0])
        else:
            raise InputError("a module needs inputs to be exported", hint="give them: emulate(model, inputs)")
        emulation = Emulation(export(source), mode, source.names, type(source.model).__name__)
    for call in calls:
        emulation.run_call(call)
    return emulation


def watch_calls(model: torch.nn.Module, calls: Iterable[Mapping[str, Any]]) -> WatchReport:
    """Watch a module run in eval mode on keyword arguments, a call after the other; it is left as it was."""
    import torch

    from torchferry.exporter.capture import evaluation_mode
    from torchferry.precision.watch import watch

    with evaluation_mode(model), watch(model) as watching, torch.no_grad():
        for call in calls:
            model(**call)
    return watching.report()
