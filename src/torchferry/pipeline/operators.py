"""Which engines run an operator: a small graph is made from its schema and really run.

Of an operator of ONNX that is a graph of one node; of torch's, what exporting one call of it gives.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from torchferry import backends
from torchferry.core.compare import TOLERANCES, compare
from torchferry.core.errors import TorchferryError
from torchferry.core.target import Target
from torchferry.exporter.inputs import flatten_outputs, to_numpy
from torchferry.exporter.made_up import made_up_calls
from torchferry.exporter.operators import find_overload, onnx_operator
from torchferry.exporter.table import DEFAULT_OPSET
from torchferry.graph import as_exported
from torchferry.pipeline.export import export
from torchferry.verification.isolation import run_isolated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torchferry.core.engine import Array, Backend

Status = Literal["runs", "differs", "refused", "not tried", "not installed"]

_SHAPES = ((2, 3), (3, 3), (2, 2, 2, 2))  # for all inputs alike: any matrix, a square one, a picture and its kernel
_TYPES = {  # those to try, the likeliest first
    "tensor(float)": TensorProto.FLOAT,
    "tensor(bool)": TensorProto.BOOL,
    "tensor(int64)": TensorProto.INT64,
    "tensor(int32)": TensorProto.INT32,
    "tensor(uint8)": TensorProto.UINT8,
}
_MAX_REASON = 200  # characters


@dataclass(frozen=True)
class Trial:
    """What came of running an operator on an engine.

    Attributes:
        backend: The engine.
        status: ``runs``; ``differs`` from what ONNX says; ``refused``; ``not tried``; or ``not installed``.
        detail: The graph that ran, or the reason.
    """

    backend: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Sample:
    """A small graph with inputs that are valid, and what they have to give.

    Attributes:
        graph: The graph, or anything that holds one.
        opset: Its opset.
        feeds: Arrays for its inputs.
        expected: Its outputs.
        is_random: The operator draws random numbers, so that there is nothing to compare with.
    """

    graph: Any
    opset: int
    feeds: dict[str, Array]
    expected: tuple[Array, ...]
    is_random: bool

    def __str__(self) -> str:
        arrays = ", ".join(f"{array.dtype.name}[{', '.join(map(str, array.shape))}]" for array in self.feeds.values())
        return f"at opset {self.opset} on {arrays or 'no inputs'}"


def try_operator(name: str) -> list[Trial]:
    """Run an operator of the default ONNX domain on every engine that is installed.

    Args:
        name: Such as ``Asinh``; it must exist.

    Returns:
        What came of it on each engine, the preferred one first; compared with ONNX's reference.
    """
    return _try_everywhere(functools.cache(functools.partial(make_samples, name)))


def try_overload(name: str) -> list[Trial]:
    """Export a call of one of torch's operators and run it on every engine that is installed.

    Args:
        name: Such as ``aten::squeeze.dim``; it must exist.

    Returns:
        What came of it on each engine, the preferred one first; compared with PyTorch.
    """
    samples = export_sample(name)
    return _try_everywhere(lambda _: samples)


def _try_everywhere(samples_for: Callable[[int], list[Sample] | str]) -> list[Trial]:
    return [_try(backends.get(name), samples_for) for name in backends.names()]


def _try(backend: Backend, samples_for: Callable[[int], list[Sample] | str]) -> Trial:
    available = backend.availability()
    if not available.ok:
        return Trial(backend.name, "not installed", available.reason)
    if not available.can_run:
        return Trial(backend.name, "not tried", available.reason)
    newest = backend.capabilities().max_opset
    samples = samples_for(newest)
    if isinstance(samples, str):
        return Trial(backend.name, "not tried", samples)
    if samples[0].opset > newest:
        return Trial(backend.name, "refused", f"it reads opsets up to {newest}, not {samples[0].opset}")
    return _try_on(backend, samples)


def export_sample(name: str) -> list[Sample] | str:
    """Export a call of one of torch's operators with made-up arguments; or say why that cannot be done."""
    op = find_overload(name)
    reason = "no call that gives a tensor could be made up from its schema"
    for made in made_up_calls(op):
        try:
            with torch.no_grad():
                outputs = flatten_outputs(made.module(*made.tensors))
            break
        except Exception as exc:  # noqa: BLE001 - what torch traces it may still refuse to run
            reason = f"PyTorch refuses the made-up call: {_shortened(str(exc))}"
    else:
        return reason
    try:
        exported = export(made.module, made.tensors)
    except TorchferryError as exc:
        return _shortened(exc.message)
    feeds = {name: to_numpy(tensor) for name, tensor in zip(exported.signature.input_names, made.tensors, strict=True)}
    # ONNX has the two parts of a complex number along one more axis.
    expected = tuple(to_numpy(torch.view_as_real(out) if out.is_complex() else out) for out in outputs)
    is_random = torch.Tag.nondeterministic_seeded in op.tags
    return [Sample(exported, exported.model.opset_imports[""], feeds, expected, is_random)]


