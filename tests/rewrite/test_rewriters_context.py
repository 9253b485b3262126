"""What a rewriter is told, and that everything is restored however the context is left."""

import threading
import types

import pytest
import rewrite_samples as samples
import torch
from rewrite_samples import Base, Derived

from torchferry.core.errors import ConfigError, TorchferryError
from torchferry.core.target import Target
from torchferry.rewrite import FUNCTION_REWRITER, FunctionRewriter, ModuleRewriter, RewriterContext


@pytest.fixture
def rewriters():
    return FunctionRewriter()


def context(rewriters, *args, **kwargs):
    return RewriterContext(*args, function_rewriter=rewriters, module_rewriter=ModuleRewriter(), **kwargs)


ALL_KINDS = [
    "torch.relu",
    "torch.Tensor.repeat",
    "torch.nn.functional.interpolate",
    "rewrite_samples.scaled",
    "rewrite_samples.closed",
    "rewrite_samples.partial",
    *(f"rewrite_samples.{cls}.{name}" for cls in ("Base", "Derived") for name in (
        "method", "class_method", "static_method", "prop")),
]  # fmt: skip


def everything():
    """Return what a context may change, to be compared by identity."""
    functions = [samples.scaled, samples.closed, Base.method, Base.class_method.__func__, Base.static_method]
    functions += [Base.prop.fget, torch.nn.functional.interpolate, torch.overrides.TorchFunctionMode.__enter__]
    seen = [f.__code__ for f in functions] + [f.__defaults__ for f in functions] + [f.__closure__ for f in functions]
    for owner in (samples, Base, Derived, torch.Tensor, torch, torch.nn.functional, *functions):
        seen += [f"{name} of {owner}" for name in vars(owner)] + list(vars(owner).values())
    return seen


@pytest.fixture
def restored():
    before = everything()
    yield
    after = everything()
    assert len(after) == len(before)
    assert all(new is old or (isinstance(new, str) and new == old) for new, old in zip(after, before, strict=True))
    assert torch._C._len_torch_function_stack() == 0
    assert samples.scaled(1.0) == 2.0


@pytest.fixture
def all_kinds(rewriters):
    for name in ALL_KINDS:
        rewriters.register_rewriter(name)(lambda ctx, *args, **kwargs: ctx.origin_func(*args, **kwargs))
    return rewriters


class UnexpectedError(Exception):
    pass


@pytest.mark.parametrize("error", [None, UnexpectedError, KeyboardInterrupt, SystemExit])
def test_everything_is_restored(error, all_kinds, restored):
    def use():
        with context(all_kinds):
            assert isinstance(vars(Base)["static_method"], staticmethod)
            assert isinstance(vars(Derived)["static_method"], staticmethod)
            assert samples.scaled(torch.relu(torch.ones(2))).tolist() == [2.0, 2.0]
            assert Derived().method(1.0) == 3.0
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()


