"""The verbs: rewriting for a while, rewriting a model for good, and asking what would be rewritten."""

from __future__ import annotations

import functools
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from torch.onnx._constants import ONNX_DEFAULT_OPSET

from torchferry.core.errors import ConfigError
from torchferry.rewrite.function import FUNCTION_REWRITER, FunctionRewriter
from torchferry.rewrite.log import RewriteLog
from torchferry.rewrite.mode import torch_rewritten, unseen
from torchferry.rewrite.module import MODULE_REWRITER, ModuleRewriter
from torchferry.rewrite.patching import BY_CLASS, BY_NAME, BY_SELF, attribute_patch, function_patch
from torchferry.rewrite.plan import Plan, make_plan
from torchferry.rewrite.registry import DEFAULT
from torchferry.rewrite.replacing import rewritten_model
from torchferry.rewrite.rewriter import Rewriter
from torchferry.rewrite.state import STATE, Active, handing_over
from torchferry.rewrite.symbolic import SYMBOLIC_REWRITER, Symbolic, SymbolicRecord, SymbolicRewriter, make_symbolic
from torchferry.rewrite.targets import FunctionTarget, TorchTarget, python_function

if TYPE_CHECKING:
    from types import FunctionType

    import torch

    from torchferry.core.target import Target
    from torchferry.rewrite.registry import Record
    from torchferry.rewrite.symbolic import SymbolicTarget
    from torchferry.rewrite.tally import Tally
    from torchferry.rewrite.targets import Target as FunctionKind


class RewriterContext:
    """Rewrites functions and modules for the time of a ``with`` block, in the thread that enters it.

    Entering is all or nothing, and leaving restores everything exactly. Other threads see the originals. Of nested
    contexts the innermost alone decides. Calls that a thread started inside the block makes are not rewritten.

    Args:
        cfg: The deploy config, for the rewriters; an empty dict if there is none.
        backend: Whose rewriters apply, besides those for any backend; the target's if there is a target.
        ir: The intermediate representation whose rewriters apply, besides those for any.
        target: For the rewriters.
        model: Its modules are rewritten too, in a copy that shares its parameters and buffers: see ``model``.
        check: Compare every call of a rewriter with the original on the same inputs. Takes the time of both.
        function_rewriter: The registry of rewriters of functions.
        module_rewriter: The registry of rewriters of module classes.
        symbolic_rewriter: The registry of symbolic functions, which only an export calls.
        **kwargs: Attributes of the rewriters' context, and keywords for the classes that take a module's place.

    Raises:
        ConfigError: On entering: two rewriters fit equally well, a module's replacement cannot be built, or the context
            is entered already.

    Attributes:
        model: The rewritten copy of the model while the context is entered; None without a model.
        symbolics: The symbolic functions that apply, by operator or ``autograd.Function``; empty before it is entered.

    >>> with RewriterContext(backend="an_engine") as context:
    ...     pass
    >>> context.log.applied()
    ()
    """

    def __init__(
        self,
        cfg: Any = None,
        backend: str = DEFAULT,
        ir: str = DEFAULT,
        *,
        target: Target | None = None,
        model: torch.nn.Module | None = None,
        check: bool = False,
        function_rewriter: FunctionRewriter = FUNCTION_REWRITER,
        module_rewriter: ModuleRewriter = MODULE_REWRITER,
        symbolic_rewriter: SymbolicRewriter = SYMBOLIC_REWRITER,
        **kwargs: Any,
    ) -> None:
        self.model: torch.nn.Module | None = None
        self.symbolics: dict[SymbolicTarget, Symbolic] = {}
        self._attributes = _attributes(cfg, backend, ir, target, kwargs)
        self._kwargs = kwargs
        self._given = model
        self._check = check
        self._registries = function_rewriter, module_rewriter, symbolic_rewriter
        self._plan: Plan | None = None
        self._tallies: dict[Record, Tally] = {}
        self._undo: ExitStack | None = None
        self._thread = 0

    @property
    def log(self) -> RewriteLog:
        """What became of every registered rewriter so far; of none before the context is entered."""
        return RewriteLog() if self._plan is None else self._plan.log(self._tallies)

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise ConfigError("this context is entered already", hint="make another one")
        self._undo, self._thread = ExitStack(), threading.get_ident()
        try:
            self._enter(self._undo)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._undo is None:
            raise ConfigError("this context is not entered")
        if self._thread != threading.get_ident():
            raise ConfigError("a context is left by another thread than the one that entered it")
        undo, self._undo = self._undo, None
        self.model = None
        undo.close()

    def _enter(self, undo: ExitStack) -> None:
        plan = make_plan(*self._registries, self._attributes)
        tallies: dict[Record, Tally] = {}
        if self._given is not None:
            self.model, tallies = rewritten_model(
                self._given, plan.modules, self._attributes["cfg"], self._kwargs, self._check
            )
        active = Active(STATE.active)
        for record, kind in plan.functions.chosen.items():
            tallies[record] = _install(record, kind, active, self._attributes, self._check, undo)
        for record, operator in plan.symbolics.chosen.items():
            assert isinstance(record, SymbolicRecord)
            self.symbolics[operator] = make_symbolic(record, operator, self._attributes)
            tallies[record] = self.symbolics[operator].tally
        self._plan, self._tallies = plan, tallies
        undo.callback(_leave, active, len(STATE.calls))
        STATE.active = active
        undo.enter_context(torch_rewritten(active))


