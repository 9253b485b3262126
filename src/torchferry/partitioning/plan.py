"""A validated cut of a graph into parts."""

from __future__ import annotations

import functools
import graphlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from torchferry.core.errors import ConfigError, did_you_mean
from torchferry.graph import Exported, as_exported
from torchferry.partitioning.flow import Flow, label
from torchferry.partitioning.rest import regions_of_rest
from torchferry.partitioning.running import check_inputs, check_sessions, run_in_order
from torchferry.partitioning.selectors import Selectors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx_ir as ir

    from torchferry.core.engine import Array, Session

REST = "rest"


@dataclass(frozen=True)
class PartConfig:
    """What the user says about a part.

    Attributes:
        save_file: A file name; ``name.onnx`` by default.
        start: Selectors of what goes in; the graph's inputs that the end needs by default.
        end: Selectors of what comes out; the graph's outputs that the start leads to by default.
        name: The part's name; the file's without its ending by default.
        output_names: What the tensors of the end are called, in this and in all other parts.
    """

    save_file: str | None = None
    start: tuple[str, ...] | None = None
    end: tuple[str, ...] | None = None
    name: str | None = None
    output_names: tuple[str, ...] | None = None


_PART_KEYS = {each.name for each in fields(PartConfig)}


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

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that parts take and no part gives, those of the whole first."""
        given = {name for part in self.parts for name in part.outputs if name not in part.inputs}
        taken = [name for part in self.parts for name in part.inputs if name not in given]
        return tuple(dict.fromkeys([*(name for name in self.whole.signature.input_names if name in taken), *taken]))

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the whole's outputs that parts give, and of what else they give that no part takes."""
        taken = {name for part in self.parts for name in part.inputs}
        given = dict.fromkeys(name for part in self.parts for name in part.outputs)
        own = [name for name in self.results if name in given]
        return tuple(dict.fromkeys([*own, *(name for name in given if name not in taken)]))

    @functools.cached_property
    def results(self) -> dict[str, str]:
        """The whole's outputs in its order: by the name that the parts know them by, the whole's own."""
        outputs = self.flow.model.graph.outputs
        return {self.flow.name(v if v in self.flow.maker else self.flow.origin(v)): v.name or "" for v in outputs}

    @property
    def is_whole(self) -> bool:
        """True if the parts together take nothing but the whole's inputs, and give all its outputs."""
        return set(self.inputs) <= set(self.whole.signature.input_names) and self.results.keys() <= set(self.outputs)

    def run(self, inputs: Mapping[str, Array], sessions: Mapping[str, Session]) -> dict[str, Array]:
        """Run the parts one after the other, each in its own session, of whatever engine and precision.

        A tensor is kept no longer than until the last part that takes it has run.

        Args:
            inputs: Arrays for the names of ``inputs``; further inputs of the whole do no harm.
            sessions: For every part's name an open session of that part.

        Returns:
            Arrays for the names of ``outputs``.

        Raises:
            ConfigError: If a part has no session, or one of other inputs or outputs, or a name is no part's.
            InputError: If an input is missing or unknown, or a part does not take an array.
            BackendError: If an engine fails.
        """
        check_sessions(sessions, self.parts)
        check_inputs(inputs, self.inputs, self.whole.signature.input_names)
        return run_in_order([self.parts[at] for at in self.order], inputs, self.outputs, sessions)


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
    lists = {key: _listed(part.get(key)) for key in ("start", "end", "output_names")}
    config = PartConfig(save_file=part.get("save_file"), name=part.get("name"), **lists)
    problems = [f"unknown key '{key}' ({did_you_mean(str(key), _PART_KEYS)})" for key in part if key not in _PART_KEYS]
    for key, value in vars(config).items():
        problem = _problem(key, value)
        if problem:
            problems.append(f"'{key}': {problem}, got {value!r}")
    if problems:
        raise ConfigError(f"part {number}: " + "; ".join(problems))
    return config


def _listed(value: Any) -> Any:
    """Return one text as a tuple of one, and a list of them as a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _problem(key: str, value: Any) -> str:
    """Say what is wrong with the value of a part's key."""
    if value is None:
        return ""
    if key in ("name", "save_file"):
        return "" if isinstance(value, str) else "must be a text"
    if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
        return "must be a text or a list of them"
    return "needs at least one selector" if not value and key != "output_names" else ""


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
    for what, text in (("save_file", file), ("name", name)):  # of the name comes that of a folder for its engine
        if PurePath(text).name != text or text == ".." or "\\" in text or "\0" in text:
            raise ConfigError(
                f"part '{name}': {what} must be the name of a file, got '{text}'", hint="give the folder as out"
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
