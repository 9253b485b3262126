"""Running the parts of a plan one after the other, each in a session of its own; pure dataflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.core.errors import ConfigError, InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchferry.core.engine import Array, Session
    from torchferry.partitioning.plan import Partition


def run_in_order(
    parts: Sequence[Partition], inputs: Mapping[str, Array], wanted: Sequence[str], sessions: Mapping[str, Session]
) -> dict[str, Array]:
    """Run parts in the order given; a tensor is let go of after the last part that takes it.

    Args:
        parts: In an order in which they can run.
        inputs: What no part gives.
        wanted: Names of the tensors to return.
        sessions: By the parts' names.
    """
    last_use: dict[str, int] = {name: at for at, part in enumerate(parts) for name in part.inputs}
    last_use |= dict.fromkeys(wanted, len(parts))
    known = dict(inputs)
    for at, part in enumerate(parts):
        known |= sessions[part.name].run({name: known[name] for name in part.inputs})
        known = {name: array for name, array in known.items() if last_use.get(name, -1) > at}
    return {name: known[name] for name in wanted}


def check_part_names(names: Iterable[str], parts: Sequence[Partition], what: str) -> None:
    """Check that there is one of something for every part and for nothing else.

    Args:
        names: For which there is one.
        parts: For which there has to be one.
        what: What it is, for the message ("session").

    Raises:
        ConfigError: If a name is no part's, or a part has none.
    """
    given, known = list(names), [part.name for part in parts]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"there is no part '{unknown}' to give a {what} to", hint=did_you_mean(unknown, known))
    missing = next((name for name in known if name not in given), None)
    if missing is not None:
        raise ConfigError(
            f"part '{missing}' has no {what}", hint=f"give one for each part: {', '.join(map(repr, known))}"
        )


def check_sessions(sessions: Mapping[str, Session], parts: Sequence[Partition]) -> None:
    """Check that every part has a session, which is of that part.

    Raises:
        ConfigError: If one is missing, of no part, or takes or gives other tensors than its part.
    """
    check_part_names(sessions, parts, "session")
    for part in parts:
        signature = sessions[part.name].signature
        for side, own, its in (
            ("takes", part.inputs, signature.input_names),
            ("gives", part.outputs, signature.output_names),
        ):
            if set(own) != set(its):
                raise ConfigError(
                    f"the session of part '{part.name}' {side} {_listed(its)}, but the part {side} {_listed(own)}",
                    hint="compile each part of this plan, and give each session under its part's name",
                )


def check_inputs(inputs: Any, needed: Sequence[str], allowed: Iterable[str]) -> None:
    """Check the names of what goes in; sessions check the arrays.

    Args:
        inputs: Arrays by name.
        needed: Names that must be there.
        allowed: Names that may be there besides.

    Raises:
        InputError: If one is missing or unknown.
    """
    known = [*needed, *allowed]
    unknown = next((name for name in inputs if name not in known), None)
    if unknown is not None:
        raise InputError(f"unknown input '{unknown}'", hint=did_you_mean(unknown, known))
    missing = next((name for name in needed if name not in inputs), None)
    if missing is not None:
        raise InputError(f"input '{missing}' is missing", hint="the parts need " + ", ".join(needed))


def _listed(names: Sequence[str]) -> str:
    return "(" + ", ".join(names) + ")"
