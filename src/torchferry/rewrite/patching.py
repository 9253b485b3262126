"""Changing functions and attributes for a while, and changing them back exactly.

A patch exists once for each function or attribute, whichever contexts of whichever threads hold it; what it leads to
is decided for each call by the calling thread's innermost context. It is undone when the last holder lets go.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from torch._dynamo.variables import functions as dynamos_functions

from torchferry.rewrite.state import CALLS, choose
from torchferry.rewrite.targets import python_function

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torchferry.rewrite.targets import AttributeTarget

_LOCK = threading.RLock()
_MISSING = object()
_DYNAMOS_PARAMETERS: Any = getattr(dynamos_functions, "_spec_cache", {})
_FUNCTIONS: dict[FunctionType, FunctionPatch] = {}
_ATTRIBUTES: dict[tuple[int, str], AttributePatch] = {}
_numbers = itertools.count()

# How a function's own code looks up what to call. It imports where it runs, for its globals are the user's module's.
BY_NAME = "choose('KEY')"
BY_SELF = "choose_for('KEY', type(args[0]) if args else object)"
BY_CLASS = "choose_for('KEY', args[0])"


class FunctionPatch:
    """Lets a Python function's calls be taken by a rewriter, whatever reference they come through.

    Attributes:
        key: Its own, in ``CALLS``.
    """

    def __init__(self, function: FunctionType) -> None:
        self.key = f"function {next(_numbers)}"
        self._function = function
        self._holders: dict[Hashable, str] = {}
        self._read()

    def origin(self) -> Callable[..., Any]:
        """Return the function as it is without the patch, as a function of its own."""
        with _LOCK:
            function, origin = self._function, self._origin
            known = function.__code__ is origin.__code__ and function.__defaults__ is origin.__defaults__
            if not self._holders and not known:
                self._read()
            return self._origin

    def hold(self, holder: Hashable, lookup: str = BY_NAME) -> None:
        """Put the patch in place for a holder.

        Args:
            holder: Anything of its own.
            lookup: How calls are told apart: not, by the class of ``self``, or by ``cls``.
        """
        with _LOCK:
            self.origin()
            self._holders[holder] = lookup
            self._apply()

    def release(self, holder: Hashable) -> None:
        """Undo the patch if this was the last holder; does nothing for one that does not hold it."""
        with _LOCK:
            self._holders.pop(holder, None)
            self._apply()

    def _read(self) -> None:
        function = self._function
        self._code = function.__code__
        self._trampolines: dict[str, CodeType] = {}
        self._before = function.__dict__.get("__signature__", _MISSING)
        self._shown: Any = None
        origin = FunctionType(
            self._code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        origin.__kwdefaults__ = function.__kwdefaults__
        origin.__qualname__ = function.__qualname__
        origin.__dict__.update(function.__dict__)
        self._origin = origin
        CALLS[self.key] = origin

    def _apply(self) -> None:
        if not self._holders:
            code, signature = self._code, self._before
        else:
            # One that looks at self also serves those who do not ask for it.
            lookup = max(self._holders.values(), key=BY_NAME.__ne__)
            if lookup not in self._trampolines:
                self._trampolines[lookup] = _trampoline(self._code, lookup, self.key)
            code, signature = self._trampolines[lookup], self._signature()
        if self._function.__code__ is code:
            return
        self._function.__code__ = code
        # torch.export and others read the parameters of forward.
        if signature is _MISSING:
            self._function.__dict__.pop("__signature__", None)
        else:
            self._function.__dict__["__signature__"] = signature
        # Dynamo remembers the parameters of every function that it has traced.
        _DYNAMOS_PARAMETERS.pop(self._function, None)

    def _signature(self) -> Any:
        if self._shown is None:
            try:
                self._shown = inspect.signature(self._origin)
            except ValueError:  # it has none to be shown
                self._shown = self._before
        return self._shown


class AttributePatch:
    """Lets the calls of an attribute of a class or module be taken by a rewriter.

    Attributes:
        key: Its own, in ``CALLS``.
        target: What stands there without the patch; None while nobody holds it.
    """

    def __init__(self) -> None:
        self.key = f"attribute {next(_numbers)}"
        self.target: AttributeTarget | None = None
        self._holders: set[Hashable] = set()
        self._before: Any = _MISSING

    def hold(self, holder: Hashable, target: AttributeTarget, origin: Callable[..., Any]) -> None:
        """Put the patch in place for a holder."""
        with _LOCK:
            self._holders.add(holder)
            if self.target is None:
                CALLS[self.key] = origin
                self._before = vars(target.owner).get(target.attribute, _MISSING)
                self.target = target
                setattr(target.owner, target.attribute, _standing_in(target.value, self.key))

    def release(self, holder: Hashable) -> None:
        """Undo the patch if this was the last holder; does nothing for one that does not hold it."""
        with _LOCK:
            self._holders.discard(holder)
            if self._holders or self.target is None:
                return
            owner, attribute = self.target.owner, self.target.attribute
            if self._before is not _MISSING:
                setattr(owner, attribute, self._before)
            elif attribute in vars(owner):
                delattr(owner, attribute)
            self.target = None


def function_patch(function: Any) -> FunctionPatch:
    """Return the patch of a function, which need not be in place."""
    with _LOCK:
        if function not in _FUNCTIONS:
            _FUNCTIONS[function] = FunctionPatch(function)
        return _FUNCTIONS[function]


def original(function: Any) -> Any:
    """Return a function as it is without a patch."""
    patch = _FUNCTIONS.get(function) if isinstance(function, FunctionType) else None
    return function if patch is None else patch.origin()


def attribute_patch(owner: Any, attribute: str) -> AttributePatch:
    """Return the patch of an attribute, which need not be in place."""
    with _LOCK:
        return _ATTRIBUTES.setdefault((id(owner), attribute), AttributePatch())


def patched_attribute(owner: Any, attribute: str) -> AttributeTarget | None:
    """Return what stands at an attribute without its patch, if a patch is in place."""
    patch = _ATTRIBUTES.get((id(owner), attribute))
    return patch.target if patch is not None else None


def _standing_in(value: Any, key: str) -> Any:
    """Return what is set in the place of an attribute: the same kind of thing."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return CALLS[choose(key)](*args, **kwargs)

    functools.update_wrapper(call, python_function(value) or value)
    if isinstance(value, property):
        return property(call, value.fset, value.fdel, value.__doc__)
    if isinstance(value, classmethod):
        return classmethod(call)
    # Something that does not bind to an object must not begin to.
    return call if hasattr(value, "__get__") and not isinstance(value, staticmethod) else staticmethod(call)


def _trampoline(code: CodeType, lookup: str, key: str) -> CodeType:
    """Return code that calls what ``lookup`` finds, and fits a function that has this code."""
    template = _template(len(code.co_freevars), lookup)
    constants = tuple(key if constant == "KEY" else constant for constant in template.co_consts)
    return template.replace(co_consts=constants, co_name=code.co_name, co_qualname=code.co_qualname)


@functools.cache
def _template(cells: int, lookup: str) -> CodeType:
    """Compile a function with as many cells as the one that it stands in for, as Python demands."""
    names = "".join(f"cell{number}, " for number in range(cells))
    source = f"""
def outer({names}):
    def trampoline(*args, **kwargs):
        if False:
            ({names})
        from torchferry.rewrite.state import CALLS, choose, choose_for
        return CALLS[{lookup}](*args, **kwargs)
"""
    module = compile(source, __file__, "exec")
    (outer,) = (constant for constant in module.co_consts if isinstance(constant, CodeType))
    (trampoline,) = (constant for constant in outer.co_consts if isinstance(constant, CodeType))
    return trampoline
