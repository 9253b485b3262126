"""A validated cut of a graph into parts."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from torchferry.core.errors import ConfigError, did_you_mean
from torchferry.graph import Exported, as_exported
from torchferry.partitioning.flow import Flow, label
from torchferry.partitioning.rest import regions_of_rest
from torchferry.partitioning.selectors import Selectors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx_ir as ir

REST = "rest"


class PartConfig(BaseModel):
    """What the user says about a part.

    Attributes:
        save_file: A file name; ``name.onnx`` by default.
        start: Selectors of what goes in; the graph's inputs that the end needs by default.
        end: Selectors of what comes out; the graph's outputs that the start leads to by default.
        name: The part's name; the file's without its ending by default.
        output_names: What the tensors of the end are called, in this and in all other parts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    save_file: str | None = None
    start: tuple[str, ...] | None = None
    end: tuple[str, ...] | None = None
    name: str | None = None
    output_names: tuple[str, ...] | None = None

    @field_validator("start", "end", "output_names", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("start", "end")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("needs at least one selector")
        return value


@dataclass(frozen=True)
class Region:
    """A part of a graph as its values and nodes.

    Attributes:
        inputs: What is given.
        outputs: What is wanted.
        nodes: What computes it.
    """

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class Partition:
    """A region between boundaries.

    Attributes:
        name: Of the part.
        save_file: The file's name.
        start: The selectors, as they were given; empty for what remains.
        end: The same for the end.
        inputs: The tensors that go in.
        outputs: The tensors that come out.
        region: The values and nodes of the whole graph.
    """

    name: str
    save_file: str
    start: tuple[str, ...]
    end: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    region: Region = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name}: ({', '.join(self.inputs)}) -> ({', '.join(self.outputs)}), {len(self.region.nodes)} nodes"


@dataclass(frozen=True)
class PartitionPlan:
    """A validated cut.

    Attributes:
        parts: In the order asked for; what remains may be several, where other parts stand in between.
        order: Numbers of the parts in an order in which they can run.
        coverage: ``rest`` if the parts make up the whole graph by construction, else ``parts``.
        whole: The graph that is cut.
        flow: Its dataflow.
    """

    parts: tuple[Partition, ...]
    order: tuple[int, ...]
    coverage: Literal["rest", "parts"]
    whole: Exported = field(repr=False, compare=False)
    flow: Flow = field(repr=False, compare=False)

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))


def plan_partition(exported_or_path: Any, parts: Sequence[Mapping[str, Any] | str]) -> PartitionPlan:
    """Resolve the selectors of a cut and check it.

    Args:
        exported_or_path: The whole; see ``as_exported``.
        parts: See ``partition``.

    Raises:
        ConfigError: As ``partition``.
    """
    whole = as_exported(exported_or_path)
    configs = _configs(parts)
    flow = Flow(whole.model)
    selectors = Selectors(flow)
    regions: dict[int, Region] = {}
    for number, config in enumerate(configs):
        if config is not None:
            regions[number] = _region(flow, selectors, config, _name(config, number))
    names = {number: _name(config, number) for number, config in enumerate(configs) if config is not None}
    owner = _owners(flow, regions, names)
    order = _order(flow, regions, names)
    for number, config in enumerate(configs):
        if config is not None and config.output_names is not None:
            _rename(flow, regions[number].outputs, config.output_names, names[number])
    planned: list[Partition] = []
    for number, config in enumerate(configs):
        if config is not None:
            file = config.save_file or f"{names[number]}.onnx"
            planned.append(_partition(flow, names[number], file, regions[number], config.start or (), config.end or ()))
            continue
        boundaries = [(names[at], regions[at].inputs, regions[at].outputs) for at in order]
        pieces = [
            Region(inputs, outputs, frozenset(flow.upstream(outputs, stop=set(inputs))))
            for inputs, outputs in regions_of_rest(flow, boundaries, {node: names[at] for node, at in owner.items()})
        ]
        for at, piece in enumerate(pieces):
            name = REST if len(pieces) == 1 else f"{REST}_{at}"
            planned.append(_partition(flow, name, f"{name}.onnx", piece, (), ()))
    _check_names(flow, planned)
    final = {number: part.region for number, part in enumerate(planned)}
    final_order = _order(flow, final, {number: part.name for number, part in enumerate(planned)})
    return PartitionPlan(tuple(planned), tuple(final_order), "rest" if None in configs else "parts", whole, flow)


