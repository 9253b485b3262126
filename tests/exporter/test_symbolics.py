"""Symbolic functions of operators: registered by us or with torch.onnx, run by the modern exporter."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.onnx import symbolic_helper
from torch.onnx.symbolic_helper import parse_args

import torchferry as ferry
from torchferry.core.errors import ConfigError, OperatorError
from torchferry.rewrite import SYMBOLIC_REWRITER, SymbolicRewriter
from torchferry.testing import assert_op


@pytest.fixture
def symbolics():
    return SymbolicRewriter()


class Calling(nn.Module):
    """Calls a function; its one line is the model's line."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def export(function, x, **options):
    return ferry.export(Calling(function).eval(), (x,), **options)


def operators(exported):
    return [node.op_type for graph in exported.model.graphs() for node in graph]


def attributes(exported, index=0):
    return {name: attribute.value for name, attribute in exported.model.graph[index].attributes.items()}


class TestSqueeze:
    """Case 3: ONNX's Squeeze with the axes that it should have."""

    @pytest.fixture
    def register(self, symbolics):
        def squeeze(g, self, dim=None):
            if dim is None:
                axes = [axis for axis, size in enumerate(self.type().sizes()) if size == 1]
            else:
                axes = [symbolic_helper._get_const(dim, "i", "dim")]
            return g.op("Squeeze", self, axes_i=axes)

        symbolics.register_symbolic("squeeze", is_pytorch=True)(squeeze)

    @pytest.mark.parametrize("function", [torch.squeeze, lambda x: x.squeeze(2), lambda x: torch.squeeze(x, 0)])
    def test_axes(self, register, symbolics, function):
        report = assert_op(Calling(function), [((1, 3, 1, 4),)], dynamic=False, symbolic_rewriter=symbolics)
        assert report.passed
        exported = export(function, torch.rand(1, 3, 1, 4), symbolic_rewriter=symbolics)
        assert operators(exported) == ["Squeeze"]
        assert exported.rewrites == {"squeeze": 1}

    def test_one_of_several_overloads(self, symbolics):
        symbolics.register_symbolic("squeeze")(lambda g, x, *dim: g.op("own::Squeeze", x))
        symbolics.register_symbolic("squeeze.dim")(lambda g, x, dim: g.op("own::SqueezeDim", x))
        for function, expected in ((torch.squeeze, "Squeeze"), (lambda x: x.squeeze(0), "SqueezeDim")):
            assert operators(export(function, torch.rand(1, 3), symbolic_rewriter=symbolics)) == [expected]


class TestMissingOperators:
    """Case 5: a symbolic in one line, and the operator test."""

    def test_asinh(self, symbolics):
        symbolics.register_symbolic("asinh", is_pytorch=True)(lambda g, x: g.op("Asinh", x))
        assert_op(torch.asinh, [((2, 3),), ((5, 4),), ((7,),)], symbolic_rewriter=symbolics)

    def test_one_that_torch_onnx_lacks(self, symbolics):
        cases = [((2, 3), (2, 3)), ((5, 4), (5, 4)), ((7,), (1,))]
        with pytest.raises(OperatorError, match="'aten::fmax.default' .*has no translation"):
            assert_op(torch.fmax, cases, symbolic_rewriter=symbolics)
        symbolics.register_symbolic("fmax")(lambda g, a, b: g.op("Max", a, b))
        assert_op(torch.fmax, cases, symbolic_rewriter=symbolics)


class TestContext:
    def test_first_argument_and_get_context(self, symbolics):
        @symbolics.register_symbolic("asinh", is_pytorch=True, flavour="new")
        def asinh(ctx, g, x):
            assert symbolics.get_context() is ctx
            assert (ctx.cfg, ctx.flavour, ctx.func.__name__) == ({"a": 1}, "new", "asinh")
            assert not hasattr(ctx, "origin_func")
            return g.op("Asinh", x)

        exported = export(torch.asinh, torch.rand(2), symbolic_rewriter=symbolics, cfg={"a": 1})
        assert exported.rewrites == {"asinh": 1}

    def test_outside_of_a_symbolic_there_is_none(self, symbolics):
        with pytest.raises(ConfigError, match="no rewriter is running"):
            symbolics.get_context()

    def test_backend_before_default_and_opset(self, symbolics):
        register = symbolics.register_symbolic
        register("asinh")(lambda g, x: g.op("own::Any", x))
        register("asinh", opset=19)(lambda g, x: g.op("own::Late", x))
        register("asinh", opset=21)(lambda g, x: g.op("own::Later", x))
        register("asinh", backend="reference")(lambda g, x: g.op("own::Reference", x))
        cases = ((None, None, "Late"), (None, 18, "Any"), ("reference", None, "Reference"))
        for backend, opset, expected in cases:
            target = ferry.Target(backend or "onnxruntime", opset=opset)
            exported = export(torch.asinh, torch.rand(2), symbolic_rewriter=symbolics, target=target)
            assert operators(exported) == [expected]

    def test_a_tie_names_both(self, symbolics):
        symbolics.register_symbolic("asinh")(lambda g, x: x)
        symbolics.register_symbolic("aten::asinh")(lambda g, x: x)
        with pytest.raises(ConfigError, match=r"two rewriters of 'asinh' fit .*test_symbolics\.py:\d+.*:\d+"):
            export(torch.asinh, torch.rand(2), symbolic_rewriter=symbolics)


