"""``autograd.Function``s with a symbolic: exported as that, their forward never traced."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo import trace_rules
from torch.autograd import Function

import torchferry as ferry
from torchferry.core.errors import ExportError, OperatorError
from torchferry.rewrite import SymbolicRewriter


@pytest.fixture
def run(tmp_path):
    """Run an exported graph in ONNX Runtime on tensors."""

    def run(exported, *tensors):
        engine = ferry.compile(exported, ferry.Target(), tmp_path / "engine", overwrite=True)
        with engine.open() as session:
            feeds = {name: t.numpy() for name, t in zip(exported.signature.input_names, tensors, strict=True)}
            return list(session.run(feeds).values())

    return run


def agree(run, exported, model, *tensors):
    with torch.no_grad():
        expected = model(*tensors)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    for got, want in zip(run(exported, *tensors), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)
        assert got.dtype == want.numpy().dtype


def operators(exported):
    return [(node.domain, node.op_type) for graph in exported.model.graphs() for node in graph]


def finding(exported, code):
    return [f.message for f in exported.report.findings if f.code == code]


class Doubled(Function):
    """2a + b, whose forward no tracer can follow; the symbolic multiplies by an integer."""

    @staticmethod
    def symbolic(g, a, b):
        return g.op("Add", g.op("Mul", a, g.op("Constant", value_t=torch.tensor([2]))), b)

    @staticmethod
    def forward(ctx, a, b):
        return torch.from_numpy(2 * a.numpy() + b.numpy())


class Largest(Function):
    """Two outputs, and arguments that are no tensors."""

    @staticmethod
    def symbolic(g, x, k, name, mask, options):
        assert (name, mask, options) == ("rows", None, [1, 2])
        return g.op("TopK", x, g.op("Constant", value_t=torch.tensor([k])), axis_i=-1, outputs=2)

    @staticmethod
    def forward(ctx, x, k, name, mask, options):
        values, indices = torch.topk(x, k)
        ctx.mark_non_differentiable(indices)
        return values, indices


class Stretched(Function):
    """Bicubic resizing by factors that are an input."""

    @staticmethod
    def symbolic(g, x, scales):
        empty = g.op("Constant", value_t=torch.tensor([], dtype=torch.float32))
        return g.op(
            "Resize", x, empty, scales, coordinate_transformation_mode_s="pytorch_half_pixel",
            cubic_coeff_a_f=-0.75, mode_s="cubic", nearest_mode_s="floor",
        )  # fmt: skip

    @staticmethod
    def forward(ctx, x, scales):
        factors = scales.tolist()[-2:]
        return nn.functional.interpolate(x, scale_factor=factors, mode="bicubic", align_corners=False)


class Magnifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Conv2d(3, 64, 9, padding=4),
            nn.Conv2d(64, 32, 1),
            nn.Conv2d(32, 3, 5, padding=2),
        )

    def forward(self, x, factor):
        x = torch.relu(self.first(Stretched.apply(x, factor)))
        return self.last(torch.relu(self.middle(x)))


@pytest.mark.parametrize("dynamic", [None, {"image": {0: "n", 2: "h", 3: "w"}}])
def test_a_dynamic_magnification(run, dynamic):
    torch.manual_seed(0)
    model = Magnifier().eval()
    example = torch.rand(1, 3, 15, 11), torch.tensor([1.0, 1, 3, 3])
    exported = ferry.export(model, example, input_names=["image", "factor"], dynamic_shapes=dynamic)
    assert ("", "Resize") in operators(exported)
    for factor in (1.5, 2.0, 3.0, 4.0):
        agree(run, exported, model, example[0], torch.tensor([1, 1, factor, factor]))
    if dynamic:
        agree(run, exported, model, torch.rand(2, 3, 7, 20), torch.tensor([1.0, 1, 2, 3]))


class TestWhereTheShapeComesFrom:
    def test_forward_on_fake_tensors(self, run):
        class Padded(Function):
            @staticmethod
            def symbolic(g, x):
                pads = g.op("Constant", value_t=torch.tensor([0, 1, 0, 1]))
                return g.op("Pad", x, pads)

            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return nn.functional.pad(x, (1, 1))

        class Model(nn.Module):
            def forward(self, x):
                return Padded.apply(x).sum(0)

        model = Model().eval()
        exported = ferry.export(model, (torch.rand(3, 4),), dynamic_shapes={"x": {1: "w"}})
        assert str(exported.signature.outputs[0].shape[0]) == "w + 2"
        (message,) = finding(exported, "function-shape")
        assert "Padded" in message
        assert message.endswith("of forward on fake tensors")
        agree(run, exported, model, torch.rand(3, 9))

    def test_onnx_shape_inference(self, run):
        class Model(nn.Module):
            def forward(self, x):
                return Doubled.apply(x, x * x).reshape(-1)

        model = Model().eval()
        exported = ferry.export(model, (torch.rand(3, 4),), dynamic_shapes={"x": {0: "n"}})
        (message,) = finding(exported, "function-shape")
        assert "of ONNX shape inference, for forward does not run on fake tensors: .numpy()" in message
        agree(run, exported, model, torch.rand(5, 4))

    def test_what_the_symbolic_says(self):
        class Said(Function):
            @staticmethod
            def symbolic(g, x):
                return g.op("own::Thing", x).setType(x.type().with_sizes([3, 7]))

            @staticmethod
            def forward(ctx, x):
                return torch.from_numpy(np.repeat(x.numpy(), 7).reshape(3, 7))

        class Model(nn.Module):
            def forward(self, x):
                return torch.relu(Said.apply(x))

        exported = ferry.export(Model().eval(), (torch.rand(3),))
        assert exported.signature.outputs[0].shape == (3, 7)
        assert "ONNX shape inference" in finding(exported, "function-shape")[0]

    def test_running_it_at_several_sizes(self, run):
        class Unknown(Function):
            @staticmethod
            def symbolic(g, x, y):
                return g.op("own::Pair", x, y, outputs=2)

            @staticmethod
            def forward(ctx, x, y):
                both = x.numpy() + y.numpy()
                return torch.from_numpy(np.repeat(both, 2, axis=1)), torch.from_numpy(both.argmax(axis=1))

        class Model(nn.Module):
            def forward(self, x, y):
                values, places = Unknown.apply(x, y)
                return values * 2, places + 1

        dynamic = {"x": {0: "n"}, "y": {0: "n"}}
        exported = ferry.export(Model().eval(), (torch.rand(3, 4), torch.rand(3, 4)), dynamic_shapes=dynamic)
        values, places = exported.signature.outputs
        assert (values.dtype, places.dtype) == ("float32", "int64")
        assert (values.shape, places.shape) == (("n", 8), ("n",))
        (found,) = [f for f in exported.report.findings if f.code == "function-shape-measured"]
        assert found.severity == "warning"
        assert "forward run for real at several sizes" in found.message
        assert exported.model.opset_imports["own"] == 1

    def test_nothing_but_the_example(self):
        class Found(Function):
            @staticmethod
            def symbolic(g, x):
                return g.op("own::Found", x)

            @staticmethod
            def forward(ctx, x):
                return torch.from_numpy(x.numpy()[x.numpy() > 0.5])

        class Model(nn.Module):
            def forward(self, x):
                return Found.apply(x) * 2

        exported = ferry.export(Model().eval(), (torch.rand(30, 4),))
        (output,) = exported.signature.outputs
        assert (output.dtype, len(output.shape)) == ("float32", 1)
        assert not isinstance(output.shape[0], int)


class TestHowItIsCalled:
    def test_in_submodules_many_times_and_by_an_attribute(self, run):
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)
                self.combine = Doubled.apply

            def forward(self, x):
                return self.combine(self.linear(x), x)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.ModuleList([Part(), Part()])

            def forward(self, x):
                for part in self.parts:
                    x = part(x)
                return Doubled.apply(x, x)

        torch.manual_seed(0)
        model = Model().eval()
        exported = ferry.export(model, (torch.rand(2, 4),), dynamic_shapes={"x": {0: "n"}})
        agree(run, exported, model, torch.rand(7, 4))
        places = [str(exported.provenance(node)) for node in exported.model.graph if node.op_type == "Mul"]
        assert [place.split(" ")[0] for place in places] == ["parts.0", "parts.1", "(root)"]
        assert all("in forward: " in place and "(x" in place for place in places), places

    def test_several_outputs_and_arguments_that_are_no_tensors(self, run):
        class Model(nn.Module):
            def forward(self, x):
                return Largest.apply(x, 2, "rows", None, [1, 2])

        model = Model().eval()
        exported = ferry.export(model, (torch.rand(3, 4),), dynamic_shapes={"x": {0: "n"}})
        agree(run, exported, model, torch.rand(5, 4))
        assert operators(exported) == [("", "TopK")]

    @pytest.mark.parametrize("sign", [1, -1])
    def test_inside_the_branches_of_cond(self, run, sign):
        class Model(nn.Module):
            def forward(self, x):
                return torch.cond(
                    x.sum() > 0,
                    lambda t: Doubled.apply(t, t) + 0,
                    lambda t: Largest.apply(t, 4, "rows", None, [1, 2])[0] * 1,
                    (x,),
                )

        exported = ferry.export(Model().eval(), (torch.rand(3, 4),))
        x = sign * torch.rand(3, 4)
        expected = 3 * x if sign > 0 else torch.topk(x, 4)[0]
        np.testing.assert_allclose(run(exported, x)[0], expected, rtol=1e-6)
        assert {("", "If"), ("", "Mul"), ("", "TopK")} <= set(operators(exported))

    def test_a_size_among_the_arguments(self, run):
        class Repeated(Function):
            @staticmethod
            def symbolic(g, x, times):
                one = g.op("Constant", value_t=torch.tensor([0]))
                shape = g.op(
                    "Concat", g.op("Unsqueeze", times, one), g.op("Constant", value_t=torch.tensor([3])), axis_i=0
                )
                return g.op("Expand", x, shape)

            @staticmethod
            def forward(ctx, x, times):
                return x.expand(times, 3)

        class Model(nn.Module):
            def forward(self, x, like):
                return Repeated.apply(x, like.shape[0]) + like

        model = Model().eval()
        exported = ferry.export(model, (torch.rand(1, 3), torch.rand(4, 3)), dynamic_shapes={"like": {0: "n"}})
        agree(run, exported, model, torch.rand(1, 3), torch.rand(9, 3))

    def test_a_list_of_tensors(self, run):
        class Joined(Function):
            @staticmethod
            def symbolic(g, tensors, axis):
                return g.op("Concat", *tensors, axis_i=axis)

            @staticmethod
            def forward(ctx, tensors, axis):
                return torch.from_numpy(np.concatenate([t.numpy() for t in tensors], axis))

        class Model(nn.Module):
            def forward(self, x, y):
                return Joined.apply([x, y, x], 1)

        model = Model().eval()
        exported = ferry.export(model, (torch.rand(2, 3), torch.rand(2, 5)))
        agree(run, exported, model, torch.rand(2, 3), torch.rand(2, 5))

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_original_acts_again_afterwards(self, fails, monkeypatch):
        code = Function.apply.__func__.__code__
        allowed = trace_rules.is_callable_allowed(Doubled)
        asked = []
        monkeypatch.setattr(Wrapped, "watch", lambda: asked.append(torch.onnx.is_in_onnx_export()))
        if fails:
            monkeypatch.setattr(Doubled, "symbolic", staticmethod(lambda g, a, b: g.op("Nothing", a)))
        with pytest.raises(OperatorError) if fails else nullcontext():
            ferry.export(nn.Sequential(Wrapped()).eval(), (torch.ones(2),))
        assert asked == [True]
        assert Function.apply.__func__.__code__ is code
        assert trace_rules.is_callable_allowed(Doubled) == allowed
        assert not torch.onnx.is_in_onnx_export()
        assert torch._C._len_torch_function_stack() == 0
        assert Doubled.apply(torch.ones(2), torch.ones(2)).tolist() == [3.0, 3.0]


class Wrapped(nn.Module):
    watch = staticmethod(lambda: None)

    def forward(self, x):
        Wrapped.watch()
        return Doubled.apply(x, x)


def test_a_function_without_a_symbolic_is_traced(run):
    class Scaled(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 3

    class Model(nn.Module):
        def forward(self, x):
            return Scaled.apply(x)

    exported = ferry.export(Model().eval(), (torch.rand(2),))
    assert operators(exported) == [("", "Mul")]
    assert finding(exported, "function-shape") == []


class TestRegistered:
    def test_one_is_put_in_the_place_of_its_own(self, run):
        symbolics = SymbolicRewriter()

        @symbolics.register_symbolic(f"{__name__}.Doubled", flavour="sharp")
        def doubled(ctx, g, a, b):
            assert symbolics.get_context() is ctx
            assert (ctx.flavour, ctx.cfg, ctx.backend) == ("sharp", {"a": 1}, "onnxruntime")
            return g.op("Identity", ctx.origin_func(g, a, b))

        exported = ferry.export(Wrapped().eval(), (torch.rand(2),), symbolic_rewriter=symbolics, cfg={"a": 1})
        assert exported.rewrites == {f"{__name__}.Doubled": 1}
        agree(run, exported, Wrapped(), torch.rand(2))

    def test_one_is_for_a_backend(self):
        symbolics = SymbolicRewriter()
        register = symbolics.register_symbolic
        register(f"{__name__}.Doubled", backend="reference")(lambda g, a, b: g.op("own::Twice", a, b))
        for backend, expected in (("reference", "own"), ("onnxruntime", "")):
            target = ferry.Target(backend)
            exported = ferry.export(Wrapped().eval(), (torch.rand(2),), target=target, symbolic_rewriter=symbolics)
            assert operators(exported)[0][0] == expected

    def test_one_is_found_through_apply(self):
        symbolics = SymbolicRewriter()
        symbolics.register_symbolic(f"{__name__}.doubled.__self__")(lambda g, a, b: g.op("own::Twice", a, b))
        exported = ferry.export(Wrapped().eval(), (torch.rand(2),), symbolic_rewriter=symbolics)
        assert operators(exported) == [("own", "Twice")]

    def test_an_unknown_name_is_said(self):
        symbolics = SymbolicRewriter()
        symbolics.register_symbolic(f"{__name__}.Doubld")(lambda g, a, b: a)
        exported = ferry.export(Wrapped().eval(), (torch.rand(2),), symbolic_rewriter=symbolics)
        (unknown,) = [f for f in exported.report.findings if f.code == "rewriter-unknown"]
        assert unknown.hint == f"did you mean '{__name__}.Doubled'?"


doubled = Doubled.apply


def failing(symbolic, message, error=OperatorError):
    class Failing(Function):
        @staticmethod
        def forward(ctx, x):
            return x + 1

    Failing.symbolic = staticmethod(symbolic)

    class Model(nn.Module):
        def forward(self, x):
            return Failing.apply(x)

    with pytest.raises(error, match=message) as caught:
        ferry.export(Model().eval(), (torch.rand(2, 3),))
    return caught.value


class TestWrongSymbolics:
    def test_one_that_raises(self):
        def symbolic(g, x):
            raise KeyError("gone")

        error = failing(symbolic, "the symbolic of '.*Failing' fails: KeyError: 'gone'")
        assert "in forward: return Failing.apply(x)" in error.where
        assert "test_functions.py" in error.hint

    @pytest.mark.parametrize("returned", [None, 3, torch.ones(2)])
    def test_one_that_returns_no_value(self, returned):
        failing(lambda g, x: returned, f"returns {type(returned).__name__}, not what g.op")

    def test_one_with_too_many_outputs(self):
        failing(
            lambda g, x: g.op("TopK", x, g.op("Constant", value_t=torch.tensor([1])), outputs=2), "gives 2 outputs, Py"
        )

    def test_one_of_another_dtype(self):
        error = failing(lambda g, x: g.op("Cast", x, to_i=7), "is INT64, PyTorch's is FLOAT")
        assert "Cast" in error.hint

    def test_one_of_another_shape(self):
        failing(lambda g, x: g.op("Flatten", x, axis_i=0), "has shape .1,6., PyTorch's .2,3.")

    def test_one_with_an_operator_that_onnx_lacks(self):
        failing(lambda g, x: g.op("Relux", x), "Relux")

    def test_one_with_an_operator_of_torchscript(self):
        failing(lambda g, x: g.op("aten::relu", x), "not ONNX")

    def test_a_forward_that_fails_in_pytorch_too(self):
        class Broken(Function):
            @staticmethod
            def symbolic(g, x):
                return g.op("own::Thing", x)

            @staticmethod
            def forward(ctx, x):
                raise RuntimeError("no kernel")

        class Model(nn.Module):
            def forward(self, x):
                return Broken.apply(x)

        with pytest.raises(ferry.TorchferryError, match="fails on its own example in PyTorch, .*no kernel"):
            ferry.export(Model().eval(), (torch.rand(2),))

    def test_a_number_known_only_while_running(self):
        class Shifted(Function):
            @staticmethod
            def symbolic(g, x, by):
                return x

            @staticmethod
            def forward(ctx, x, by):
                return x + by

        class Model(nn.Module):
            def forward(self, x):
                return Shifted.apply(x, x.sum().item())

        with pytest.raises(ExportError, match="is called with a number known only while running") as caught:
            ferry.export(Model().eval(), (torch.rand(2),))
        assert "as a tensor" in caught.value.hint
