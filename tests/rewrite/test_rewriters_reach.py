"""Every way of reaching a function is caught, once for each call, in eager and under both ways of torch.export."""

# ruff: noqa: PLW0108 - a lambda looks its function up only when it is called
import contextlib
import functools

import pytest
import rewrite_samples as samples
import torch
from rewrite_samples import Base, Calling, Derived, Doubled, Net, Unrelated
from rewrite_samples import scaled as imported
from torch.nn import functional

from torchferry.rewrite import FunctionRewriter, ModuleRewriter, RewriterContext

# torch.export warns of torch's own use of what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
MODES = ["eager", "non-strict", "strict"]
# A multiplication by this appears in the graph once for each call of the rewriter, and nowhere else.
EFFECT = 3.0625

derived, unrelated, calling = Derived(), Unrelated(), Calling()
bound_before = derived.method
bound_class_method_before = Derived.class_method
bound_static_method_before = Base.static_method
relu_before, repeat_before, interpolate_before = torch.relu, torch.Tensor.repeat, functional.interpolate
SAMPLE = torch.linspace(-1, 1, 16).reshape(4, 4)
bound_builtin_before = SAMPLE.cosh


@pytest.fixture
def rewriters():
    return FunctionRewriter()


def context(rewriters, **kwargs):
    return RewriterContext(function_rewriter=rewriters, module_rewriter=ModuleRewriter(), **kwargs)


def effects(model, x, mode, rewriters, dynamic=True):
    """Run or export a model; return how often the rewriter's effect is in the result, and the rewriters' log."""
    with context(rewriters) as active:
        if mode == "eager":
            model(x)
            return None, active.log
        shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
        program = torch.export.export(model, (x,), strict=mode == "strict", dynamic_shapes=shapes)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    return sum(EFFECT in node.args for node in nodes if node.target is torch.ops.aten.mul.Tensor), active.log


def with_effect(ctx, *args, **kwargs):
    return ctx.origin_func(*args, **kwargs) * EFFECT


REACHES = {
    "attribute of the module": ("scaled", lambda x: samples.scaled(x)),
    "imported name": ("scaled", lambda x: imported(x)),
    "alias": ("scaled", lambda x: samples.alias(x)),
    "tuple": ("scaled", lambda x: samples.in_tuple[0](x)),
    "list in a dict": ("scaled", lambda x: samples.in_dict["scaled"][0](x)),
    "default argument": ("scaled", lambda x: samples.with_default_argument(x)),
    "own default argument": ("scaled", lambda x, function=samples.scaled: function(x)),
    "partial": ("scaled", lambda x: samples.partial(x)),
    "keyword arguments": ("scaled", lambda x: samples.scaled(x, factor=3.0, offset=1.0)),
    "lru_cache around it": ("scaled", lambda x: samples.lru.__wrapped__(x)),
    "closure": ("closed", lambda x: samples.closed(x)),
    "two cells": ("twice_closed", lambda x: samples.twice_closed(x, power=2)),
    "decorated": ("decorated", lambda x: samples.decorated(x)),
    "method": ("Base.method", lambda x: derived.method(x)),
    "method from inside": ("Base.method", lambda x: derived.other(x)),
    "method of the class": ("Base.method", lambda x: Base.method(derived, x)),
    "method bound before": ("Base.method", lambda x: bound_before(x)),
    "class method": ("Base.class_method", lambda x: Derived.class_method(x)),
    "class method of an object": ("Base.class_method", lambda x: derived.class_method(x)),
    "class method bound before": ("Base.class_method", lambda x: bound_class_method_before(x)),
    "static method": ("Base.static_method", lambda x: Base.static_method(x)),
    "static method of an object": ("Base.static_method", lambda x: derived.static_method(x)),
    "static method taken before": ("Base.static_method", lambda x: bound_static_method_before(x)),
    "method that calls super": ("Calling.method", lambda x: calling.method(x)),
    "method reached by super": ("Base.method", lambda x: calling.method(x)),
    "inherited method": ("Derived.method", lambda x: derived.method(x)),
    "inherited method from inside": ("Derived.method", lambda x: derived.other(x)),
    "inherited method bound before": ("Derived.method", lambda x: bound_before(x)),
    "inherited class method": ("Derived.class_method", lambda x: Derived.class_method(x)),
    "inherited class method bound before": ("Derived.class_method", lambda x: bound_class_method_before(x)),
    "inherited static method": ("Derived.static_method", lambda x: derived.static_method(x)),
}

