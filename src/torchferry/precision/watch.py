"""Watching a module run: the range of what every module takes and gives, on real inputs, wherever it runs."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

from torchferry.core.errors import ConfigError, ModelError
from torchferry.precision.rounding import FP16_MAX, FP16_NORMAL
from torchferry.precision.watch_report import Crossing, ModuleRange, ParameterRange, WatchReport

if TYPE_CHECKING:
    from types import TracebackType

# What is measured of a tensor, in this order.
_FIGURES = 6
_MAGNITUDE, _SUBNORMAL, _FLUSHED, _NAN, _INFINITE, _ELEMENTS = range(_FIGURES)
_FLUSHED_BELOW = 2.0**-25  # what is at most this is rounded to zero


class watch:  # noqa: N801 - a verb, used as `with ferry.fp16.watch(model) as w`
    """Watch every module of a model while it runs.

    Costs a few reductions a tensor, done where the tensor is, and one transfer at the end of each forward. Leaving the
    block removes every hook, whatever happened inside. May be entered again to add more runs.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    >>> with watch(model) as w, torch.no_grad():
    ...     _ = model(torch.ones(1, 2))
    >>> [row.path for row in w.report().modules]
    ['', '0', '1']

    Args:
        model: The module.

    Raises:
        ModelError: If it is not a module.
        ConfigError: On entering, if it is entered already.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        if not isinstance(model, torch.nn.Module):
            raise ModelError(f"only a torch.nn.Module can be watched, got {type(model).__name__}")
        self._model = model
        self._handles: list[Any] = []
        self._paths: dict[torch.nn.Module, str] = {}
        self._rows: dict[str, _Row] = {}
        self._crossings: dict[tuple[str, str, str], Crossing] = {}
        self._origin: Crossing | None = None
        self._forwards = 0
        self._run = _Run()

    def __enter__(self) -> Self:
        if self._handles:
            raise ConfigError("this watch is entered already", hint="make another one: ferry.fp16.watch(model)")
        for path, module in self._model.named_modules():
            self._paths[module] = path
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._settle()

    def report(self) -> WatchReport:
        """Return what was seen so far, over all forwards."""
        measured = [(name, _measured(p)) for name, p in self._tensors() if p.is_floating_point() and p.numel()]
        table = _table([figures for _, figures in measured])
        parameters = [ParameterRange(name, _magnitude(row)) for (name, _), row in zip(measured, table, strict=True)]
        called = {path: row.as_range(path) for path, row in self._rows.items()}
        return WatchReport(
            model=type(self._model).__name__,
            forwards=self._forwards,
            modules=tuple(called.values()),
            crossings=tuple(self._crossings.values()),
            origin=self._origin,
            parameters=tuple(p for p in parameters if not p.magnitude <= FP16_MAX),
            not_called=tuple(path for path, _ in self._model.named_modules() if path not in called),
        )

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()

    def _before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._run.begin(self._paths[module], type(module).__name__, (args, kwargs))

    def _after(self, _module: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._run.end(output):
            self._settle()

    def _settle(self) -> None:
        """Take in the forward that has ended; the only place that waits for the device."""
        run, self._run = self._run, _Run()
        if not run.calls:
            return
        self._forwards += 1
        table = _table(run.figures)
        for call in run.calls:
            row = self._rows.setdefault(call.path, _Row(call.kind))
            row.add([table[i] for i in call.taken], [table[i] for i in call.given], is_inner=bool(call.children))
        for crossing in _crossings(run, table):
            key = (crossing.kind, crossing.module, crossing.before)
            known = self._crossings.get(key)
            if known is None or crossing.magnitude > known.magnitude:
                self._crossings[key] = crossing
        self._origin = self._origin or _origin(run, table)


@dataclass(eq=False)
class _Call:
    """One call of a module; tensors are given by their places in the run's list of figures."""

    path: str
    kind: str
    parent: _Call | None
    taken: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    children: list[_Call] = field(default_factory=list)


class _Run:
    """One forward: the calls in their order, and figures of every tensor, still on its device."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.figures: list[torch.Tensor] = []
        self._stack: list[_Call] = []
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}

    def begin(self, path: str, kind: str, inputs: Any) -> None:
        parent = self._stack[-1] if self._stack else None
        call = _Call(path, kind, parent)
        call.taken = self._places(inputs)
        if parent is not None:
            parent.children.append(call)
        self.calls.append(call)
        self._stack.append(call)

    def end(self, output: Any) -> bool:
        """Note what the innermost call gives; tell whether that was the outermost."""
        if not self._stack:  # the watch was entered inside this call
            return False
        self._stack.pop().given = self._places(output)
        return not self._stack

    def _places(self, value: Any) -> list[int]:
        return [self._place(tensor) for tensor in _tensors_in(value, set())]

    def _place(self, tensor: torch.Tensor) -> int:
        """Return where a tensor's figures are; what one module gives and the next takes is measured once."""
        version = -1 if tensor.is_inference() else tensor._version
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version >= 0:
            return known[2]
        self.figures.append(_measured(tensor))
        place = len(self.figures) - 1
        self._known[id(tensor)] = (weakref.ref(tensor), version, place)
        return place


@dataclass
class _Row:
    """What is known of a module so far; see ``ModuleRange``."""

    kind: str
    calls: int = 0
    taken: float = 0.0
    given: float = 0.0
    is_leaf: bool = True
    sums: list[float] = field(default_factory=lambda: [0.0] * _FIGURES)

    def add(self, taken: list[list[float]], given: list[list[float]], *, is_inner: bool) -> None:
        self.calls += 1
        self.is_leaf &= not is_inner
        self.taken = max([self.taken, *map(_magnitude, taken)])
        self.given = max([self.given, *map(_magnitude, given)])
        self.sums = [sum(column) for column in zip(self.sums, *given, strict=True)]

    def as_range(self, path: str) -> ModuleRange:
        elements = self.sums[_ELEMENTS] or 1.0
        return ModuleRange(
            path=path,
            kind=self.kind,
            calls=self.calls,
            taken=self.taken,
            given=self.given,
            subnormal=self.sums[_SUBNORMAL] / elements,
            flushed=self.sums[_FLUSHED] / elements,
            nans=int(self.sums[_NAN]),
            infinities=int(self.sums[_INFINITE]),
            is_leaf=self.is_leaf,
        )


def _magnitude(row: list[float]) -> float:
    return float("inf") if row[_INFINITE] or row[_NAN] else row[_MAGNITUDE]


def _tensors_in(value: Any, met: set[int]) -> Iterator[torch.Tensor]:
    """Find the float tensors in any nesting of mappings, sequences, sets and dataclasses."""
    if isinstance(value, torch.Tensor):
        if (value.is_floating_point() or value.is_complex()) and value.device.type != "meta":
            yield value
        return
    if value is None or isinstance(value, str | bytes | int | float) or id(value) in met:
        return
    met.add(id(value))
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, tuple | list | set | frozenset):
        inner = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    for item in inner:
        yield from _tensors_in(item, met)


