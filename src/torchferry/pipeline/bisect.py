"""The verb ``bisect``: which operator an engine gets wrong, found by running ever shorter prefixes of a model on it."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from torchferry.core.compare import Tolerance, compare, usual_tolerance
from torchferry.core.engine import Engine
from torchferry.core.errors import BackendError, ConfigError, ModelError
from torchferry.core.report import plain
from torchferry.core.target import Target
from torchferry.pipeline.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from torchferry.core.compare import Array
    from torchferry.exporter.capture import Captured
    from torchferry.exporter.replay import Replay
    from torchferry.exporter.source import Source
    from torchferry.graph import Exported


class Runnable(Protocol):
    """Whatever runs a graph."""

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the outputs by name."""
        ...


@dataclass(frozen=True)
class Prefix:
    """What came of running the first operators of a model on the engine and the rest in PyTorch.

    Attributes:
        operators: How many ran on the engine.
        passed: True if the model's outputs stayed within the tolerance.
        max_abs: Largest absolute error of the outputs.
        reason: Why it failed; empty if it passed.
    """

    operators: int
    passed: bool
    max_abs: float
    reason: str = ""


@dataclass(frozen=True)
class Tensor:
    """A tensor as PyTorch and the engine see it, at the end of the first prefix that fails.

    Attributes:
        name: In the graph.
        expected: Largest magnitude in PyTorch.
        actual: Largest magnitude in the engine.
        max_abs: Largest absolute error where both are finite.
        not_finite: Elements that are NaN or infinite in the engine and not in PyTorch.
    """

    name: str
    expected: float
    actual: float
    max_abs: float
    not_finite: int

    def __str__(self) -> str:
        text = f"'{self.name}': max |x| {self.actual:.4g}, in PyTorch {self.expected:.4g}; max abs {self.max_abs:.3g}"
        return f"{text}; {self.not_finite} elements no longer finite" if self.not_finite else text


