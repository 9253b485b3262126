"""What remains of a graph when parts are taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import onnx_ir as ir

    from torchferry.partitioning.flow import Flow

    # A part's name, inputs and outputs.
    Boundary = tuple[str, Sequence[ir.Value], Sequence[ir.Value]]
    Cut = tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]


def regions_of_rest(flow: Flow, parts: Sequence[Boundary], owner: Mapping[ir.Node, str]) -> list[Cut]:
    """Return inputs and outputs of each piece of what the parts leave over, in the order in which they run.

    There are as many pieces as it takes to run them and the parts one after the other: what stands before a part and
    what needs its result cannot be one.

    Args:
        flow: Of the graph.
        parts: In an order in which they can run.
        owner: The part of each node that is in one, but for the repeatable ones.

    Raises:
        ConfigError: If what remains needs something inside a part that does not come out of it.
    """
    given = {value for _, _, outputs in parts for value in outputs}
    results = [value for value in flow.outputs if value not in given]
    asked = [value for _, inputs, _ in parts for value in inputs if value not in given and value not in flow.inputs]
    wanted = dict.fromkeys([*results, *asked])
    owned = {out for node in owner for out in node.outputs}
    nodes = flow.upstream(wanted, stop=given | owned)
    core = [node for node in flow.ordered(nodes) if node not in flow.repeatable]
    for value in (*wanted, *(value for node in core for value in flow.reads[node])):
        if value in owned and value not in given:
            part = owner[flow.maker[value]]
            what = "an output of the whole" if value in wanted else "needed outside"
            raise ConfigError(
                f"{flow.describe(value)} is {what}, but lies inside part '{part}'",
                hint=f"add '{flow.name(value)}' to the end of '{part}'",
            )
    level = _levels(flow, core, parts)
    read = {value for _, inputs, _ in parts for value in inputs}.union(*(flow.reads[node] for node in core))
    idle = [value for value in flow.inputs if value not in read]
    pieces = []
    first = min(level.values(), default=0)
    for number in sorted({*level.values(), *([first] if wanted else [])}):
        own = [node for node in core if level[node] == number]
        pieces.append(_cut(flow, own, level, wanted, idle, is_first=number == first))
    return pieces


def _levels(flow: Flow, core: Sequence[ir.Node], parts: Sequence[Boundary]) -> dict[ir.Node, int]:
    """Return for each node the number of its piece: how many parts, one after the other, run before it."""
    level: dict[ir.Node, int] = {}
    after = [0] * len(parts)  # a part's level: that of the last piece that it needs
    for _ in range(len(parts) + 1):  # a part late in the graph's order may feed one early in it, through the rest
        of = {value: after[at] + 1 for at, (_, _, outputs) in enumerate(parts) for value in outputs}
        for node in core:
            level[node] = max((of.get(value, 0) for value in flow.reads[node]), default=0)
            of |= dict.fromkeys((value for value in node.outputs if value not in of), level[node])
        after = [max((of.get(value, 0) for value in inputs), default=0) for _, inputs, _ in parts]
    due = dict.fromkeys((out for node in core for out in node.outputs), max(level.values(), default=0))
    for at, (_, inputs, _) in zip(after, parts, strict=True):
        due |= {value: min(at, due[value]) for value in inputs if value in due}
    for node in reversed(core):  # as late as its readers allow, so that no piece is there that no part waits for
        level[node] = min(due[out] for out in node.outputs)
        due |= {value: min(level[node], due[value]) for value in flow.reads[node] if value in due}
    return level


def _cut(
    flow: Flow,
    own: Sequence[ir.Node],
    core: Collection[ir.Node],
    wanted: Collection[ir.Value],
    idle: Collection[ir.Value],
    *,
    is_first: bool,
) -> Cut:
    """Return inputs and outputs of one piece; the first one also takes what needs no node of its own."""
    made = {out for node in own for out in node.outputs}
    inside = set(own)
    elsewhere = {value for node in core if node not in inside for value in flow.reads[node]}
    foundlings = {v for v in wanted if is_first and flow.maker.get(v) not in core}
    outputs = [value for value in wanted if value in made or value in foundlings]
    outputs += [out for node in own for out in node.outputs if out in elsewhere and out not in wanted]
    repeated = {out for node in flow.repeatable for out in node.outputs}
    weights = set(flow.model.graph.initializers.values())
    read = dict.fromkeys(v for node in own for v in flow.reads[node] if v not in made | repeated | weights)
    read |= dict.fromkeys(v for v in foundlings if v in flow.inputs)
    ordered = [v for v in flow.inputs if v in read or (is_first and v in idle)]
    return (*ordered, *(v for v in read if v not in flow.inputs)), tuple(outputs)
