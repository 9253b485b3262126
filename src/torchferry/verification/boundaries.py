"""What PyTorch gives at the boundaries at which a graph is cut: marks, modules, and the model's own outputs."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchferry.exporter.inputs import to_numpy
from torchferry.exporter.marks import MARK, Marks
from torchferry.partitioning.selectors import Selectors
from torchferry.verification.sizes import run_torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

    from torchferry.core.engine import Array
    from torchferry.exporter.source import Source
    from torchferry.partitioning import PartitionPlan

    Module = tuple[str, str]
    Mark = tuple[str, int, str, int]


@dataclass(frozen=True)
class Candidates:
    """What a tensor of the graph should be.

    Attributes:
        where: The boundary, as a selector.
        arrays: What PyTorch has there; the graph's has to be one of these.
        is_certain: The graph's is sure to be one of them. Of a module it is not: what crosses into it in the graph may
            be a size, and its tensors have no order that the graph keeps.
        reason: Why there may be nothing to compare with.
    """

    where: str
    arrays: tuple[Array, ...]
    is_certain: bool = True
    reason: str = "PyTorch has no tensor of its dtype and shape there"


@dataclass
class _Seen:
    """What was seen while the model ran.

    Attributes:
        marks: By number.
        modules: For every call of a module its tensors.
        outputs: Of the model.
    """

    marks: dict[int, torch.Tensor] = field(default_factory=dict)
    modules: dict[Module, list[list[torch.Tensor]]] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)


class TorchBoundaries:
    """Runs a module and says what the tensors at a plan's cuts should be.

    Args:
        plan: The cut; its selectors say which modules matter.
        source: The module, which is in eval mode, with the names of its inputs.
    """

    def __init__(self, plan: PartitionPlan, source: Source) -> None:
        self._source = source
        self._plan = plan
        selectors = Selectors(plan.flow)
        values = dict.fromkeys(v for part in plan.parts for v in (*part.region.inputs, *part.region.outputs))
        self._marks: dict[ir.Value, list[Mark]] = {value: selectors.marks_of(value) for value in values}
        known = dict(source.model.named_modules())
        asked = dict.fromkeys(s for part in plan.parts for s in (*part.start, *part.end))
        found = dict.fromkeys(module for module in map(selectors.module_of, asked) if module and module[0] in known)
        self._modules = {m: [value for value in selectors.find(":".join(m)) if value in values] for m in found}

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Candidates]]:
        """Return what PyTorch gives for the names by which the parts know the tensors.

        Nothing can be told of a module that is called more than once, and of a mark that only a rewriter makes.

        Args:
            tensors: The model's inputs by name.
        """
        marks = Marks()
        seen = _Seen()
        with marks.applied(), self._hooks(seen), _Watch(seen):
            seen.outputs = run_torch(self._source, tensors)
        flow = self._plan.flow
        found: dict[str, list[Candidates]] = {}
        by_mark = {mark: (to_numpy(seen.marks[number]),) for number, mark in enumerate(marks.boundaries())}
        for value, boundaries in self._marks.items():
            for mark in boundaries:
                func, call, side, at = mark
                where = f"{func}[{call}]:{side}.{at}"
                place = Candidates(where, by_mark.get(mark, ()), reason="PyTorch comes by no such mark")
                found.setdefault(flow.name(value), []).append(place)
        for module, values in self._modules.items():
            calls = seen.modules.get(module, [])
            arrays = tuple(map(to_numpy, calls[0])) if len(calls) == 1 else ()
            place = Candidates(":".join(module), arrays, is_certain=False)
            if len(calls) != 1:
                place = dataclasses.replace(place, reason=f"PyTorch calls the module {len(calls)} times")
            for value in values:
                found.setdefault(flow.name(value), []).append(place)
        arrays_of = [(to_numpy(tensor),) for tensor in seen.outputs]
        results = self._plan.results
        reason = f"PyTorch gives {len(seen.outputs)} outputs, the graph {len(results)}"
        for at, name in enumerate(results):
            arrays = arrays_of[at] if len(arrays_of) == len(results) else ()
            found.setdefault(name, []).append(Candidates("output of the model", arrays, reason=reason))
        return found

    @contextmanager
    def _hooks(self, seen: _Seen) -> Iterator[None]:
        """Note what goes into and out of the modules."""

        def note(module: Module, value: Any) -> None:
            tensors = [leaf.clone() for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            seen.modules.setdefault(module, []).append(tensors)

        with ExitStack() as stack:
            for key in self._modules:
                module = self._source.model.get_submodule(key[0])
                if key[1] == "input":
                    hook = module.register_forward_pre_hook(
                        lambda *called, key=key: note(key, called[1:]), with_kwargs=True
                    )
                else:
                    hook = module.register_forward_hook(lambda *called, key=key: note(key, called[-1]))
                stack.callback(hook.remove)
            yield


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the tensors that are marked."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is MARK:
            self._seen.marks[args[1]] = result.clone()  # the model may write into it
        return result
