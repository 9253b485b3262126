"""Which tensors a selector means: ``func[2]:output.1``, ``backbone:input``, or a tensor's name."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from torchferry.core.errors import ConfigError, did_you_mean
from torchferry.graph.marks import is_mark
from torchferry.graph.provenance import MODULE_KEY
from torchferry.partitioning.flow import inner_graphs

if TYPE_CHECKING:
    import onnx_ir as ir

    from torchferry.partitioning.flow import Flow

_SELECTOR = re.compile(r"(?P<owner>.+?)(?:\[(?P<call>\d+)\])?:(?P<side>input|output)(?:\.(?P<item>.+))?")


class Selectors:
    """Finds the tensors that selectors name.

    A tensor's own name goes before a mark of that name, and a mark before a module.

    Args:
        flow: Of the graph.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._marks = _marks(flow)
        self._tensors = {mark.outputs[0].name: flow.origin(mark.outputs[0]) for mark in flow.marks}
        self._tensors |= {value.name: value for value in (*flow.inputs, *flow.maker)}
        self._tensors |= dict(flow.model.graph.initializers.items())

    @functools.cached_property
    def _modules(self) -> set[str]:
        paths = {node.metadata_props.get(MODULE_KEY, "") for node in self._flow.nodes}
        return {path[:end] for path in paths for end in (*_dots(path), len(path)) if path}

    def find(self, selector: str) -> list[ir.Value]:
        """Return the tensors that a selector means, in their boundary's order.

        Raises:
            ConfigError: If it means none; the nearest that exist are named.
        """
        if selector in self._tensors:
            return [self._tensors[selector]]
        match = _SELECTOR.fullmatch(selector)
        if match is None:
            raise self._unknown(selector)
        owner, call, side, item = match.group("owner", "call", "side", "item")
        marked = self._marks.get((owner, int(call or 0), side))
        if marked is not None:
            return self._pick(selector, [(name, at, value) for at, name, value in marked], item)
        if owner not in self._modules or (call and any(owner == func for func, _, _ in self._marks)):
            raise self._unknown(selector)
        if call is not None:
            raise ConfigError(
                f"'{selector}' asks for a call of the module '{owner}', but the graph does not tell its calls apart",
                hint=f"'{owner}:{side}' is the boundary of all its calls; for one of them, mark it with ferry.mark",
            )
        values = self._module(owner, side)
        if not values:
            raise ConfigError(
                f"'{selector}' is no tensor: nothing that is computed from the graph's inputs goes "
                f"{'into' if side == 'input' else 'out of'} the module '{owner}'"
            )
        return self._pick(selector, [(self._flow.name(v), at, v) for at, v in enumerate(values)], item)

    def module_of(self, selector: str) -> tuple[str, str] | None:
        """Return path and side of the module whose boundary a selector means; None if it means anything else."""
        match = None if selector in self._tensors else _SELECTOR.fullmatch(selector)
        if match is None:
            return None
        owner, call, side = match.group("owner", "call", "side")
        is_module = owner in self._modules and (owner, int(call or 0), side) not in self._marks
        return (owner, side) if is_module else None

    def marks_of(self, value: ir.Value) -> list[tuple[str, int, str, int]]:
        """Return function, call, side and number of every mark of a tensor."""
        return [(*key, at) for key, each in self._marks.items() for at, _, marked in each if marked is value]

    def known(self) -> list[str]:
        """Return the selectors of marks and modules and the names of the graph's inputs and outputs."""
        modules = [f"{path}:{side}" for path in sorted(self._modules) for side in ("input", "output")]
        return [*self._marked(), *modules, *self._ends()]

    def _marked(self) -> list[str]:
        return [f"{func}[{call}]:{side}" if call else f"{func}:{side}" for func, call, side in self._marks]

    def _ends(self) -> list[str]:
        return [value.name or "" for value in (*self._flow.inputs, *self._flow.model.graph.outputs)]

    def _module(self, path: str, side: str) -> list[ir.Value]:
        """Return what crosses into or out of the nodes of a module, in the order in which it is read or made."""
        flow = self._flow
        inside = [node for node in flow.nodes if _is_under(node.metadata_props.get(MODULE_KEY, ""), path)]
        own = set(inside)
        if side == "input":
            read = dict.fromkeys(value for node in inside for value in flow.reads[node])
            return [value for value in read if flow.maker.get(value) not in own and value not in flow.rootless]
        results = set(flow.outputs)
        made = [value for node in inside for value in node.outputs if value not in flow.rootless]
        return [v for v in made if v in results or any(node not in own for node in flow.readers.get(v, ()))]

    def _pick(self, selector: str, boundary: list[tuple[str, int, ir.Value]], item: str | None) -> list[ir.Value]:
        """Choose by name, by number, or by the name of the structure that holds several tensors."""
        picked = [
            [value for _, _, value in boundary if item is None],
            [value for name, _, value in boundary if name == item],
            [value for _, at, value in boundary if str(at) == item],
            [value for name, _, value in boundary if item and name.startswith(f"{item}.")],
        ]
        found = next((values for values in picked if values), None)
        if found is None:
            items = ", ".join(f"{at} ('{name}')" if name else str(at) for name, at, _ in boundary)
            raise ConfigError(f"'{selector}': the boundary has no tensor '{item}'", hint=f"it has {items}")
        return found

    def _unknown(self, selector: str) -> ConfigError:
        inner = _holder(self._flow, selector)
        if inner is not None:
            return ConfigError(
                f"'{selector}' lies inside a branch or loop, the {inner.op_type} '{inner.name}', where no cut can go",
                hint=f"cut before or after it, at {', '.join(repr(value.name) for value in inner.outputs)}",
            )
        hint = did_you_mean(selector, {*self.known(), *(name or "" for name in self._tensors)})
        if hint.startswith("known:"):  # not a large graph's thousands of tensors
            hint = did_you_mean(selector, [*self._marked(), *self._ends()])
        return ConfigError(f"'{selector}' is no mark, module or tensor of this graph", hint=hint)


def _marks(flow: Flow) -> dict[tuple[str, int, str], list[tuple[int, str, ir.Value]]]:
    """Return the tensors of each marked boundary: number, name, value, by number."""
    found: dict[tuple[str, int, str], list[tuple[int, str, ir.Value]]] = {}
    for mark in flow.marks:
        func, call, side, at, name = _boundary(mark)
        found.setdefault((func, call, side), []).append((at, name, flow.origin(mark.inputs[0])))  # type: ignore[arg-type]
    return {key: sorted(each, key=lambda tensor: tensor[0]) for key, each in found.items()}


def _boundary(mark: ir.Node) -> tuple[str, int, str, int, str]:
    attributes = {key: attribute.value for key, attribute in mark.attributes.items()}
    return (
        str(attributes.get("func", "")),
        int(attributes.get("func_id", 0)),
        str(attributes.get("type", "")),
        int(attributes.get("id", 0)),
        str(attributes.get("name", "")),
    )


def _holder(flow: Flow, selector: str) -> ir.Node | None:
    """Return the node in whose subgraphs a selector's mark or tensor lies."""
    for node in flow.nodes:
        for inner in (each for graph in inner_graphs(node) for each in graph):
            if any(value.name == selector for value in inner.outputs):
                return node
            match = _SELECTOR.fullmatch(selector) if is_mark(inner) else None
            if match and (match["owner"], int(match["call"] or 0), match["side"]) == _boundary(inner)[:3]:
                return node
    return None


def _dots(path: str) -> list[int]:
    return [at for at, character in enumerate(path) if character == "."]


def _is_under(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")
