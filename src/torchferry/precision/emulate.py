"""What true FP16 execution gives, computed on a CPU at an engine's speed, naming the first tensor that goes wrong."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import torch

from torchferry.core.errors import ConfigError, InputError, did_you_mean
from torchferry.exporter.inputs import Call, InputNames, as_call, as_calls, to_numpy
from torchferry.precision.instrument import Kind, Seen, instrument
from torchferry.precision.rounding import FP16_MAX, FP16_OVERFLOW, Rounding
from torchferry.precision.running import Figures, Runner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.core.engine import Array
    from torchferry.core.report import Report
    from torchferry.graph import Exported

Mode = Literal["acc32", "strict", "ideal"]
Reason = Literal["overflow", "infinite", "nan"]
_HUGE = 1e30


@dataclass(frozen=True)
class BadTensor:
    """A tensor that is not finite in FP16 where it is in FP32.

    Attributes:
        name: As in the graph.
        kind: An input, a constant, or the output of a node.
        operator: That makes it; of a constant, the first that takes it; empty for an input.
        magnitude: The largest absolute value before it is rounded.
        reason: ``overflow`` if a number is too large for FP16, ``infinite`` if it was computed as infinite (a division
            by a number that FP16 rounds to zero), else ``nan``.
        module: Path of the module that it belongs to; empty if unknown.
        source: The user's line; empty if unknown.
        is_origin: Nothing that it is computed from is bad.
    """

    name: str
    kind: Kind
    operator: str
    magnitude: float
    reason: Reason
    module: str = ""
    source: str = ""
    is_origin: bool = True

    @property
    def where(self) -> str:
        """The module and the line, or the tensor's name in a graph that knows neither."""
        return _where(self.module, self.source) or f"tensor '{self.name}'"

    def __str__(self) -> str:
        roles = {
            "input": "an input",
            "constant": f"a constant of {self.operator}",
            "tensor": f"made by {self.operator}",
        }
        what = f"'{self.name}', {roles[self.kind]},"
        if self.reason == "nan":
            return f"{what} is not a number in FP16"
        if self.reason == "infinite":
            return f"{what} is infinite in FP16"
        return f"{what} reaches {self.magnitude:.6g}; FP16 ends at 65504"


@dataclass(frozen=True)
class Accumulator:
    """A sum that may leave FP16's range on the way, although its result need not.

    Attributes:
        name: The tensor that the sum gives.
        operator: ``Conv``, ``MatMul``, ``ReduceSum`` …
        bound: The largest ``|W|·|x| + |b|``, which no partial sum exceeds, in whatever order it is added.
        module: Path of the module; empty if unknown.
        source: The user's line; empty if unknown.
    """

    name: str
    operator: str
    bound: float
    module: str = ""
    source: str = ""


@dataclass(frozen=True)
class OutputError:
    """How far an output is from FP32's.

    Attributes:
        max_abs: The largest absolute difference.
        relative: L2 norm of the difference over that of the FP32 output; infinite where the output is not finite.
        ideal: The same for 11 bits of mantissa without any limit of range: the least that FP16 can give.
    """

    max_abs: float
    relative: float
    ideal: float

    @property
    def ratio(self) -> float:
        """Error in units of the ideal one; 1 if there is none in either."""
        return 1.0 if self.relative == self.ideal else self.relative / self.ideal if self.ideal else float("inf")