class TestArguments:
    def test_descriptors_turn_values_into_numbers(self, symbolics):
        @symbolics.register_symbolic("aten::roll", arg_descriptors=["v", "is", "is"])
        def roll(g, x, shifts, dims):
            assert (shifts, dims) == ([2, 1], [0, 1])
            return g.op("own::Roll", x, shifts_i=shifts, dims_i=dims)

        exported = export(lambda x: torch.roll(x, (2, 1), (0, 1)), torch.rand(4, 4), symbolic_rewriter=symbolics)
        assert {name: list(value) for name, value in attributes(exported).items()} == {"shifts": [2, 1], "dims": [0, 1]}

    def test_torchs_own_decorator(self, symbolics):
        @symbolics.register_symbolic("aten::hardtanh")
        @parse_args("v", "f", "f")
        def hardtanh(g, x, low, high):
            return g.op("Clip", x, min_f=low, max_f=high)

        assert assert_op(
            Calling(lambda x: nn.functional.hardtanh(x, -0.5, 2.0)), [((2, 3),), ((5, 1),)], symbolic_rewriter=symbolics
        ).passed

    def test_none_stays_none(self, symbolics):
        seen = []

        @symbolics.register_symbolic("aten::cumsum", arg_descriptors=["v", "i", "none"])
        def cumsum(g, x, dim, dtype):
            seen.append((dim, symbolic_helper._is_none(dtype)))
            return g.op("CumSum", x, g.op("Constant", value_t=torch.tensor(dim)))

        assert_op(Calling(lambda x: torch.cumsum(x, 1)), [((2, 3),), ((4, 5),)], symbolic_rewriter=symbolics)
        assert set(seen) == {(1, True)}

    def test_unknown_descriptors_are_refused(self, symbolics):
        with pytest.raises(ConfigError, match="unknown argument descriptor 'x'"):
            symbolics.register_symbolic("asinh", arg_descriptors=["v", "x"])

    def test_keyword_arguments_and_defaults_come_in_the_schemas_order(self, symbolics):
        @symbolics.register_symbolic("aten::addmm")
        def addmm(g, bias, left, right, beta, alpha):
            scale = symbolic_helper._get_const(beta, "f", "beta"), symbolic_helper._get_const(alpha, "f", "alpha")
            return g.op("Gemm", left, right, bias, beta_f=scale[0], alpha_f=scale[1])

        left, right = torch.rand(3, 4), torch.rand(4, 2)
        function = Calling(lambda bias: torch.addmm(bias, left, right, beta=0.5))
        assert_op(function, [((2,),)], symbolic_rewriter=symbolics)
        assert attributes(export(function.function, torch.rand(2), symbolic_rewriter=symbolics))["beta"] == 0.5

    def test_trailing_defaults_may_be_left_out(self, symbolics):
        symbolics.register_symbolic("aten::softmax")(lambda g, x, dim: g.op("own::Softmax", x))
        exported = export(lambda x: torch.softmax(x, 1), torch.rand(2, 3), symbolic_rewriter=symbolics)
        assert operators(exported) == ["Softmax"]

    def test_sizes_known_only_while_running(self, symbolics):
        from torch.onnx.symbolic_opset9 import expand

        symbolics.register_symbolic("aten::expand")(lambda g, x, size, implicit=None: expand(g, x, size, implicit))
        model = Calling(lambda x: torch.ones(1, 3).expand(x.shape[0], -1) + x)
        assert_op(model, [((2, 3),), ((5, 3),), ((9, 3),)], symbolic_rewriter=symbolics)

    def test_text_and_none(self, symbolics):
        @symbolics.register_symbolic("aten::gelu")
        @parse_args("v", "s")
        def gelu(g, x, approximate):
            return g.op("own::Gelu", x, approximate_s=approximate)

        function = lambda x: nn.functional.gelu(x, approximate="tanh")  # noqa: E731
        assert attributes(export(function, torch.rand(2), symbolic_rewriter=symbolics)) == {"approximate": "tanh"}

    def test_lists_of_tensors(self, symbolics):
        @symbolics.register_symbolic("aten::cat")
        def cat(g, tensors, dim):
            values = symbolic_helper._unpack_list(tensors)
            return g.op("Concat", *values, axis_i=symbolic_helper._get_const(dim, "i", "dim"))

        assert_op(Calling(lambda x: torch.cat([x, x * 2], 1)), [((2, 3),), ((4, 1),)], symbolic_rewriter=symbolics)

    def test_lists_returned(self, symbolics):
        @symbolics.register_symbolic("aten::unbind")
        def unbind(g, x, dim):
            axis = symbolic_helper._get_const(dim, "i", "dim")
            parts = g.op("Split", x, axis_i=axis, num_outputs_i=3, outputs=3)
            return [symbolic_helper._squeeze_helper(g, part, [axis]) for part in parts]

        assert_op(Calling(lambda x: x.unbind(0)[2] - x.unbind(0)[0]), [((3, 4),)], symbolic_rewriter=symbolics)