def _configs(parts: Any) -> list[PartConfig | None]:
    """Read what the user asked for; None stands for what remains."""
    if not isinstance(parts, list | tuple) or not parts:
        raise ConfigError(f"parts must be a list of at least one part, got {parts!r}")
    configs = [None if part == REST else _config(part, number) for number, part in enumerate(parts)]
    if configs.count(None) > 1:
        raise ConfigError(f"'{REST}' stands for all that remains, so there can be only one")
    return configs


def _config(part: Any, number: int) -> PartConfig:
    if not isinstance(part, Mapping):
        raise ConfigError(f"part {number} must be a table such as dict(start=…, end=…) or '{REST}', got {part!r}")
    try:
        return PartConfig.model_validate(part)
    except ValidationError as exc:
        problems = [_word(error) for error in exc.errors()]
        raise ConfigError(f"part {number}: " + "; ".join(problems)) from exc


def _word(error: Any) -> str:
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}' ({did_you_mean(key, PartConfig.model_fields)})"
    return f"'{key}': {error['msg']}, got {error['input']!r}"


def _name(config: PartConfig, number: int) -> str:
    return config.name or (PurePath(config.save_file).stem if config.save_file else f"part_{number}")


def _region(flow: Flow, selectors: Selectors, config: PartConfig, name: str) -> Region:
    """Find the nodes between a part's boundaries and check that they can stand alone."""
    starts = _tensors(selectors, config.start, f"start of part '{name}'")
    ends = _tensors(selectors, config.end, f"end of part '{name}'")
    if starts is None:
        needed = {value for node in flow.upstream(ends or flow.outputs) for value in flow.reads[node]}
        starts = [value for value in flow.inputs if value in needed]
    after = {*starts, *flow.downstream(starts)}
    if ends is None:
        ends = [value for value in flow.outputs if value in after and value not in starts]
    _check_ends(flow, starts, ends, after, name)
    nodes = flow.upstream(ends, stop=set(starts))
    inner = [node for node in flow.ordered(nodes) if not after.isdisjoint(node.outputs)]
    foreign = dict.fromkeys(v for node in inner for v in flow.reads[node] if v not in after and v not in flow.rootless)
    if foreign:
        listed = [*(config.start or [flow.name(v) for v in starts]), *(flow.name(v) for v in foreign)]
        raise ConfigError(
            f"part '{name}' also needs {', '.join(map(flow.describe, foreign))}, not computed from its start",
            hint=f"add to its inputs: start={listed}",
        )
    late = {out for node in nodes for out in node.outputs}
    late |= flow.downstream({out for node in nodes - flow.repeatable for out in node.outputs}, without=nodes)
    circular = next((value for value in starts if value in late), None)
    if circular is not None:
        raise ConfigError(
            f"part '{name}' cannot run in one piece: its start {flow.describe(circular)} follows from what it computes",
            hint="leave that tensor out of the start, or make two parts, one before and one after it",
        )
    return Region(tuple(starts), tuple(ends), frozenset(nodes))


def _tensors(selectors: Selectors, given: Iterable[str] | None, what: str) -> list[ir.Value] | None:
    if given is None:
        return None
    found: dict[ir.Value, None] = {}
    for selector in given:
        try:
            found |= dict.fromkeys(selectors.find(selector))
        except ConfigError as exc:
            exc.where = what
            raise
    return list(found)