def patch_model(
    model: torch.nn.Module,
    cfg: Any = None,
    backend: str = DEFAULT,
    ir: str = DEFAULT,
    *,
    target: Target | None = None,
    module_rewriter: ModuleRewriter = MODULE_REWRITER,
    **kwargs: Any,
) -> torch.nn.Module:
    """Return a lasting copy of a model in which modules are rewritten; the model stays as it is.

    The copy shares parameters and buffers with the model: ``copy.deepcopy`` the model first for one of its own.
    Patching what was patched before changes nothing more. Rewriters of functions need a ``RewriterContext``.

    Args:
        model: May itself be of a class that is replaced.
        cfg: As for ``RewriterContext``, like the following.
        backend: Whose rewriters apply.
        ir: The intermediate representation whose rewriters apply.
        target: For the rewriters.
        module_rewriter: The registry.
        **kwargs: Keywords for the classes that take a module's place.

    Raises:
        ConfigError: If two rewriters fit equally well, or a replacement cannot be built.
    """
    attributes = _attributes(cfg, backend, ir, target, kwargs)
    plan = make_plan(FunctionRewriter(), module_rewriter, SymbolicRewriter(), attributes)
    return rewritten_model(model, plan.modules, attributes["cfg"], kwargs, check=False)[0]


def explain(
    backend: str = DEFAULT,
    ir: str = DEFAULT,
    *,
    cfg: Any = None,
    target: Target | None = None,
    function_rewriter: FunctionRewriter = FUNCTION_REWRITER,
    module_rewriter: ModuleRewriter = MODULE_REWRITER,
    symbolic_rewriter: SymbolicRewriter = SYMBOLIC_REWRITER,
    **kwargs: Any,
) -> RewriteLog:
    """Print and return what a context with these arguments would rewrite: each rewriter, its file, and why not.

    Args:
        backend: As for ``RewriterContext``, like all others.
        ir: The intermediate representation.
        cfg: The deploy config.
        target: The target.
        function_rewriter: The registry of rewriters of functions.
        module_rewriter: The registry of rewriters of module classes.
        symbolic_rewriter: The registry of symbolic functions.
        **kwargs: What checkers may look at.

    Raises:
        ConfigError: If two rewriters fit equally well.
    """
    attributes = _attributes(cfg, backend, ir, target, kwargs)
    log = make_plan(function_rewriter, module_rewriter, symbolic_rewriter, attributes).log()
    print(log)  # noqa: T201 - what it is for
    return log


def _attributes(cfg: Any, backend: str, ir: str, target: Target | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    if target is not None and backend == DEFAULT:
        backend = target.backend
    if target is not None and backend != target.backend:
        raise ConfigError(f"backend '{backend}' and target '{target}' are not the same", hint="leave one of them out")
    opset = (target.opset if target is not None else None) or ONNX_DEFAULT_OPSET
    told = {"cfg": {} if cfg is None else cfg, "backend": backend, "ir": ir, "target": target}
    return {"opset": opset, **kwargs, **told}


def _install(
    record: Record, kind: FunctionKind, active: Active, attributes: dict[str, Any], check: bool, undo: ExitStack
) -> Tally:
    """Let a rewriter take the calls of what it replaces, once the context is active."""
    holder = object()

    def hold(function: FunctionType, lookup: str = BY_NAME) -> str:
        patch = function_patch(function)
        undo.callback(patch.release, holder)
        patch.hold(holder, lookup)
        return patch.key

    if isinstance(kind, TorchTarget):
        rewriter = Rewriter(record, functools.partial(unseen, kind.function), attributes, check=check)
        active.torch[kind.function] = rewriter
    elif isinstance(kind, FunctionTarget):
        key = hold(kind.function)
        origin = handing_over(key) if kind.guarded else function_patch(kind.function).origin()
        rewriter = Rewriter(record, origin, attributes, check=check, bookkeeping=kind.guarded)
        active.take(key, rewriter.key)
    else:
        function = python_function(kind.value)
        origin = kind.value if function is None else function_patch(function).origin()
        rewriter = Rewriter(record, origin, attributes, check=check)
        patch = attribute_patch(kind.owner, kind.attribute)
        undo.callback(patch.release, holder)
        patch.hold(holder, kind, origin)
        active.take(patch.key, rewriter.key)
        if kind.base is not None:
            lookup = BY_CLASS if isinstance(kind.value, classmethod) else BY_SELF
            active.take(hold(kind.base, lookup), rewriter.key, kind.owner)
    undo.callback(rewriter.withdraw)
    rewriter.publish()
    return rewriter.tally


def _leave(active: Active, depth: int) -> None:
    """Take a context's rewriters out of the thread's, whatever was left in the wrong order."""
    del STATE.calls[depth:]
    if STATE.active is active:
        STATE.active = active.outer
        return
    inner = STATE.active
    while inner is not None and inner.outer is not active:
        inner = inner.outer
    if inner is not None:
        inner.outer = active.outer