def make_samples(name: str, newest: int) -> list[Sample] | str:
    """Make graphs of one node from an operator's schema, with random inputs that ONNX's reference takes.

    Args:
        name: An operator of the default ONNX domain.
        newest: The newest opset to use, if the operator is that old.

    Returns:
        Samples of several shapes and types; or why none can be made without knowing the operator.
    """
    opset = max(min(DEFAULT_OPSET, newest), onnx_operator(name, "").opsets[0])
    schema = onnx.defs.get_schema(name, max_inclusive_version=opset)
    required = sorted(key for key, attribute in schema.attributes.items() if attribute.required)
    if schema.deprecated:
        return f"opset {opset} has it no longer"
    if required:
        return f"it needs values for {', '.join(required)}"
    if not schema.min_input:
        return "it has no inputs that it needs"
    samples: list[Sample] = []
    reason = ""
    for kinds in (tuple(_TYPES), tuple(_TYPES)[1:]):
        types = [(given.name, _first_allowed(schema, given, kinds)) for given in schema.inputs[: schema.min_input]]
        unlike = next((given for given, (_, kind) in zip(schema.inputs, types, strict=False) if not kind), None)
        if unlike is not None:
            reason = reason or f"its input '{unlike.name}' takes more than plain numbers"
            continue
        for shape in _SHAPES:
            try:
                samples.append(_sample(schema, opset, types, shape))
            except Exception as exc:  # noqa: BLE001 - the reference raises whatever numpy does
                reason = reason or f"made-up inputs do not fit it: {_shortened(str(exc.__cause__ or exc))}"
    return samples or reason


def _first_allowed(schema: onnx.defs.OpSchema, given: onnx.defs.OpSchema.FormalParameter, kinds: Iterable[str]) -> int:
    """Return the first type of some that an input may have; 0 if there is none, or if its type is fixed.

    What has a type of its own, such as a shape, is more than a number.
    """
    variables = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    return next((_TYPES[kind] for kind in kinds if kind in variables.get(given.type_str, ())), 0)


def _sample(schema: onnx.defs.OpSchema, opset: int, types: list[tuple[str, int]], shape: tuple[int, ...]) -> Sample:
    rng = np.random.default_rng(0)
    feeds = {name: _random(rng, kind, shape) for name, kind in types}
    names = [f"output{i}" for i in range(max(1, schema.min_output))]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, kind in types]
    node = helper.make_node(schema.name, list(feeds), names)

    def model(outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        imports = [helper.make_opsetid("", opset)]
        graph = helper.make_graph([node], schema.name, inputs, outputs)
        return helper.make_model(graph, opset_imports=imports, ir_version=helper.find_min_ir_version_for(imports))

    with np.errstate(all="ignore"):
        expected: Any = ReferenceEvaluator(model([onnx.ValueInfoProto(name=name) for name in names])).run(None, feeds)
    expected = [np.asarray(array) for array in expected]
    outputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, expected, strict=True)
    ]
    whole = model(outputs)
    onnx.checker.check_model(whole, full_check=True)
    return Sample(whole, opset, feeds, tuple(expected), "seed" in schema.attributes)


def _random(rng: np.random.Generator, kind: int, shape: tuple[int, ...]) -> Array:
    """Return values that most operators take: between 0 and 1, and no index but 1, which every axis has."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if dtype.kind == "f":
        return rng.uniform(0.1, 0.9, shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype) if dtype.kind == "b" else np.ones(shape, dtype)


def _try_on(backend: Backend, samples: list[Sample]) -> Trial:
    """Run samples until the engine takes one: it may ask for more than the reference does, such as another rank."""
    reason = ""
    for sample in samples:
        try:
            actual: list[Array] = run_isolated(functools.partial(_run, backend, sample))
        except TorchferryError as exc:
            reason = reason or _shortened(exc.message)
        else:
            return _judged(backend.name, sample, actual)
    return Trial(backend.name, "refused", reason)


def _judged(name: str, sample: Sample, actual: list[Array]) -> Trial:
    if sample.is_random:
        return Trial(name, "runs", f"{sample}; its outputs are random")
    compared = [compare(e, a, TOLERANCES["fp32"]) for e, a in zip(sample.expected, actual, strict=True)]
    wrong = next((comparison.reason for comparison in compared if not comparison.passed), None)
    return Trial(name, "differs", f"{sample}: {wrong}") if wrong else Trial(name, "runs", str(sample))


def _run(backend: Backend, sample: Sample) -> list[Array]:
    exported = as_exported(sample.graph, Target(backend.name))
    with (
        tempfile.TemporaryDirectory(prefix="torchferry-") as folder,
        backend.trial(exported, Path(folder)) as session,
    ):
        return list(session.run(sample.feeds).values())


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} ..."