@pytest.mark.parametrize("error", [UnexpectedError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(0, len(ALL_KINDS), 3))
def test_entering_is_all_or_nothing(error, call, all_kinds, restored, monkeypatch):
    """However far entering has got when it is interrupted."""
    from torchferry.rewrite import rewriter

    publish, made = rewriter.Rewriter.publish, []

    def interrupted(self):
        made.append(self)
        if len(made) > call:
            raise error
        publish(self)

    monkeypatch.setattr(rewriter.Rewriter, "publish", interrupted)
    with pytest.raises(error), context(all_kinds):
        pytest.fail("it was entered")
    assert len(made) == call + 1


@pytest.mark.parametrize("error", [UnexpectedError, KeyboardInterrupt])
def test_a_rewriter_that_raises(error, rewriters, restored):
    @rewriters.register_rewriter("torch.relu")
    @rewriters.register_rewriter("rewrite_samples.scaled")
    def _(x):
        raise error

    for call in (torch.relu, samples.scaled):
        with context(rewriters):
            with pytest.raises(error):
                call(torch.ones(1))
            with pytest.raises(ConfigError, match="no rewriter is running"):
                rewriters.get_context()


def test_what_a_rewriter_is_told(rewriters):
    seen = []

    @rewriters.register_rewriter("rewrite_samples.scaled", backend="an_engine", registered=1, both=1)
    def told(x):
        ctx = rewriters.get_context()
        seen.append(ctx)
        return ctx.origin_func(x)

    cfg = {"key": "value"}
    with context(rewriters, cfg, "an_engine", "an_ir", opset=18, both=2):
        samples.scaled(1.0)
    (ctx,) = seen
    assert (ctx.cfg, ctx.backend, ctx.ir, ctx.target, ctx.func) == (cfg, "an_engine", "an_ir", None, told)
    assert (ctx.registered, ctx.both, ctx.opset) == (1, 2, 18)
    assert ctx.cfg is cfg
    assert ctx.origin_func(1.0) == 2.0
    with pytest.raises(AttributeError, match="has no 'missing'; it has backend, .*opset"):
        _ = ctx.missing


def test_the_target_gives_the_backend(rewriters):
    rewriters.register_rewriter("rewrite_samples.scaled", backend="an_engine")(lambda ctx, x: ctx.target)
    target = Target("an_engine", precision="fp16")
    with context(rewriters, target=target):
        assert samples.scaled(1.0) is target
    with pytest.raises(ConfigError, match="'other' and target 'an_engine-fp16'"):
        context(rewriters, backend="other", target=target)


def test_a_config_is_never_none(rewriters):
    rewriters.register_rewriter("rewrite_samples.scaled")(lambda ctx, x: ctx.cfg)
    with context(rewriters):
        assert samples.scaled(1.0) == {}


def _module_level(x):
    return FUNCTION_REWRITER.get_context().extra


def _asking_for_it(ctx, x):
    return ctx.extra


class _Callable:
    def __call__(self, x):
        return FUNCTION_REWRITER.get_context().extra

    def method(self, ctx, x):
        return ctx.extra


def _local():
    prefix = 1

    def replacement(x):
        def helper():
            return FUNCTION_REWRITER.get_context().extra

        return helper() * prefix

    return replacement


@pytest.mark.parametrize(
    "replacement",
    [
        _module_level,
        _asking_for_it,
        _local(),
        lambda x: FUNCTION_REWRITER.get_context().extra,
        lambda ctx, x: ctx.extra,
        _Callable(),
        _Callable().method,
    ],
)
def test_every_kind_of_rewriter_gets_its_context(replacement, rewriters):
    rewriters.register_rewriter("rewrite_samples.scaled")(replacement)
    with context(rewriters, extra="extra"):
        assert samples.scaled(1.0) == "extra"


def test_rewriters_that_call_each_other_keep_their_contexts(rewriters):
    @rewriters.register_rewriter("rewrite_samples.scaled", name="outer")
    def _(x):
        inner = samples.decorated(x)
        return rewriters.get_context().name, inner

    rewriters.register_rewriter("rewrite_samples.decorated", name="inner")(lambda x: rewriters.get_context().name)
    with context(rewriters):
        assert samples.scaled(1.0) == ("outer", "inner")


def test_one_function_for_several_targets(rewriters):
    @rewriters.register_rewriter("rewrite_samples.scaled")
    @rewriters.register_rewriter("rewrite_samples.decorated")
    def both(x):
        return rewriters.get_context().origin_func(x) + 100

    with context(rewriters):
        assert (samples.scaled(1.0), samples.decorated(1.0)) == (102.0, 102.0)
    assert both.__name__ == "both"


def test_the_original_does_not_come_back_but_what_it_calls_does(rewriters):
    calls = []

    @rewriters.register_rewriter("rewrite_samples.factorial")
    def _(ctx, n):
        calls.append(n)
        return ctx.origin_func(n)

    with context(rewriters):
        assert samples.factorial(3) == 6
    assert calls == [3, 2, 1, 0]


def test_a_rewriter_may_call_what_it_replaces(rewriters):
    @rewriters.register_rewriter("torch.Tensor.repeat")
    def _(ctx, x, *sizes):
        return ctx.origin_func(x, *sizes) if x.dim() > 1 else x[None].repeat(1, *sizes)[0]

    with context(rewriters):
        assert torch.ones(2).repeat(3).shape == (6,)


def test_the_innermost_context_decides_alone(rewriters, restored):
    rewriters.register_rewriter("rewrite_samples.scaled")(lambda ctx, x: ctx.extra)
    rewriters.register_rewriter("torch.relu")(lambda ctx, x: ctx.extra)
    nothing = FunctionRewriter()

    def both():
        return samples.scaled(1.0), torch.relu(torch.tensor(1.0))

    with context(rewriters, extra="outer"):
        assert both() == ("outer", "outer")
        with context(rewriters, extra="inner"):
            assert both() == ("inner", "inner")
            with context(nothing):
                assert both() == (2.0, 1.0)
            assert both() == ("inner", "inner")
        assert both() == ("outer", "outer")
    assert both() == (2.0, 1.0)


def test_a_context_entered_by_a_rewriter(rewriters, restored):
    inner = FunctionRewriter()
    inner.register_rewriter("rewrite_samples.decorated")(lambda ctx, x: "inner")

    @rewriters.register_rewriter("rewrite_samples.scaled")
    def _(x):
        with context(inner):
            return samples.decorated(x), samples.scaled(x), rewriters.get_context().origin_func(x)

    with context(rewriters):
        assert samples.scaled(1.0) == ("inner", 2.0, 2.0)


def test_contexts_left_in_the_wrong_order(rewriters, restored):
    rewriters.register_rewriter("rewrite_samples.scaled")(lambda ctx, x: ctx.extra)
    rewriters.register_rewriter("torch.relu")(lambda ctx, x: ctx.extra)
    first, second = context(rewriters, extra=1), context(rewriters, extra=2)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert samples.scaled(1.0) == 2
    second.__exit__()
    assert samples.scaled(1.0) == 2.0


def test_a_context_is_entered_once_at_a_time(rewriters):
    rewriters.register_rewriter("rewrite_samples.scaled")(lambda x: "new")
    once = context(rewriters)
    with once, pytest.raises(ConfigError, match="entered already"), once:
        pass
    assert samples.scaled(1.0) == 2.0
    with once:
        assert samples.scaled(1.0) == "new"
    with pytest.raises(ConfigError, match="not entered"):
        once.__exit__()


def test_other_threads_see_the_originals(rewriters, restored):
    for name in ("rewrite_samples.scaled", "torch.relu", "rewrite_samples.Derived.static_method"):
        rewriters.register_rewriter(name)(lambda ctx, x: ctx.extra)

    def values():
        return samples.scaled(1.0), torch.relu(torch.tensor(1.0)), Derived.static_method(1.0)

    entered, early_left, seen = threading.Barrier(3, timeout=20), threading.Event(), {}

    def early():
        with context(rewriters, extra="early"):
            seen["early"] = values()
            entered.wait()
        seen["early, left"] = values()
        early_left.set()

    def late():
        with context(rewriters, extra="late"):
            seen["late"] = values()
            entered.wait()
            early_left.wait(20)
            seen["late, alone"] = values()

    workers = [threading.Thread(target=work) for work in (early, late)]
    for worker in workers:
        worker.start()
    entered.wait()
    seen["outside"] = values()
    for worker in workers:
        worker.join(20)
    plain = (2.0, 1.0, 2.0)
    assert seen == {
        "early": ("early",) * 3, "late": ("late",) * 3, "late, alone": ("late",) * 3,
        "early, left": plain, "outside": plain,
    }  # fmt: skip


def test_a_context_is_left_by_its_own_thread(rewriters):
    active, errors = context(rewriters), []

    def leave():
        try:
            active.__exit__()
        except TorchferryError as exc:
            errors.append(str(exc))

    with active:
        other = threading.Thread(target=leave)
        other.start()
        other.join()
    assert errors == ["a context is left by another thread than the one that entered it"]


def test_a_generator_that_outlives_its_context(rewriters):
    @rewriters.register_rewriter("rewrite_samples.steps")
    def _(x):
        while True:
            yield samples.scaled(rewriters.get_context().extra)

    rewriters.register_rewriter("rewrite_samples.scaled")(lambda x: x + 100)
    with context(rewriters, extra=1):
        generator = samples.steps(1)
        assert next(generator) == 101
    assert next(generator) == 2


def test_defaults_that_were_replaced_in_between(rewriters, monkeypatch):
    rewriters.register_rewriter("rewrite_samples.scaled")(lambda ctx, x: ctx.origin_func(x) + 100)
    with context(rewriters):
        assert samples.scaled(1.0) == 102.0
    monkeypatch.setattr(samples.scaled, "__defaults__", (5.0,))
    with context(rewriters):
        assert samples.scaled(1.0) == 105.0


def test_parameters_can_still_be_inspected(rewriters):
    import inspect

    rewriters.register_rewriter("rewrite_samples.scaled")(lambda *args: None)
    before = inspect.signature(samples.scaled)
    with context(rewriters):
        assert inspect.signature(samples.scaled) == before
        assert samples.scaled.__defaults__ == (2.0,)
    assert "__signature__" not in vars(samples.scaled)


def test_a_function_that_was_replaced_in_between(rewriters):
    """As by reloading a module."""
    rewriters.register_rewriter("rewrite_reloaded.function")(lambda ctx, x: ctx.origin_func(x) + 100)
    module = types.ModuleType("rewrite_reloaded")
    import sys

    sys.modules["rewrite_reloaded"] = module
    try:
        for offset in (1, 2):
            exec(f"def function(x): return x + {offset}", vars(module))
            with context(rewriters):
                assert module.function(0) == 100 + offset
            module.function.__code__ = (lambda x: x).__code__
            with context(rewriters):
                assert module.function(0) == 100
            assert module.function(0) == 0
    finally:
        del sys.modules["rewrite_reloaded"]