@torch.no_grad()
def _measured(tensor: torch.Tensor) -> torch.Tensor:
    """Return the figures of a tensor as a vector on its device, without waiting for it."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    size = tensor.abs() if tensor.dtype == torch.float64 else tensor.to(torch.float32).abs()
    if not size.numel():
        return size.new_zeros(_FIGURES)
    count = torch.count_nonzero  # many times faster than sums of truth values
    elements = size.new_full((), size.numel())
    zeros = elements - count(size)
    figures = [
        size.amax(),
        count(size < FP16_NORMAL) - zeros,
        count(size <= _FLUSHED_BELOW) - zeros,
        count(size != size),
        count(size == torch.inf),
        elements,
    ]
    return torch.stack([figure.to(size.dtype) for figure in figures])


def _table(figures: list[torch.Tensor]) -> list[list[float]]:
    """Bring all figures to the host, in one transfer for each device and dtype."""
    rows: dict[int, list[float]] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, vector in enumerate(figures):
        groups.setdefault((vector.device, vector.dtype), []).append(place)
    for places in groups.values():
        rows.update(zip(places, torch.stack([figures[p] for p in places]).tolist(), strict=True))
    return [rows[place] for place in range(len(figures))]


def _is_beyond(places: list[int], table: list[list[float]]) -> bool:
    return any(_magnitude(table[place]) > FP16_MAX for place in places)


def _crossings(run: _Run, table: list[list[float]]) -> list[Crossing]:
    """Find where values pass 65504, innermost first: in a module, or in the code of one between its modules."""
    made_by_modules = {place for call in run.calls for place in call.given}
    handed: set[int] = set()
    found: list[Crossing] = []
    inside: dict[int, set[str]] = {}  # kinds of crossings inside a call, by its id

    def note(kind: Any, call: _Call, places: list[int], before: str = "") -> None:
        found.append(Crossing(kind, call.path, max(_magnitude(table[p]) for p in places), before))
        outer: _Call | None = call
        while outer is not None:
            inside.setdefault(id(outer), set()).add(kind)
            outer = outer.parent

    def visit(call: _Call) -> None:
        own = call.parent
        fresh = [place for place in call.taken if place not in handed and place not in made_by_modules]
        if own is not None and _is_beyond(fresh, table) and not _has_seen(own, call):
            note("enters", own, fresh, before=call.path)
        handed.update(call.taken)
        for child in call.children:
            visit(child)
        entered, left = _is_beyond(call.taken, table), _is_beyond(call.given, table)
        if left and not entered and "enters" not in inside.get(id(call), ()):
            note("enters", call, call.given)
        within = entered or any(_is_beyond(child.given, table) for child in call.children)
        if within and call.given and not left and "leaves" not in inside.get(id(call), ()):
            note("leaves", call, call.taken if entered else [p for c in call.children for p in c.given])
        handed.update(call.given)

    def _has_seen(parent: _Call, until: _Call) -> bool:
        """Tell whether what a module's own code had at hand was beyond already."""
        earlier = parent.children[: parent.children.index(until)]
        return _is_beyond(parent.taken, table) or any(_is_beyond(c.given + c.taken, table) for c in earlier)

    for call in run.calls:
        if call.parent is None:
            visit(call)
    return found


def _origin(run: _Run, table: list[list[float]]) -> Crossing | None:
    """Find the first call that gives NaN or infinity having taken none, the innermost of them."""

    def is_finite(places: list[int]) -> bool:
        return not any(table[place][_NAN] or table[place][_INFINITE] for place in places)

    for call in run.calls:
        if is_finite(call.taken) and not is_finite(call.given):
            inner = call
            while True:
                deeper = [c for c in inner.children if is_finite(c.taken) and not is_finite(c.given)]
                if not deeper:
                    return Crossing("enters", inner.path, float("inf"))
                inner = deeper[0]
    return None
