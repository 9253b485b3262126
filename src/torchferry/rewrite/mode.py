"""Taking the calls of torch's own functions, by whatever name they are reached.

One mode serves all contexts of all threads: torch keeps a stack of modes for each thread, and what a function is
rewritten to is looked up in the thread's innermost context.

Torch asks the modes of the stack from the top down, and takes a mode off the stack while it asks it. Three things
follow. A mode that is entered later stands above ours and would see a call first: torch.export's own modes turn some
functions into others. So ours is put on top again whenever another one is entered. Second, while a rewriter runs, the
mode is put back for the functions that the rewriter calls. Third, what a Python function of torch calls inside would
not be seen at all; the lowest of ours therefore runs its body with the mode in place.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch._C import (
    _get_function_stack_at,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from torchferry.rewrite.patching import function_patch, original
from torchferry.rewrite.sites import is_bookkeeping
from torchferry.rewrite.state import CALLS, STATE
from torchferry.rewrite.targets import COMPOSED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torchferry.rewrite.rewriter import Rewriter
    from torchferry.rewrite.state import Active

# Calls a function so that its next look at the modes finds none. Where torch does not have it yet, what its Python
# functions call inside is out of reach.
_redispatch: Any = getattr(torch.overrides, "redispatch_function", None)
_OPERATORS = (OpOverload, OpOverloadPacket)
_ENTER = function_patch(TorchFunctionMode.__enter__)
_EXIT = function_patch(TorchFunctionMode.__exit__)


class RewriterMode(TorchFunctionMode):
    """Takes the calls of the functions that the thread's innermost context rewrites."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs is None:
            kwargs = {}
        if is_dynamo_compiling():
            # torch.export traces twice then; the second time, the graph's calls come here and are really made.
            return func(*args, **kwargs)
        state = STATE
        passing, active = state.passing, state.active
        if passing is not None and passing == func:
            state.passing = None
        elif active is not None:
            rewriter = active.torch.get(func)
            if rewriter is None and isinstance(func, _OPERATORS):
                rewriter = _operators_rewriter(active, func, args, kwargs)
            if rewriter is not None and not is_bookkeeping(func):
                _push_on_torch_function_stack(MODE)
                try:
                    return rewriter.run(args, kwargs)
                finally:
                    _pop_torch_function_stack()
        if _len_torch_function_stack() and _is_on_stack():
            return unseen(func, *args, **kwargs)
        # A method of Tensor that calls its base's comes here a second time under the same name. A higher-order
        # operator does too, once for each layer of the dispatcher; its branches are run in the last one.
        again = bool(state.composing) and state.composing[-1] is func and isinstance(func, FunctionType)
        if not again and _is_composed(func) and all(map(_is_plain, types)):
            state.composing.append(func)
            _push_on_torch_function_stack(MODE)
            try:
                return _redispatch(original(func), types, args, kwargs)
            finally:
                _pop_torch_function_stack()
                state.composing.pop()
        return func(*args, **kwargs)


MODE = RewriterMode()


def unseen(func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a torch function that no rewriter takes, although those that it calls itself may be taken."""
    STATE.passing = func
    try:
        return func(*args, **kwargs)
    finally:
        STATE.passing = None


@contextmanager
def torch_rewritten(active: Active) -> Iterator[None]:
    """Let a context's rewriters take the calls of torch's functions in this thread."""
    outermost = not _is_on_stack()
    if outermost and not active.torch:
        yield
        return
    active.take(_ENTER.key, _ENTER_BELOW)
    active.take(_EXIT.key, _EXIT_BELOW)
    try:
        _ENTER.hold(active)
        _EXIT.hold(active)
        if outermost:
            _push_on_torch_function_stack(MODE)
        yield
    finally:
        if outermost:
            _remove()
        _ENTER.release(active)
        _EXIT.release(active)


def _is_on_stack() -> bool:
    return any(_get_function_stack_at(level) is MODE for level in range(_len_torch_function_stack()))


def _is_on_top() -> bool:
    size = _len_torch_function_stack()
    return size > 0 and _get_function_stack_at(size - 1) is MODE


def _remove() -> None:
    """Take every occurrence of the mode off the stack."""
    others = []
    while _len_torch_function_stack():
        mode = _pop_torch_function_stack()
        if mode is not MODE:
            others.append(mode)
    for mode in reversed(others):
        _push_on_torch_function_stack(mode)


def _enter_below(mode: TorchFunctionMode) -> Any:
    """Enter another mode, and put ours on top of it again."""
    on_top = _is_on_top()
    entered = _ENTER.origin()(mode)
    if on_top:
        _push_on_torch_function_stack(MODE)
    return entered


def _exit_below(mode: TorchFunctionMode, *exc_info: Any) -> Any:
    """Leave another mode, and take away the one of ours that was put on top of it."""
    if _is_on_top():
        _pop_torch_function_stack()
    return _EXIT.origin()(mode, *exc_info)


_ENTER_BELOW, _EXIT_BELOW = "enter a mode", "leave a mode"
CALLS[_ENTER_BELOW], CALLS[_EXIT_BELOW] = _enter_below, _exit_below


def _operators_rewriter(active: Active, func: OpOverload | OpOverloadPacket, args: Any, kwargs: Any) -> Rewriter | None:
    """Return the rewriter of an overload's packet, or of the overload that a packet's call leads to."""
    if isinstance(func, OpOverload):
        return active.torch.get(func.overloadpacket)
    return next((active.torch[o] for o in _overloads(func, args, kwargs) if o in active.torch), None)


def _overloads(packet: OpOverloadPacket, args: Any, kwargs: Any) -> Iterator[OpOverload]:
    """Yield the overload that a packet's call leads to, if the arguments fit one."""
    try:
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
    except RuntimeError:  # the call itself will say what is wrong
        return
    yield getattr(packet, name)


@functools.cache
def _is_composed(func: Any) -> bool:
    """Tell whether a function calls others of torch that a rewriter may be for."""
    composed = isinstance(func, FunctionType) and func.__module__ in COMPOSED
    return _redispatch is not None and (composed or isinstance(func, HigherOrderOperator))


@functools.cache
def _is_plain(cls: Any) -> bool:
    """Tell whether a type of tensors has no way of its own with torch's functions."""
    return cls is torch.Tensor or cls.__torch_function__ is torch._C._disabled_torch_function_impl