@parse_args("v", "i", "i", "i", "i")
def old_slice(g, x, dim, start, end, step):
    return g.op("Slice", x, axes_i=[dim], starts_i=[start], ends_i=[end])


class TestOldForms:
    """Nodes written for other opsets, and constants of other types."""

    def test_a_constant_takes_the_type_of_what_it_is_combined_with(self, symbolics):
        symbolics.register_symbolic("asinh")(lambda g, x: g.op("Asinh", g.op("Mul", x, torch.tensor([2]))))
        exported = export(torch.asinh, torch.rand(3), symbolic_rewriter=symbolics)
        assert {value.dtype.name for node in exported.model.graph for value in node.inputs if value} == {"FLOAT"}

    @pytest.mark.parametrize(
        ("name", "function", "symbolic"),
        [
            ("unsqueeze", lambda x: x.unsqueeze(1), lambda g, x, *_: g.op("Unsqueeze", x, axes_i=[1])),
            ("sum", lambda x: x.sum(1), lambda g, x, *_: g.op("ReduceSum", x, axes_i=[1], keepdims_i=0)),
            ("clamp", lambda x: x.clamp(-1, 1), lambda g, x, *_: g.op("Clip", x, min_f=-1.0, max_f=1.0)),
            ("slice", lambda x: x[:, 1:3], old_slice),
            (
                "pad",
                lambda x: nn.functional.pad(x, (1, 2), value=3.0),
                lambda g, x, *_: g.op("Pad", x, pads_i=[0, 1, 0, 2], value_f=3.0, mode_s="constant"),
            ),
        ],
    )
    def test_attributes_become_inputs(self, symbolics, name, function, symbolic):
        symbolics.register_symbolic(name)(symbolic)
        assert_op(Calling(function), [((4, 5),), ((3, 5),), ((7, 5),)], symbolic_rewriter=symbolics)
        assert export(function, torch.rand(4, 5), symbolic_rewriter=symbolics).rewrites == {name: 1}

    def test_what_onnx_does_not_allow_is_refused_at_the_users_line(self, symbolics):
        wrong = {
            "Relux": lambda g, x: g.op("Relux", x),
            "1 inputs .*got 2": lambda g, x: g.op("Relu", x, x),
            "'slope'": lambda g, x: g.op("Relu", x, slope_f=1.0),
        }
        for said, symbolic in wrong.items():
            registry = SymbolicRewriter()
            registry.register_symbolic("asinh")(symbolic)
            with pytest.raises(OperatorError, match=said) as caught:
                export(torch.asinh, torch.rand(3), symbolic_rewriter=registry)
            assert "test_symbolics.py" in caught.value.where
            assert caught.value.where.endswith("return self.function(x)")


