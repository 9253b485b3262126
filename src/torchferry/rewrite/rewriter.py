"""One rewriter at work in one context."""

from __future__ import annotations

import inspect
import itertools
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite import sites
from torchferry.rewrite.check import compared_call
from torchferry.rewrite.state import (
    CALLS,
    CONTEXTS,
    STATE,
    TALLIES,
    Call,
    FunctionContext,
    begin_traced,
    count_traced,
    end_traced,
    quietly,
    running_code,
)
from torchferry.rewrite.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from torchferry.rewrite.registry import Record

_numbers = itertools.count()


class Rewriter:
    """Calls a replacement in the place of a function.

    Args:
        record: What was registered.
        origin: The original function.
        attributes: What the replacement is told, besides the original and itself.
        check: Compare each call with the original.
        bookkeeping: Leave the calls of torch's tracing machinery to the original.

    Attributes:
        record: What was registered.
        key: Its own, in ``CALLS``, ``CONTEXTS`` and ``TALLIES``.
        tally: What is known of its calls.
    """

    def __init__(
        self,
        record: Record,
        origin: Callable[..., Any],
        attributes: Mapping[str, Any],
        *,
        check: bool,
        bookkeeping: bool = False,
    ) -> None:
        self.record = record
        self.key = f"rewriter {next(_numbers)}"
        self.tally = Tally()
        self._origin = origin
        self._bookkeeping = bookkeeping
        self._check = check and not record.changes_outputs
        context = {**record.kwargs, **attributes, "origin_func": _noting(origin), "func": record.replacement}
        self._context = FunctionContext(**context)
        self._first = (self._context,) if record.takes_context else ()

    def publish(self) -> None:
        """Put it into the tables."""
        TALLIES[self.key] = self.tally
        CONTEXTS[self.key] = self._context
        CALLS[self.key] = self._traceable()

    def withdraw(self) -> None:
        """Take it out of the tables."""
        for table in (CALLS, CONTEXTS, TALLIES):
            table.pop(self.key, None)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the replacement; count the call, and compare it if that is asked for."""
        if self._bookkeeping and sites.is_bookkeeping():
            return self._origin(*args, **kwargs)
        if STATE.quiet:
            return self._call(*args, **kwargs)
        site = sites.call_site(running_code() if STATE.calls else ())
        self.tally.count(site)
        if self._check:
            return compared_call(quietly(self._origin), self._call, args, kwargs, self.tally, site.place)
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        replacement = self.record.replacement
        call = Call(self.key, self._context)
        depth = len(STATE.calls)
        STATE.calls.append(call)
        try:
            returned = replacement(*self._first, *args, **kwargs)
        finally:
            del STATE.calls[depth:]
        if returned is call.returned and not STATE.quiet:
            self.tally.left += 1
        if isinstance(returned, GeneratorType) and returned.gi_code is getattr(replacement, "__code__", None):
            return self._driven(returned)
        return returned

    def _driven(self, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run the rewriter's generator so that ``get_context`` finds the rewriter whenever a part of it runs."""
        step, value = generator.send, None
        while True:
            depth = len(STATE.calls)
            STATE.calls.append(Call(self.key, self._context))
            try:
                item = step(value)
            except StopIteration as stop:
                return stop.value
            finally:
                del STATE.calls[depth:]
            try:
                step, value = generator.send, (yield item)
            except GeneratorExit:
                generator.close()
                raise
            except BaseException as exc:  # noqa: BLE001 - it belongs to the generator, whatever it is
                step, value = generator.throw, exc

    def _traceable(self) -> Callable[..., Any]:
        """Return what calls the replacement, for Python to run and for Dynamo to trace."""
        key, first, replacement, run = self.key, self._first, self.record.replacement, self.run
        is_generator = inspect.isgeneratorfunction(replacement)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():
                return run(args, kwargs)
            count_traced(key)
            depth = begin_traced(key)
            try:
                returned = replacement(*first, *args, **kwargs)
            finally:
                end_traced(depth)
            return _driven_traced(key, returned) if is_generator else returned

        return call


def _noting(origin: Callable[..., Any]) -> Callable[..., Any]:
    """Return the original, noting what it gives for the rewriter that called it."""

    def origin_func(*args: Any, **kwargs: Any) -> Any:
        returned = origin(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling() and STATE.calls:
            STATE.calls[-1].returned = returned
        return returned

    return origin_func


def _driven_traced(key: str, generator: Iterator[Any]) -> Iterator[Any]:
    """Run a rewriter's generator in the way of ``Rewriter._driven``, as far as Dynamo can follow."""
    while True:
        depth = begin_traced(key)
        try:
            item = next(generator)
        except StopIteration:
            return
        finally:
            end_traced(depth)
        yield item