class Emulation:
    """A model that runs as FP16 hardware would run it.

    Results are exact for what is stored: every float tensor, constants too, is rounded to FP16 where it is made. Sums
    inside convolutions and products are computed in FP32, as such hardware does; in ``strict`` mode all other sums
    are rounded step by step, and those of convolutions and products bounded. In branches and bodies of loops tensors
    are rounded, and what is seen of them is what leaves.

    Args:
        exported: The graph.
        mode: ``acc32``, ``strict`` or ``ideal``; see ``ferry.fp16.emulate``.
        names: The names of a module's tensors, for inputs that are given as to the module.
        name: What reports call it; the graph's own name if empty.

    Attributes:
        mode: As given.
        name: As given, or the graph's.
        closed: In strict mode, the nodes with sums inside that could not be opened.

    Raises:
        ConfigError: If there is no such mode.
        FormatError: If the graph's functions cannot be inlined.
        BackendError: If the engine refuses the graph.
    """

    def __init__(
        self, exported: Exported, mode: Mode = "acc32", names: InputNames | None = None, name: str = ""
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"unknown mode '{mode}'", hint=did_you_mean(mode, get_args(Mode)))
        self.mode = mode
        self.name = name or exported.model.graph.name or "a graph"
        self._exported = exported
        self._names = names
        self._runners: dict[str, Runner] = {}
        self._bad: dict[int, BadTensor] = {}
        self._figures: Figures | None = None
        self.closed = self.runner("own").instrumented.closed

    def run(self, inputs: Any) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: One tuple or dict of tensors or arrays.

        Returns:
            For every output a numpy array; what the graph has in FP16 comes as float32.

        Raises:
            InputError: If the inputs do not fit the graph.
        """
        return self.run_call(as_array_call(inputs))

    def run_call(self, call: Call) -> dict[str, Array]:
        """Run the model on positional and keyword arguments; see ``run``."""
        feeds = self.feeds(call)
        outputs, figures = self.runner("own").run(feeds)
        self._figures = figures if self._figures is None else figures.joined(self._figures)
        self._bad = worse(self._bad, self.bad_of(figures, feeds))
        return outputs

    def forget(self) -> None:
        """Forget what was seen in the runs so far."""
        self._bad, self._figures = {}, None

    @property
    def bad(self) -> tuple[BadTensor, ...]:
        """Every bad tensor of all runs so far, in the order in which they are computed."""
        return tuple(self._bad[index] for index in sorted(self._bad))

    @property
    def first_bad(self) -> BadTensor | None:
        """The first bad tensor of all runs so far; None if all are finite."""
        return self.bad[0] if self._bad else None

    @property
    def accumulators(self) -> tuple[Accumulator, ...]:
        """In strict mode, the sums whose bound was beyond 65504 in a run so far."""
        return () if self._figures is None else self.accumulators_of(self._figures)

    def magnitudes(self) -> dict[str, float]:
        """Return the largest absolute value of every tensor in all runs so far, before rounding, in order."""
        if self._figures is None:
            return {}
        seen = self.runner("own").instrumented.seen
        return {tensor.name: float(value) for tensor, value in zip(seen, self._figures.magnitude, strict=True)}

    def report(self, inputs: Any) -> Report:
        """Run the model in FP16, in FP32 and ideally, and tell what differs.

        Args:
            inputs: One tuple or dict of tensors or arrays, or an iterable of them.

        Returns:
            A report that fails if a tensor is bad.

        Raises:
            InputError: If the inputs do not fit the graph, or there are none.
        """
        from torchferry.precision.emulate_report import emulation_report

        return emulation_report(self, as_array_calls(inputs))

    def errors(self, inputs: Any) -> dict[str, OutputError]:
        """Return how far every float output is from FP32's, over one call's inputs or an iterable of them.

        Raises:
            InputError: If the inputs do not fit the graph, or there are none.
        """
        from torchferry.precision.emulate_report import Errors

        errors = Errors()
        for call in as_array_calls(inputs):
            feeds = self.feeds(call)
            errors.add(*(self.runner(which).run(feeds)[0] for which in ("fp32", "own", "ideal")))
        return errors.by_output()

    def close(self) -> None:
        """Let go of the engine's memory; the emulation loads it again when it is used again."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def runner(self, which: Literal["own", "census", "seen fp32", "fp32", "ideal"]) -> Runner:
        """Return a variant of the graph, loaded when it is first asked for.

        Args:
            which: ``own`` rounds as the mode says; ``census`` also counts subnormals; ``seen fp32`` is the same graph
                with nothing rounded; ``fp32`` and ``ideal`` give the graph's own outputs only, sums closed.
        """
        if which not in self._runners:
            own: Rounding = "ideal" if self.mode == "ideal" else "fp16"
            opened = self.mode == "strict"
            instrumented = {
                "own": lambda: instrument(self._exported, own, opened=opened),
                "census": lambda: instrument(self._exported, own, opened=opened, census=True),
                "seen fp32": lambda: instrument(self._exported, None, opened=opened),
                "fp32": lambda: instrument(self._exported, None, watched=False),
                "ideal": lambda: instrument(self._exported, "ideal", watched=False),
            }[which]()
            names = self._exported.signature.output_names
            self._runners[which] = Runner(instrumented, names, census=which == "census")
        return self._runners[which]

    def feeds(self, call: Call) -> dict[str, Array]:
        """Return the arrays of a call by input name; an input that the file has in FP16 is taken as float32."""
        signature = self._exported.signature
        if self._names is not None:
            return {name: to_numpy(tensor) for name, tensor in self._names.tensors(_as_tensors(call)).items()}
        args, kwargs = call
        if len(args) > len(signature.inputs):
            raise InputError(f"{len(args)} inputs for a graph with {len(signature.inputs)}")
        given = {**dict(zip(signature.input_names, args, strict=False)), **kwargs}
        arrays = {k: to_numpy(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        halves = {spec.name for spec in signature.inputs if spec.dtype == "float16"}
        return {k: v.astype(np.float32) if k in halves else v for k, v in arrays.items()}

    def bad_of(self, figures: Figures, feeds: Mapping[str, Array]) -> dict[int, BadTensor]:
        """Return what is bad in a run, by place; what is not finite in FP32 either is not."""
        wrong = set(np.flatnonzero(~figures.is_finite).tolist())
        seen = self.runner("own").instrumented.seen
        if any(seen[index].range is None for index in wrong):
            wrong -= self.infinite_in_fp32(feeds)
        return {index: _bad_tensor(seen[index], float(figures.magnitude[index]), wrong) for index in sorted(wrong)}

    def infinite_in_fp32(self, feeds: Mapping[str, Array]) -> set[int]:
        """Return the places of the tensors that are not finite in FP32."""
        runner = self.runner("seen fp32")
        _, figures = runner.run(feeds)
        # The sum of what is huge may be infinite, although no number is.
        is_nan = ~figures.is_finite & (figures.magnitude < _HUGE)
        found = np.flatnonzero(is_nan | ~np.isfinite(figures.magnitude)).tolist()
        return {index for index in found if runner.instrumented.seen[index].range is None}

    def accumulators_of(self, figures: Figures) -> tuple[Accumulator, ...]:
        """Return the sums whose bound is beyond 65504."""
        nodes = self.runner("own").instrumented.accumulators
        return tuple(
            Accumulator(node.name, node.operator, float(bound), node.provenance.module, node.provenance.source)
            for node, bound in zip(nodes, figures.bounds, strict=True)
            if FP16_MAX < bound < np.inf  # what is infinite was so before it was added
        )


def worse(one: Mapping[int, BadTensor], other: Mapping[int, BadTensor]) -> dict[int, BadTensor]:
    """Return all bad tensors of two runs, each with its larger magnitude; an origin in one is an origin."""
    joined = dict(one)
    for index, tensor in other.items():
        known = joined.get(index, tensor)
        larger = tensor if tensor.magnitude > known.magnitude else known
        joined[index] = dataclasses.replace(larger, is_origin=tensor.is_origin or known.is_origin)
    return joined


def _bad_tensor(seen: Seen, magnitude: float, wrong: set[int]) -> BadTensor:
    reason: Reason = "nan"
    if magnitude >= FP16_OVERFLOW:
        reason = "infinite" if np.isinf(magnitude) else "overflow"
    where = seen.provenance
    is_origin = not wrong & seen.sources
    return BadTensor(seen.name, seen.kind, seen.operator, magnitude, reason, where.module, where.source, is_origin)


def _where(module: str, source: str) -> str:
    return " at ".join(part for part in (module, source) if part)


def as_array_call(inputs: Any) -> Call:
    """Return positional and keyword arguments for one call's inputs, in tensors or arrays."""
    return ((inputs,), {}) if isinstance(inputs, np.ndarray) else as_call(inputs)


def as_array_calls(inputs: Any) -> list[Call]:
    """Return the calls for one tuple or dict of tensors or arrays, or for an iterable of them.

    Raises:
        InputError: If there are none.
    """
    if isinstance(inputs, np.ndarray):
        return [as_array_call(inputs)]
    calls = [] if inputs == [] else as_calls(inputs)
    if not calls:
        raise InputError("no inputs are given", hint="give one tuple of tensors, or an iterable of them")
    return calls


def _as_tensors(call: Call) -> Call:
    args, kwargs = call
    return tuple(map(_as_tensor, args)), {name: _as_tensor(value) for name, value in kwargs.items()}


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, np.ndarray) else value
