"""Replacing the modules of a model by what is registered for their classes."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from torchferry.core.errors import ConfigError
from torchferry.rewrite import sites
from torchferry.rewrite.check import compared_call
from torchferry.rewrite.copying import carry_over, rewritten_copy
from torchferry.rewrite.sites import Site
from torchferry.rewrite.state import STATE, quietly
from torchferry.rewrite.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from torchferry.rewrite.plan import Choice
    from torchferry.rewrite.registry import Record


def rewritten_model(
    model: torch.nn.Module,
    choice: Choice[type[torch.nn.Module]],
    cfg: Any,
    kwargs: Mapping[str, Any],
    check: bool,
) -> tuple[torch.nn.Module, dict[Record, Tally]]:
    """Return a copy of a model, sharing its tensors, in which every instance of a chosen class is replaced.

    Args:
        model: Is not changed; may itself be replaced.
        choice: Which rewriters replace which classes. What any registered one has replaced before is left as it is.
        cfg: The deploy config, for the replacements.
        kwargs: Keywords for those replacements that take them.
        check: Compare each call of a replacement with the original module.

    Returns:
        The copy, and which modules each rewriter replaced.

    Raises:
        ConfigError: If a replacement cannot be built.
    """
    by_class = {cls: record for record, cls in choice.chosen.items()}
    tallies = {record: Tally() for record in choice.chosen}
    finished = tuple(record.replacement for record in choice.records)

    def build(module: torch.nn.Module, path: str, original: torch.nn.Module) -> torch.nn.Module | None:
        record = next((by_class[base] for base in type(module).__mro__ if base in by_class), None)
        if record is None:
            return None
        flags = {inner: inner.training for inner in module.modules()}
        wrapper = _construct(record, module, path, cfg, {**record.kwargs, **kwargs})
        carry_over(module, flags, wrapper)
        tallies[record].count(Site(path or "(the model itself)"))
        if check and not record.changes_outputs:
            _compare_calls(wrapper, original, tallies[record])
        return wrapper

    return rewritten_copy(model, build, finished), tallies


def _construct(
    record: Record, module: torch.nn.Module, path: str, cfg: Any, kwargs: Mapping[str, Any]
) -> torch.nn.Module:
    cls = record.replacement
    parameters = list(inspect.signature(cls).parameters.values())[2:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = {p.name for p in parameters}
    try:
        built: torch.nn.Module = cls(
            module, cfg, **{name: value for name, value in kwargs.items() if takes_any or name in taken}
        )
    except Exception as exc:
        raise ConfigError(
            f"{record.title} cannot take the place of '{path or type(module).__name__}' ({type(module).__name__}): "
            f"{type(exc).__name__}: {exc}",
            where=record.place,
            hint="its __init__ is called with the module, the config and the keywords that it names",
        ) from exc
    return built


def _compare_calls(wrapper: torch.nn.Module, original: torch.nn.Module, tally: Tally) -> None:
    forward = wrapper.forward

    @functools.wraps(forward)
    def compared(*args: Any, **kwargs: Any) -> Any:
        if STATE.quiet:
            return forward(*args, **kwargs)
        place = sites.call_site().place
        return compared_call(quietly(original.forward), forward, args, kwargs, tally, place)

    wrapper.__dict__["forward"] = compared