def _check_ends(flow: Flow, starts: list[ir.Value], ends: list[ir.Value], after: set[ir.Value], name: str) -> None:
    through = [value for value in ends if value in starts]
    if not ends or len(through) == len(ends):
        raise ConfigError(
            f"part '{name}' is empty: " + ("its end is its start" if ends else "no output follows from its start"),
            hint="choose an end behind the start",
        )
    if through:
        raise ConfigError(
            f"part '{name}' would hand {flow.describe(through[0])} through: it is both its start and its end",
            hint=f"leave '{flow.name(through[0])}' out of the end",
        )
    before: set[ir.Value] | None = None
    reached = [value for value in ends if value in after]
    for end in ends:
        if end in after or (reached and end in flow.rootless):
            continue
        if before is None:
            before = {value for node in flow.upstream(starts) for value in flow.reads[node]}
        listed = ", ".join(f"'{flow.name(value)}'" for value in starts)
        if end in before:
            raise ConfigError(
                f"part '{name}' ends before it starts: {flow.describe(end)} comes before {listed}",
                hint="exchange start and end",
            )
        raise ConfigError(
            f"part '{name}' never reaches its end: {flow.describe(end)} does not follow from {listed}",
            hint=f"choose an end behind the start, or add a tensor before '{flow.name(end)}' to the start",
        )


def _owners(flow: Flow, regions: Mapping[int, Region], names: Mapping[int, str]) -> dict[ir.Node, int]:
    """Return the part of each node, once it is sure that there is only one."""
    owner: dict[ir.Node, int] = {}
    for number, region in regions.items():
        for node in flow.ordered(region.nodes):
            if node not in flow.repeatable and owner.setdefault(node, number) != number:
                raise ConfigError(
                    f"parts '{names[owner[node]]}' and '{names[number]}' overlap: both compute "
                    f"{node.op_type} '{label(node)}'",
                    hint=f"let one end at '{flow.name(node.outputs[0])}' and the other start there",
                )
    return owner


def _order(flow: Flow, regions: Mapping[int, Region], names: Mapping[int, str]) -> list[int]:
    """Return the parts in an order in which they can run.

    Raises:
        ConfigError: If there is none.
    """
    needs: dict[int, set[int]] = {number: set() for number in regions}
    for number, region in regions.items():
        made = {out for node in region.nodes if node not in flow.repeatable for out in node.outputs}
        later = made | flow.downstream(made) | {v for v in region.outputs if v in flow.rootless}
        for other, boundary in regions.items():
            if other != number and not later.isdisjoint(boundary.inputs):
                needs[other].add(number)
    try:
        return list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as exc:
        circle = " -> ".join(f"'{names[number]}'" for number in exc.args[1])
        raise ConfigError(
            f"the parts cannot run one after the other, each needs the one before: {circle}",
            hint="make two parts of one of them",
        ) from exc


def _rename(flow: Flow, values: Sequence[ir.Value], names: Sequence[str], part: str) -> None:
    if len(names) != len(values):
        ends = ", ".join(f"'{flow.name(value)}'" for value in values)
        raise ConfigError(f"part '{part}' has {len(values)} outputs ({ends}), got {len(names)} output_names")
    for value, name in zip(values, names, strict=True):
        flow.names[value] = name


def _partition(
    flow: Flow, name: str, file: str, region: Region, start: tuple[str, ...], end: tuple[str, ...]
) -> Partition:
    if PurePath(file).name != file or "\\" in file:
        raise ConfigError(
            f"part '{name}': save_file must be the name of a file, got '{file}'", hint="give the folder as out"
        )
    inputs = tuple(flow.name(value) for value in region.inputs)
    return Partition(name, file, start, end, inputs, tuple(flow.name(value) for value in region.outputs), region)


def _check_names(flow: Flow, parts: Sequence[Partition]) -> None:
    """Refuse names that two tensors, parts or files would share."""
    for what, names in (("name", [p.name for p in parts]), ("save_file", [p.save_file for p in parts])):
        twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
        if twice is not None:
            raise ConfigError(f"two parts have the {what} '{twice}'", hint="give each its own")
    holder: dict[str, ir.Value] = {}
    visible = [value for part in parts for value in (*part.region.inputs, *part.region.outputs)]
    for value in (*flow.inputs, *flow.outputs, *visible):
        if holder.setdefault(flow.name(value), value) is not value:
            raise ConfigError(
                f"two tensors would be called '{flow.name(value)}': '{holder[flow.name(value)].name}' and "
                f"'{value.name}'",
                hint="choose other output_names",
            )