PROPERTIES = {
    "property": ("Base.prop", lambda x: x * derived.prop),
    "inherited property": ("Derived.prop", lambda x: x * derived.prop),
}

TORCH_REACHES = {
    "C function": ("torch.relu", lambda x: torch.relu(x)),
    "C function taken before": ("torch.relu", lambda x: relu_before(x)),
    "C function in a partial": ("torch.add", lambda x: functools.partial(torch.add, alpha=2)(x, x)),
    "C function inside torch's Python": ("torch.relu", lambda x: functional.relu(x)),
    "C function inside a module of torch": ("torch.relu", lambda x: torch.nn.ReLU()(x)),
    "Python function of torch": ("torch.nn.functional.relu", lambda x: functional.relu(x)),
    "Python function inside a module": ("torch.nn.functional.relu", lambda x: torch.nn.ReLU()(x)),
    "Python function taken before": ("torch.nn.functional.interpolate", lambda x: interpolate_before(x[None, None], 8)),
    "C function of functional": ("torch.nn.functional.gelu", lambda x: functional.gelu(x)),
    "dispatched by a flag": ("torch.nn.functional.max_pool2d", lambda x: functional.max_pool2d(x[None], 2)),
    "calls another one": ("torch.nn.functional.upsample", lambda x: functional.upsample(x[None, None], 8)),
    "second name": ("torch.functional.einsum", lambda x: torch.einsum("ab,cb->ac", x, x)),
    "first name": ("torch.einsum", lambda x: torch.functional.einsum("ab,cb->ac", x, x)),
    "Tensor method": ("torch.Tensor.repeat", lambda x: x.repeat(2, 1)),
    "Tensor method by its class": ("torch.Tensor.repeat", lambda x: torch.Tensor.repeat(x, 2, 1)),
    "Tensor method taken before": ("torch.Tensor.repeat", lambda x: repeat_before(x, 2, 1)),
    "Tensor method in Python": ("torch.Tensor.norm", lambda x: x.norm()),
    "operator": ("torch.Tensor.__add__", lambda x: x + x),
    "operator from the right": ("torch.Tensor.__add__", lambda x: 1 + x),
    "operator under the method's name": ("torch.Tensor.add", lambda x: x + x),
    "indexing": ("torch.Tensor.__getitem__", lambda x: x[:, : x.shape[0] - 1]),
    "overload": ("torch.ops.aten.sin.default", lambda x: torch.ops.aten.sin.default(x)),
    "overload by its packet": ("torch.ops.aten.sin.default", lambda x: torch.ops.aten.sin(x)),
    "packet": ("torch.ops.aten.sin", lambda x: torch.ops.aten.sin(x)),
    "packet by an overload": ("torch.ops.aten.sin", lambda x: torch.ops.aten.sin.default(x)),
    "custom operator": ("rewrite_samples.tripled", lambda x: samples.tripled(x)),
    "custom operator in torch.ops": ("rewrite_samples.tripled", lambda x: torch.ops.rewrite_samples.tripled(x)),
    "inside attention": (
        "torch.nn.functional.scaled_dot_product_attention",
        lambda x: functional.multi_head_attention_forward(
            x[:, None], x[:, None], x[:, None], 4, 2, torch.ones(12, 4), None, None, None, False, 0.0, torch.eye(4),
            None, need_weights=False,
        )[0],
    ),
    "inside vmap": ("torch.relu", lambda x: torch.vmap(lambda row: torch.relu(row))(x)),
    "inside no_grad": ("torch.relu", torch.no_grad()(lambda x: torch.relu(x) + 0)),
    "a branch of cond": (
        "torch.relu",
        lambda x: torch.cond(x.sum() < 1, lambda t: torch.relu(t), lambda t: torch.sin(t), (x + 1,)),
    ),
    "method of a module of torch": ("torch.nn.ReLU.forward", lambda x: torch.nn.ReLU()(x)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reach", REACHES)
def test_python_functions(reach, mode, rewriters):
    name, call = REACHES[reach]
    rewriters.register_rewriter(f"rewrite_samples.{name}")(with_effect)
    found, log = effects(Net(call), SAMPLE, mode, rewriters)
    assert found in (None, 1)
    assert [row.calls for row in log.rows] == [1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reach", PROPERTIES)
def test_properties(reach, mode, rewriters):
    name, call = PROPERTIES[reach]
    rewriters.register_rewriter(f"rewrite_samples.{name}")(lambda ctx, self: ctx.origin_func(self) * EFFECT / 3)
    found, log = effects(Net(call), SAMPLE, mode, rewriters)
    assert found in (None, 1)
    assert [row.calls for row in log.rows] == [1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reach", TORCH_REACHES)
def test_functions_of_torch(reach, mode, rewriters):
    name, call = TORCH_REACHES[reach]
    rewriters.register_rewriter(name)(with_effect)
    dynamic = reach not in ("Python function taken before", "calls another one", "inside attention", "a branch of cond")
    found, log = effects(Net(call), SAMPLE, mode, rewriters, dynamic)
    assert found in (None, 1)
    assert [row.calls for row in log.rows] == [1]


@pytest.mark.parametrize("mode", MODES)
def test_three_calls_are_three(mode, rewriters):
    rewriters.register_rewriter("torch.relu")(with_effect)
    rewriters.register_rewriter("rewrite_samples.scaled")(with_effect)

    def call(x):
        for _ in range(3):
            x = samples.scaled(torch.relu(x))
        return x

    found, log = effects(Net(call), SAMPLE, mode, rewriters)
    assert found in (None, 6)
    assert [row.calls for row in log.rows] == [3, 3]


@pytest.mark.parametrize("mode", MODES)
def test_generators(mode, rewriters):
    @rewriters.register_rewriter("rewrite_samples.steps")
    def _(x, number=3):
        for step in rewriters.get_context().origin_func(x, number):
            yield step * EFFECT
        assert rewriters.get_context().backend == "default"

    found, log = effects(Net(lambda x: sum(samples.steps(torch.relu(x)))), SAMPLE, mode, rewriters)
    assert found in (None, 3)
    assert [row.calls for row in log.rows] == [1]


def test_a_generator_takes_values_and_errors(rewriters):
    @rewriters.register_rewriter("rewrite_samples.steps")
    def _(x):
        try:
            got = yield x
            yield got + rewriters.get_context().extra
        except KeyError:
            yield "caught"
        return "end"

    with context(rewriters, extra=5):
        one, two = samples.steps(1), samples.steps(2)
        assert (next(one), next(two)) == (1, 2)
        assert one.send(10) == 15
        assert two.throw(KeyError()) == "caught"
        with pytest.raises(StopIteration, match="end"):
            next(one)


@pytest.mark.parametrize("mode", MODES)
def test_fx_graphs_and_wrapped_names(mode, rewriters):
    rewriters.register_rewriter("torch.relu")(with_effect)
    rewriters.register_rewriter("rewrite_samples.wrapped_for_fx")(with_effect)
    traced = torch.fx.symbolic_trace(Net(lambda x: samples.wrapped_for_fx(torch.relu(x)) + x))
    assert [node.name for node in traced.graph.nodes] == ["x", "relu", "wrapped_for_fx", "add", "output"]
    found, log = effects(traced, SAMPLE, mode, rewriters)
    assert found in (None, 2)
    assert [row.calls for row in log.rows] == [1, 1]


@pytest.mark.parametrize("mode", ["eager", "non-strict"])
@pytest.mark.parametrize("name", ["apply", "forward"])
def test_an_autograd_function(name, mode, rewriters):
    """Dynamo has a way of its own with these, so not under strict."""
    rewriters.register_rewriter(f"rewrite_samples.Doubled.{name}")(with_effect)
    found, log = effects(Net(lambda x: Doubled.apply(x)), SAMPLE, mode, rewriters)
    assert found in (None, 1)
    assert log.rows[0].calls == 1


def test_torch_compile_sees_what_is_rewritten_at_each_call(rewriters):
    for name in ("rewrite_samples.scaled", "torch.relu"):
        rewriters.register_rewriter(name)(lambda ctx, x: ctx.origin_func(x) * ctx.factor)
    compiled = torch.compile(lambda x: samples.scaled(torch.relu(x)), backend="eager")
    results = [compiled(torch.ones(1)).item()]
    for factor in (10, 100):
        with context(rewriters, factor=factor):
            results.append(compiled(torch.ones(1)).item())
    assert [*results, compiled(torch.ones(1)).item()] == [2, 2 * 10**2, 2 * 100**2, 2]


def test_bound_builtin_method_taken_before(rewriters):
    rewriters.register_rewriter("torch.Tensor.cosh")(with_effect)
    with context(rewriters):
        result = bound_builtin_before()
    assert torch.equal(result, torch.cosh(SAMPLE) * EFFECT)


def test_a_callable_of_a_module_that_is_no_function(rewriters):
    rewriters.register_rewriter("rewrite_samples.partial")(lambda ctx, x: ctx.origin_func(x) + 100)
    before = samples.partial
    with context(rewriters):
        assert samples.partial(1.0) == 103.0
        assert before(1.0) == 3.0
    assert samples.partial is before


def test_inherited_methods_are_for_the_class_that_is_named(rewriters):
    for name in ("method", "class_method"):
        rewriters.register_rewriter(f"rewrite_samples.Derived.{name}")(
            lambda ctx, owner, x: ctx.origin_func(owner, x) + 100
        )
    rewriters.register_rewriter("rewrite_samples.Derived.static_method")(lambda ctx, x: ctx.origin_func(x) + 100)
    with context(rewriters):
        assert [o.method(1.0) for o in (derived, unrelated, Base())] == [103.0, 5.0, 2.0]
        assert [o.class_method(1.0) for o in (Derived, Unrelated, Base)] == [103.0, 5.0, 2.0]
        assert [o.static_method(1.0) for o in (Derived, Unrelated, Base)] == [102.0, 2.0, 2.0]


def test_the_base_may_be_called_from_the_rewriter_of_an_inherited_method(rewriters):
    rewriters.register_rewriter("rewrite_samples.Derived.method")(lambda self, x: Base.method(self, x) + 100)
    with context(rewriters):
        assert derived.method(1.0) == 103.0


def test_base_and_derived_each_have_their_own(rewriters):
    rewriters.register_rewriter("rewrite_samples.Base.method")(lambda ctx, self, x: ctx.origin_func(self, x) + 10)
    rewriters.register_rewriter("rewrite_samples.Derived.method")(lambda ctx, self, x: ctx.origin_func(self, x) + 100)
    with context(rewriters):
        assert [o.method(1.0) for o in (derived, unrelated)] == [103.0, 15.0]
        assert bound_before(1.0) == 103.0


@pytest.mark.parametrize("strict", [False, True])
def test_the_forward_that_is_exported(strict, rewriters):
    rewriters.register_rewriter("rewrite_samples.Net.forward")(with_effect)
    with context(rewriters):
        program = torch.export.export(
            Net(torch.relu), (SAMPLE,), strict=strict, dynamic_shapes={"x": {0: torch.export.Dim("n")}}
        )
    assert [node.name for node in program.graph.nodes] == ["x", "relu", "mul", "output"]
    assert str(program.range_constraints) != "{}"


def test_decomposing_in_the_context_does_not_rewrite_again(rewriters):
    rewriters.register_rewriter("torch.ops.aten.sin.default")(with_effect)
    with context(rewriters):
        program = torch.export.export(Net(lambda x: torch.ops.aten.sin.default(x)), (SAMPLE,)).run_decompositions()
    assert sum(EFFECT in node.args for node in program.graph.nodes) == 1


class Recorder(torch.overrides.TorchFunctionMode):
    """A mode of the user's, that notes some functions."""

    def __init__(self, *functions):
        self.functions, self.seen = functions, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.functions:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_of_the_user_see_what_is_really_called(rewriters):
    rewriters.register_rewriter("torch.relu")(lambda x: torch.sin(x))
    recorder = Recorder(torch.relu, torch.sin)
    with context(rewriters):
        with recorder, torch.device("cpu"):
            torch.relu(SAMPLE)
        assert recorder.seen == [torch.sin]
        torch.relu(SAMPLE)
    assert recorder.seen == [torch.sin]
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("outside", range(3))
@pytest.mark.parametrize("inside", range(3))
@pytest.mark.parametrize("other", ["torch.sin", "torch.nn.functional.gelu"])
def test_once_whatever_modes_are_on(outside, inside, other, rewriters):
    """Each mode calls a Python function of torch again."""
    rewriters.register_rewriter(other)(lambda ctx, x: ctx.origin_func(x))
    for name in ("nn.functional.relu", "nn.functional.max_pool2d", "Tensor.__pow__", "Tensor.norm", "relu"):
        rewriters.register_rewriter(f"torch.{name}")(with_effect)
    modes = [Recorder() for _ in range(outside + inside)]
    with contextlib.ExitStack() as stack:
        for mode in modes[:outside]:
            stack.enter_context(mode)
        active = stack.enter_context(context(rewriters))
        for mode in modes[outside:]:
            stack.enter_context(mode)
        results = functional.relu(SAMPLE), functional.max_pool2d(SAMPLE[None], 2), SAMPLE**2, SAMPLE.norm()
    expected = torch.relu(SAMPLE) * EFFECT, functional.max_pool2d(SAMPLE[None], 2), SAMPLE**2, SAMPLE.norm()
    for result, plain in zip(results, expected, strict=True):
        assert torch.allclose(result, plain * EFFECT)
    assert [row.calls for row in active.log.rows] == [0, 1, 1, 1, 1, 1]


def test_the_rewriter_of_a_python_function_of_torch_gets_what_the_caller_gave(rewriters):
    rewriters.register_rewriter("torch.nn.functional.interpolate")(lambda *args, **kwargs: (args, kwargs))
    with context(rewriters), Recorder():
        assert functional.interpolate(SAMPLE, 8) == ((SAMPLE, 8), {})
        assert functional.interpolate(SAMPLE, scale_factor=2) == ((SAMPLE,), {"scale_factor": 2})


def test_a_python_function_of_torch_may_be_called_by_its_own_rewriter(rewriters):
    @rewriters.register_rewriter("torch.nn.functional.relu")
    def _(ctx, x):
        return ctx.origin_func(x) if x.dim() == 1 else torch.stack([functional.relu(row) for row in x]) * EFFECT

    with context(rewriters) as active, Recorder():
        assert torch.equal(functional.relu(SAMPLE), torch.relu(SAMPLE) * EFFECT)
    assert active.log.rows[0].calls == 5


def test_a_tensor_subclass_keeps_its_own_behaviour(rewriters):
    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "tagged" if func is functional.relu else super().__torch_function__(func, types, args, kwargs or {})

    rewriters.register_rewriter("torch.relu")(with_effect)
    with context(rewriters):
        assert functional.relu(SAMPLE.as_subclass(Tagged)) == "tagged"
