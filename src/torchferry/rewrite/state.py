"""What every call of a rewritten function consults: the thread's contexts and rewriters, and the tables of calls.

Under ``strict=True`` torch.export does not run Python but traces it with Dynamo. The functions marked
``at_trace_time`` run for real meanwhile: they take and return plain constants, and what Dynamo then needs stands in
the tables, where it can follow it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from torchferry.core.errors import ConfigError
from torchferry.rewrite import sites

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from types import CodeType

    from torchferry.core.target import Target
    from torchferry.rewrite.rewriter import Rewriter
    from torchferry.rewrite.tally import Tally

    Function = TypeVar("Function", bound=Callable[..., Any])

CALLS: dict[str, Callable[..., Any]] = {}
"""What to call: the original, by the key of a patch; a rewriter at work, by its own key."""

CONTEXTS: dict[str, FunctionContext] = {}
"""What a rewriter at work is told, by its key."""

TALLIES: dict[str, Tally] = {}
"""Where the calls of a rewriter at work are counted, by its key."""


def at_trace_time(function: Function) -> Function:
    """Let Dynamo run a function for real where it would trace it."""
    marked: Function = torch._dynamo.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return marked


_NOTHING = object()


class FunctionContext:
    """What a rewriter is told.

    Attributes:
        origin_func: The original; calling it does not come back into the rewriter.
        func: The rewriter itself.
        cfg: The deploy config that the context was given; an empty dict if there was none.
        backend: The backend's name.
        ir: The intermediate representation's name.
        target: The ``Target``, or None.

    Every other keyword that the rewriter was registered with or that the context was given is an attribute too.
    """

    origin_func: Callable[..., Any]
    func: Callable[..., Any]
    cfg: Any
    backend: str
    ir: str
    target: Target | None

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the rewriter's context has no '{name}'; it has {', '.join(sorted(self.__dict__))}")


class Active:
    """The rewriters of one context that is entered.

    Attributes:
        outer: Those of the context that it was entered in, or None.
        functions: Keys of rewriters: by the key of the patch that leads to them, then by the class that ``self`` must
            be of, None for any.
        torch: Rewriters of torch's own functions, by function.
    """

    def __init__(self, outer: Active | None) -> None:
        self.outer = outer
        self.functions: dict[str, dict[type | None, str]] = {}
        self.torch: dict[Hashable, Rewriter] = {}

    def take(self, patch: str, rewriter: str, cls: type | None = None) -> None:
        """Let a rewriter take the calls that a patch leads to, of the objects of a class."""
        self.functions.setdefault(patch, {})[cls] = rewriter


class Call:
    """A call of a rewriter that has not returned.

    Attributes:
        key: The rewriter's.
        context: What the rewriter is told.
        returned: What its last call of ``origin_func`` gave.
    """

    __slots__ = ("context", "key", "returned")

    def __init__(self, key: str, context: FunctionContext) -> None:
        self.key = key
        self.context = context
        self.returned: Any = _NOTHING


class ThreadState(threading.local):
    """What belongs to one thread.

    Attributes:
        active: The innermost context's rewriters, or None.
        calls: The calls of rewriters that have not returned, the innermost last.
        passing: A torch function whose next call no rewriter takes.
        handing: The originals that are handing their call to torch's modes: the key of the patch, the number of modes,
            and that of the running rewriters.
        composing: Torch's own Python functions whose bodies are running with the mode in place, the innermost last.
        quiet: Calls are not counted, and not compared.
    """

    def __init__(self) -> None:
        self.active: Active | None = None
        self.calls: list[Call] = []
        self.passing: Any = None
        self.composing: list[Any] = []
        self.handing: list[tuple[str, int, int]] = []
        self.quiet = False


STATE = ThreadState()


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose calls of rewriters are neither counted nor compared."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before, STATE.quiet = STATE.quiet, True
        try:
            return function(*args, **kwargs)
        finally:
            STATE.quiet = before

    return call


def current_context() -> FunctionContext:
    """Return what the innermost running rewriter is told.

    Raises:
        ConfigError: If none is running in this thread.
    """
    return CONTEXTS[_innermost_key()] if torch.compiler.is_dynamo_compiling() else _innermost().context


@at_trace_time
def _innermost_key() -> str:
    return _innermost().key


def _innermost() -> Call:
    if not STATE.calls:
        raise ConfigError(
            "get_context() was called while no rewriter is running", hint="call it in the rewriter itself"
        )
    return STATE.calls[-1]


def handing_over(patch: str) -> Callable[..., Any]:
    """Return the original of a patched function that hands its calls to torch's modes.

    Each of the modes calls the function again, by its own name; these calls are still the same call.

    Args:
        patch: The patch's key.
    """

    def origin(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return CALLS[patch](*args, **kwargs)
        STATE.handing.append((patch, torch._C._len_torch_function_stack(), len(STATE.calls)))
        try:
            return CALLS[patch](*args, **kwargs)
        finally:
            STATE.handing.pop()

    return origin


@at_trace_time
def choose(patch: str) -> str:
    """Return the key of what to call in place of a patched function: a rewriter, or the patch itself."""
    if STATE.handing:
        handed, modes, calls = STATE.handing[-1]
        if handed == patch and calls == len(STATE.calls) and torch._C._len_torch_function_stack() < modes:
            return patch
    return _rewriters(patch).get(None, patch)


@at_trace_time
def choose_for(patch: str, cls: type) -> str:
    """Return the key of what to call in place of a patched method.

    A rewriter that is registered for a class that inherits the method is for the objects of that class. Where it calls
    the base's method itself, it gets the original.

    Args:
        patch: The patch's key.
        cls: The class of ``self``, or ``cls`` itself.
    """
    rewriters = _rewriters(patch)
    running = STATE.calls[-1].key if STATE.calls else None
    for base in cls.__mro__:
        key = rewriters.get(base)
        if key is not None and key != running:
            return key
    return rewriters.get(None, patch)


def _rewriters(patch: str) -> dict[type | None, str]:
    active = STATE.active
    return active.functions.get(patch, {}) if active is not None else {}


def running_code() -> set[CodeType]:
    """Return the code of the rewriters that are running."""
    functions = [call.context.func for call in STATE.calls]
    return {function.__code__ for function in functions if hasattr(function, "__code__")}


@at_trace_time
def count_traced(key: str) -> None:
    """Count a call of a rewriter that Dynamo traces."""
    TALLIES[key].count(sites.traced_call_site())


@at_trace_time
def begin_traced(key: str) -> int:
    """Note that Dynamo traces a rewriter's code from here on; return what ``end_traced`` needs."""
    depth = len(STATE.calls)
    STATE.calls.append(Call(key, CONTEXTS[key]))
    return depth


@at_trace_time
def end_traced(depth: int) -> None:
    """Note that the rewriter's code was left."""
    del STATE.calls[depth:]