class TestOtherRegistrations:
    def test_register_op(self, monkeypatch):
        monkeypatch.setattr(SYMBOLIC_REWRITER, "_records", [])
        ferry.register_op("asinh", lambda g, x: g.op("Asinh", x), "", 9)
        exported = export(torch.asinh, torch.rand(3))
        assert operators(exported) == ["Asinh"]
        assert exported.rewrites == {"aten::asinh": 1}

    def test_torchs_registrations_are_honoured(self, monkeypatch):
        monkeypatch.setattr(SYMBOLIC_REWRITER, "_records", [])
        torch.onnx.register_custom_op_symbolic("::erfinv", lambda g, x: g.op("own::ErfInv", x), 9)
        try:
            assert operators(export(torch.erfinv, torch.rand(3))) == ["ErfInv"]
            SYMBOLIC_REWRITER.register_symbolic("erfinv")(lambda g, x: g.op("own::Ours", x))
            exported = export(torch.erfinv, torch.rand(3))
            assert operators(exported) == ["Ours"]
        finally:
            torch.onnx.unregister_custom_op_symbolic("::erfinv", 9)

    def test_operators_of_libraries(self, symbolics):
        @torch.library.custom_op("symbolic_samples::twice", mutates_args=())
        def twice(x: torch.Tensor, times: int = 2) -> torch.Tensor:
            return x * times

        twice.register_fake(lambda x, times=2: torch.empty_like(x))

        @symbolics.register_symbolic("symbolic_samples::twice", arg_descriptors=["v", "i"])
        def symbolic(g, x, times):
            return g.op("Mul", x, g.op("Constant", value_t=torch.tensor(float(times))))

        assert_op(Calling(lambda x: twice(x, 5)), [((2, 3),), ((4, 1),)], symbolic_rewriter=symbolics)

    @pytest.mark.parametrize(
        ("name", "reason", "hint"),
        [
            ("asnh", "'aten' has no operator 'asnh'", "did you mean 'asinh'?"),
            ("squeeze.dimm", "'squeeze' has no overload 'dimm'", "did you mean 'squeeze'?"),
            ("nowhere::op", "torch knows no operator of 'nowhere'", "check the name"),
            ("torch.nn.ReLU", "neither an operator nor a class", "check the name"),
        ],
    )
    def test_names_that_lead_nowhere(self, symbolics, name, reason, hint):
        symbolics.register_symbolic(name)(lambda g, x: x)
        exported = export(torch.asinh, torch.rand(2), symbolic_rewriter=symbolics)
        (unknown,) = [f for f in exported.report.findings if f.code == "rewriter-unknown"]
        assert reason in unknown.message
        assert hint in unknown.hint

    def test_one_that_nothing_called_is_said(self, symbolics):
        symbolics.register_symbolic("acosh")(lambda g, x: x)
        exported = export(torch.asinh, torch.rand(2), symbolic_rewriter=symbolics)
        assert [f.code for f in exported.report.findings] == ["rewriter-unused"]


def test_values_know_their_types(symbolics):
    seen = {}

    @symbolics.register_symbolic("asinh")
    def asinh(g, x):
        seen["dtype"], seen["rank"] = x.type().scalarType(), symbolic_helper._get_tensor_rank(x)
        seen["sizes"], seen["opset"] = symbolic_helper._get_tensor_sizes(x), g.opset
        seen["exporting"] = torch.onnx.is_in_onnx_export()
        return g.op("Asinh", x)

    export(
        torch.asinh, torch.rand(2, 3, dtype=torch.float64), dynamic_shapes={"x": {0: "n"}}, symbolic_rewriter=symbolics
    )
    assert seen == {"dtype": "Double", "rank": 2, "sizes": [None, 3], "opset": 20, "exporting": True}
    assert not torch.onnx.is_in_onnx_export()


def test_nothing_is_left_registered(symbolics):
    symbolics.register_symbolic("asinh")(lambda g, x: g.op("own::Asinh", x))
    assert operators(export(torch.asinh, torch.rand(2), symbolic_rewriter=symbolics)) == ["Asinh"]
    plain = export(torch.asinh, torch.rand(2))
    assert [(node.domain, node.op_type) for node in plain.model.graph] == [("", "Asinh")]
    np.testing.assert_array_equal(torch.asinh(torch.zeros(1)).numpy(), [0])


class TestAgainstOurOwnRules:
    """A rule of ours for the same operator stands back: what the user says goes."""

    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("adaptive_avg_pool2d", lambda x: nn.functional.adaptive_avg_pool2d(x, (2, 2))),
            ("linalg_inv", torch.linalg.inv),
            ("inverse", torch.inverse),
        ],
    )
    def test_the_symbolic_is_used(self, symbolics, name, function):
        symbolics.register_symbolic(name)(lambda g, x, *_: g.op("own::Thing", x))
        exported = export(function, torch.rand(1, 3, 4, 4), symbolic_rewriter=symbolics)
        assert operators(exported) == ["Thing"]
