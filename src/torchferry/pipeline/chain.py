"""Parts on several engines: compiling each for its own, and running them one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from torchferry import backends
from torchferry.core.errors import BackendError
from torchferry.core.files import new_folder
from torchferry.partitioning import split
from torchferry.partitioning.running import check_part_names

if TYPE_CHECKING:
    from os import PathLike

    from torchferry.core.engine import Array, Engine, Session
    from torchferry.core.target import Target
    from torchferry.partitioning import PartitionPlan


def compile_parts(
    plan: PartitionPlan, targets: Target | Mapping[str, Target], out: str | PathLike[str]
) -> dict[str, Engine]:
    """Compile every part of a cut for its engine.

    Args:
        plan: The cut, from ``plan_partition``.
        targets: One target for all parts, or one for every part's name.
        out: The folder, in which every part gets one of its name; must not exist, or be empty.

    Returns:
        For every part's name its engine.

    Raises:
        ConfigError: If a part has no target, or a target belongs to no part.
        BackendError: As ``compile``; the message names the part.
        OutputError: If the folder cannot be written.
    """
    chosen = dict(targets) if isinstance(targets, Mapping) else {part.name: targets for part in plan.parts}
    check_part_names(chosen, plan.parts, "target")
    for target in chosen.values():
        backends.check_target(target)
    folder = Path(out)
    engines: dict[str, Engine] = {}
    with new_folder(folder, marker="") as partial:
        for part, exported in zip(plan.parts, split(plan), strict=True):
            target = chosen[part.name]
            try:
                engines[part.name] = backends.compile(exported, target, partial / part.name)
            except BackendError as exc:
                exc.message = f"part '{part.name}' cannot be compiled for {target}: {exc.message}"
                raise
    return {name: dataclasses.replace(engine, folder=folder / name) for name, engine in engines.items()}


class Chain:
    """The parts of a cut, each loaded on its own engine; a context manager.

    To open engines with options of their own, such as a number of threads, open them yourself and call
    ``PartitionPlan.run``.

    Args:
        plan: The cut, from ``plan_partition``.
        engines: For every part's name its engine, as ``compile_parts`` gives them.

    Attributes:
        sessions: By the parts' names; empty outside the block.

    Raises:
        ConfigError: If a part has no engine, or an engine belongs to no part.
    """

    def __init__(self, plan: PartitionPlan, engines: Mapping[str, Engine]) -> None:
        check_part_names(engines, plan.parts, "engine")
        self.plan = plan
        self.sessions: dict[str, Session] = {}
        self._engines = dict(engines)
        self._stack = ExitStack()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the parts one after the other; see ``PartitionPlan.run``.

        Raises:
            BackendError: If an engine fails, or outside the ``with`` block.
            InputError: If an input is missing, unknown, or of a dtype or size that a part does not take.
        """
        if not self.sessions:
            raise BackendError("the chain is not open", hint="use it in a with block")
        return self.plan.run(inputs, self.sessions)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            sessions = {name: stack.enter_context(engine.open()) for name, engine in self._engines.items()}
            self._stack = stack.pop_all()
        self.sessions = sessions
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sessions = {}
        self._stack.close()