@dataclass(frozen=True)
class Bisection:
    """Where an engine's answer leaves the tolerance.

    The search takes for granted that once a prefix fails, longer ones fail too. Where that is not so, it finds one of
    the places at which the answer leaves the tolerance, not necessarily the first.

    Attributes:
        engine: What was run.
        total: Number of operators of the model.
        tolerance: What is asked of the model's outputs.
        module: Path of the module whose operator is the last of the shortest prefix that fails; None if the whole
            model is within the tolerance.
        operator: The operator.
        source: The user's line.
        suspects: Operators between the longest prefix seen to pass and the shortest seen to fail, the last one
            included; more than one where the graph has no place to cut between them.
        tensors: What the prefix leaves to the rest.
        prefixes: What was tried, in order.
    """

    engine: str
    total: int
    tolerance: Tolerance
    module: str | None = None
    operator: str = ""
    source: str = ""
    suspects: tuple[str, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    prefixes: tuple[Prefix, ...] = ()

    @property
    def passed(self) -> bool:
        """True if the engine runs the whole model within the tolerance."""
        return self.module is None

    def __str__(self) -> str:
        if self.module is None:
            return f"{self.engine} runs all {self.total} operators within {self.tolerance}"
        prefix = min(p.operators for p in self.prefixes if not p.passed)
        place = f"{self.operator} in '{self.module or '(root)'}', {len(self.prefixes)} builds"
        lines = [
            f"{self.engine} leaves {self.tolerance} at operator {prefix} of {self.total}: {place}",
            f"  at {self.source or 'unknown line'}",
        ]
        if len(self.suspects) > 1:
            lines.append(f"  or just before it: {', '.join(self.suspects[:-1])}")
        lines += [f"  {tensor}" for tensor in self.tensors]
        reason = next(p.reason for p in reversed(self.prefixes) if p.operators == prefix and not p.passed)
        return "\n".join([*lines, f"  outputs then: {reason}"])

    def to_json(self) -> str:
        """Render as JSON; numbers that JSON lacks become text."""
        return json.dumps({"passed": self.passed, **plain(self)}, indent=2, allow_nan=False)


def bisect(
    model: Any,
    engine: Engine | Target | str | Callable[[Exported], Runnable],
    inputs: Any = None,
    *,
    tolerance: Tolerance | None = None,
    steps: Steps | None = None,
) -> Bisection:
    """Find the shortest prefix of a model whose result on an engine leaves the tolerance, the rest run in PyTorch.

    The model is exported once, with the rewriters for the engine. Each prefix of its operators is cut out of that graph
    and built for the engine; what it leaves is given to the remaining operators in PyTorch, and the model's outputs
    are compared. Of n operators about log2 n prefixes are built.

    Args:
        model: A ``torch.nn.Module`` or a ``Source``.
        engine: A target, the name of an engine, an engine that was compiled (its target counts), or a function that
            takes an ``Exported`` and returns something with ``run({name: array}) -> {name: array}``.
        inputs: One tuple or dict of tensors, or an iterable of them, all of one shape; may be left out for a
            ``Source``.
        tolerance: What is asked of the outputs; by default that of the target's precision, for a function that of fp16.
        steps: Told of every build.

    Raises:
        ConfigError: If ``inputs`` are missing, or the target is int8: prefixes are not quantised.
        ModelError: If the model fails in PyTorch.
        ExportError: If it cannot be exported.
        MissingBackendError: If the engine is unknown or not installed.
    """
    from torchferry.backends import check_target
    from torchferry.exporter.capture import capture, evaluation_mode
    from torchferry.exporter.inputs import as_calls
    from torchferry.exporter.replay import Replay
    from torchferry.exporter.source import Source
    from torchferry.pipeline.export import rewriter_context

    calls = as_calls(inputs) if inputs is not None else []
    if isinstance(model, Source):
        calls = calls or [model.call]
        source = Source(model.model, *calls[0], input_names=model.input_names, output_names=model.output_names)
    elif calls:
        source = Source(model, *calls[0])
    else:
        raise ConfigError("bisect needs inputs to run", hint="give one tuple of tensors, or an iterable of them")
    target, build = _engine(engine)
    if target is not None:
        check_target(target)
        if target.precision == "int8":
            raise ConfigError("bisect runs prefixes of the FP32 graph, not of one quantised to int8")
    tolerance = tolerance or usual_tolerance(target.precision if target else "fp16")
    steps = steps or Steps()
    with steps.step("export") as step, evaluation_mode(source.model):
        captured = capture(source, target or Target(), functools.partial(rewriter_context, source, target or Target()))
        replay = Replay(captured.program)
        step.detail = f"{len(replay.nodes)} operators"
    search = _Search(source, captured, replay, calls, build, tolerance, steps)
    name = str(target) if target else getattr(engine, "__name__", type(engine).__name__)
    return search.result(name)


def _engine(engine: Any) -> tuple[Target | None, Callable[[Exported], Any]]:
    """Return the target, if there is one, and what opens a graph as a context manager."""
    if isinstance(engine, str):
        engine = Target(engine)
    elif isinstance(engine, Engine):
        engine = engine.target
    if isinstance(engine, Target):
        return engine, functools.partial(_compiled, engine)
    if callable(engine):
        return None, functools.partial(_built, engine)
    raise ConfigError(
        f"'{engine!r}' is no engine", hint="give a Target, an engine's name, or a function that takes an Exported"
    )


@contextmanager
def _compiled(target: Target, exported: Exported) -> Iterator[Runnable]:
    from torchferry.backends import compile

    with tempfile.TemporaryDirectory() as folder, compile(exported, target, Path(folder) / "engine").open() as session:
        yield session


@contextmanager
def _built(build: Callable[[Exported], Runnable], exported: Exported) -> Iterator[Runnable]:
    yield build(exported)


class _Search:
    def __init__(
        self,
        source: Source,
        captured: Captured,
        replay: Replay,
        calls: list[Any],
        build: Callable[[Exported], Any],
        tolerance: Tolerance,
        steps: Steps,
    ) -> None:
        self.source, self.exported, self.replay = source, captured.exported, replay
        self.calls, self.build, self.tolerance, self.steps = calls, build, tolerance, steps
        self.values = _graph_names(captured.exported, replay)
        self.cuts = [
            (number, sorted(live))
            for number, live in enumerate(replay.live_after(), 1)
            if live and live <= self.values.keys()
        ]
        self.expected = [self._in_pytorch(call) for call in calls]
        self.prefixes: list[Prefix] = []
        self.tensors: dict[int, tuple[Tensor, ...]] = {}

    def _in_pytorch(self, call: Any) -> dict[str, Any]:
        try:
            return self.replay.run(call, {}, self.replay.outputs)
        except Exception as exc:
            raise ModelError(f"the captured model fails in PyTorch: {exc}") from exc

    def result(self, engine: str) -> Bisection:
        """Search, the whole model first."""
        total = len(self.replay.nodes)
        result = Bisection(engine, total, self.tolerance)
        if not self.cuts or self._passes(len(self.cuts) - 1):
            return dataclasses.replace(result, prefixes=tuple(self.prefixes))
        good, bad = -1, len(self.cuts) - 1
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._passes(middle):
                good = middle
            else:
                bad = middle
        first = self.cuts[good][0] if good >= 0 else 0
        suspects = self.replay.nodes[first : self.cuts[bad][0]]
        module, source = _origin(suspects[-1])
        return dataclasses.replace(
            result,
            module=module,
            operator=_operator(suspects[-1]),
            source=source,
            suspects=tuple(node.name for node in suspects),
            tensors=self.tensors.get(bad, ()),
            prefixes=tuple(self.prefixes),
        )

    def _passes(self, number: int) -> bool:
        operators, live = self.cuts[number]
        with self.steps.step(f"engine: first {operators} of {len(self.replay.nodes)} operators") as step:
            prefix = self._try(number, operators, live)
            self.prefixes.append(prefix)
            step.detail = "agrees" if prefix.passed else f"differs: {prefix.reason}"
        return prefix.passed

    def _try(self, number: int, operators: int, live: list[str]) -> Prefix:
        """Run one prefix on the engine, and the rest of the model in PyTorch on what it leaves."""
        from torchferry.exporter.inputs import to_numpy

        names = [self.values[name] for name in live]
        worst, reason = 0.0, ""
        seen: list[tuple[Tensor, ...]] = []
        try:
            prefix = _prefix(self.exported, names)
            with self.build(prefix) as session:
                for call, expected in zip(self.calls, self.expected, strict=True):
                    tensors = self.source.names.tensors(call)
                    actual = session.run({name: to_numpy(tensors[name]) for name in prefix.signature.input_names})
                    truth = self.replay.run(call, {}, live)
                    given = {name: _like(actual[n], truth[name]) for name, n in zip(live, names, strict=True)}
                    seen.append(tuple(_tensor(n, truth[name], actual[n]) for name, n in zip(live, names, strict=True)))
                    outputs = self.replay.run(call, given, self.replay.outputs)
                    for name, want in expected.items():
                        shown = compare(to_numpy(want), to_numpy(outputs[name]), self.tolerance, name=name)
                        worst = max(worst, shown.max_abs)
                        reason = reason or (f"'{self.values.get(name, name)}': {shown.reason}" if shown.reason else "")
        except BackendError as exc:
            reason = f"the engine fails: {exc.message}"
        self.tensors[number] = max(seen, key=lambda row: max(t.max_abs for t in row), default=())
        return Prefix(operators, not reason, worst, reason)


def _graph_names(exported: Exported, replay: Replay) -> dict[str, str]:
    """Return, for nodes of the program whose value stands in the graph, its name there."""
    graph = exported.model.graph
    found = {value.name: value.name for node in graph for value in node.outputs if value.name}
    outputs = dict(zip(replay.outputs, exported.signature.output_names, strict=False))
    return {**found, **outputs}


def _prefix(exported: Exported, names: list[str]) -> Exported:
    from torchferry.partitioning import partition

    return partition(exported, [{"name": "prefix", "end": names}])[0]


def _operator(node: torch.fx.Node) -> str:
    """Name an operator; what only takes one of its results is not one."""
    maker = node.args[0] if node.target is operator.getitem and node.args else node
    return str(getattr(maker, "target", node.target))


def _origin(node: torch.fx.Node) -> tuple[str, str]:
    """Return the module path and the user's line of an operator of a program."""
    from torchferry.graph.provenance import user_line

    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix("."), user_line(node.meta.get("stack_trace") or "")


def _like(array: Array, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(array)).to(tensor.device, tensor.dtype).reshape(tensor.shape)


def _tensor(name: str, expected: torch.Tensor, actual: Array) -> Tensor:
    from torchferry.exporter.inputs import to_numpy

    want, got = to_numpy(expected).astype(np.float64), np.asarray(actual).astype(np.float64)
    finite = np.isfinite(want) & np.isfinite(got)
    lost = int(np.count_nonzero(np.isfinite(want) & ~np.isfinite(got)))
    error = np.abs(np.where(finite, want - got, 0.0))
    return Tensor(name, _largest(want), _largest(got), float(error.max(initial=0.0)), lost)


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))
