"""Operators that torch.onnx cannot translate: which, where, what was tried, and a symbolic function to complete."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from torch._ops import OpOverload

import torchferry as ferry
from torchferry.core.errors import ExportError, OperatorError
from torchferry.exporter.missing import operator_error
from torchferry.exporter.skeletons import skeletons
from torchferry.rewrite import FunctionRewriter, SymbolicRewriter

MATRIX = torch.rand(3, 3) / 2


@torch.library.custom_op("ferry_failures::twist", mutates_args=())
def twist(x: torch.Tensor, times: int, mode: str = "left", angle: float | None = None) -> torch.Tensor:
    return x.clone()


@twist.register_fake
def _(x, times, mode="left", angle=None):
    return torch.empty_like(x)


@torch.library.custom_op("ferry_failures::overwrite", mutates_args=("x",))
def overwrite(x: torch.Tensor) -> None:
    x.fill_(1)


@torch.library.custom_op("ferry_failures::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


class InverseError(torch.nn.Module):
    def forward(self, x):
        return torch.erfinv(x)


class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Sequential(torch.nn.ReLU(), InverseError())

    def forward(self, x):
        return self.head(x)


class Several(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.act = InverseError()

    def forward(self, x):
        y = torch.lgamma(torch.lgamma(x))
        return self.act(x) + torch.erfinv(y).erfinv() + twist(x, 3)


class Branches(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: torch.erfinv(x) + 1, torch.lgamma, (x,))


class Custom(torch.nn.Module):
    def forward(self, x):
        return twist(x, 3) + 1


class Overwrites(torch.nn.Module):
    def forward(self, x):
        copy = x.clone()
        overwrite(copy)
        return copy


class Complex(torch.nn.Module):
    def forward(self, x):
        return torch.view_as_real(torch.sinh(torch.view_as_complex(x)))


class Sampled(torch.nn.Module):
    def forward(self, volume, grid):
        return torch.ops.aten.grid_sampler_3d(volume, grid, 0, 0, True)


def _refusal(model, *args, **options):
    with pytest.raises(OperatorError) as caught:
        ferry.export(model, args, **options)
    assert isinstance(caught.value.__cause__, torch.onnx.errors.OnnxExporterError)
    return caught.value


def _code(error):
    """The part of the hint that is meant to be pasted."""
    code = error.hint.partition("\n\n")[2]
    compile(code, "hint", "exec")
    return code


def _registered(code):
    """Run a skeleton's code; return the registry that it fills."""
    symbolics = SymbolicRewriter()
    exec(code.removeprefix("import torchferry\n"), {"torchferry": SimpleNamespace(SYMBOLIC_REWRITER=symbolics)})
    return symbolics


def test_an_operator_in_a_submodule():
    error = _refusal(Deep(), MATRIX)
    assert error.message == (
        "operator 'aten::erfinv.default' of Deep has no translation to ONNX; used once in module 'head.1'\n"
        "  torch.onnx's table: no; decomposition: into prims::erf_inv, which has no translation either; "
        "ONNX operators of a similar name: none"
    )
    assert re.fullmatch(r".*test_failures_operators\.py:\d+ in forward: return torch\.erfinv\(x\)", error.where)
    assert _code(error) == (
        "import torchferry\n\n"
        "# aten::erfinv(Tensor self) -> Tensor\n"
        '@torchferry.SYMBOLIC_REWRITER.register_symbolic("erfinv", is_pytorch=True, arg_descriptors=["v"])\n'
        "def erfinv(g, input):\n"
        '    return g.op("custom::Erfinv", input)  # write the ONNX form here'
    )


def test_several_operators_at_once_the_most_used_first():
    error = _refusal(Several(), MATRIX)
    head, *lines = error.message.splitlines()
    assert head == "3 operators of Several have no translation to ONNX"
    assert [line.split(", at ")[0] for line in lines[::2]] == [
        "  'aten::erfinv.default', used 3 times, first in module 'act'",
        "  'aten::lgamma.default', used twice",
        "  'ferry_failures::twist.default', used once",
    ]
    assert error.where.endswith("in forward: return torch.erfinv(x)")
    assert [line.rpartition(": ")[2] for line in lines[2::2]] == [
        "y = torch.lgamma(torch.lgamma(x))",
        "return self.act(x) + torch.erfinv(y).erfinv() + twist(x, 3)",
    ]
    code = _code(error)
    assert code.count("import torchferry\n") == 1
    assert re.findall(r"^def (\w+)", code, re.MULTILINE) == ["erfinv", "lgamma", "twist"]


def test_an_operator_with_a_translation_of_the_users_is_not_listed():
    translations = {
        op: lambda x, *_: x for op in (torch.ops.aten.erfinv.default, torch.ops.ferry_failures.twist.default)
    }
    program = torch.export.export(Several(), (MATRIX,), strict=False)
    message = operator_error(program, "Several", None, translations).message
    assert message.startswith("operator 'aten::lgamma.default' of Several has no translation to ONNX; used twice\n")
    translations[torch.ops.aten.lgamma.default] = lambda x: x
    assert operator_error(program, "Several", None, translations) is None


def test_complex_numbers_are_no_case_for_a_symbolic_function():
    error = _refusal(Complex(), MATRIX[:, :2].contiguous())
    assert "torch.onnx's table: for real numbers only, these are complex; decomposition: none" in error.message
    assert error.hint.endswith("compute with the two parts that torch.view_as_real gives")


def test_an_operator_that_writes_into_its_argument():
    error = _refusal(Overwrites(), MATRIX)
    assert error.message == (
        "operator 'ferry_failures::overwrite.default' of Overwrites has no translation to ONNX; used once\n"
        "  it writes into its arguments, which no node of a graph can do"
    )
    assert error.where.endswith("in forward: overwrite(copy)")
    assert error.hint == "let it return new tensors, with mutates_args=()"


def test_operators_in_the_branches_of_a_cond():
    error = _refusal(Branches(), MATRIX)
    assert "'aten::erfinv.default', used once in a branch of 'cond', at " in error.message
    assert "'aten::lgamma.default', used once in a branch of 'cond', at " in error.message
    assert re.search(r"test_failures_operators\.py:\d+ in forward: return torch\.cond\(", error.where)
    assert re.findall(r"^def (\w+)", _code(error), re.MULTILINE) == ["erfinv", "lgamma"]


def test_an_operator_of_a_library():
    error = _refusal(Custom(), MATRIX)
    assert "operator 'ferry_failures::twist.default' of Custom has no translation" in error.message
    assert "torch.onnx's table: no; decomposition: none; ONNX operators of a similar name: none" in error.message
    assert error.where.endswith("in forward: return twist(x, 3) + 1")
    assert _code(error).partition("\n\n")[2] == (
        '# ferry_failures::twist(Tensor x, SymInt times, str mode="left", float? angle=None) -> Tensor\n'
        "@torchferry.SYMBOLIC_REWRITER.register_symbolic("
        '"ferry_failures::twist", arg_descriptors=["v", "i", "s", "f"])\n'
        'def twist(g, x, times, mode="left", angle=None):\n'
        '    return g.op("ferry_failures::Twist", x, times_i=times, mode_s=mode, angle_f=angle)'
        "  # write the ONNX form here"
    )


def test_the_nearest_onnx_operator_is_filled_in():
    error = _refusal(Sampled(), torch.rand(1, 2, 3, 4, 5), torch.rand(1, 3, 4, 5, 3))
    assert (
        "ONNX operators of a similar name: GridSample (inputs X, grid; attributes align_corners, mode" in error.message
    )
    assert 'return g.op("GridSample", input, grid, align_corners_i=align_corners)' in _code(error)


def test_other_failures_of_torch_keep_their_words():
    class Looks(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ExportError) as caught:
        ferry.export(Looks(), (MATRIX,))
    assert not isinstance(caught.value, OperatorError)
    assert "torch cannot export Looks" in caught.value.message


@pytest.mark.parametrize("branches_in", ["model", "rewriter"])
def test_a_branch_on_how_large_values_are_is_decided_beforehand(branches_in):
    rewriters = FunctionRewriter()

    class Halved(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x)

    def halved(x):
        if x.abs().max() > 65504:
            return x / 2
        return x

    if branches_in == "model":
        Halved.forward = lambda self, x: halved(x)
    else:
        rewriters.register_rewriter("torch.relu")(halved)
    with pytest.raises(ExportError) as caught:
        ferry.export(Halved(), (MATRIX,), function_rewriter=rewriters)
    assert caught.value.where.endswith("in halved: if x.abs().max() > 65504:")
    assert "ferry.fp16.watch" in caught.value.hint
    assert "WatchReport.load(ctx.cfg['watch'])" in caught.value.hint


def test_a_number_without_a_branch_is_not_told_of_watching():
    class Sized(torch.nn.Module):
        def forward(self, x):
            return x * int(x.sum())

    with pytest.raises(ExportError) as caught:
        ferry.export(Sized(), (MATRIX,))
    assert ".item()" in caught.value.hint
    assert "watch" not in caught.value.hint


def test_an_operator_that_torch_cannot_trace():
    class Opaque(torch.nn.Module):
        def forward(self, x):
            return opaque(x)

    with pytest.raises(ExportError, match="no fake impl registered for .*ferry_failures::opaque") as caught:
        ferry.export(Opaque(), (MATRIX,))
    assert caught.value.where.endswith("in forward: return opaque(x)")
    assert caught.value.hint.startswith("register one")


def _every_operator():
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name, None) if namespace in ("aten", "prims") else None
        op = getattr(packet, schema.overload_name or "default", None)
        if isinstance(op, OpOverload):
            yield op


def test_the_skeleton_of_every_operator_registers_with_every_argument():
    count = 0
    for op in _every_operator():
        [record] = _registered(skeletons([op])).records()
        arguments = op._schema.arguments
        parameters = list(inspect.signature(record.replacement).parameters.values())[1:]
        assert len(record.arg_descriptors) == len(parameters) == len(arguments)
        for parameter, argument in zip(parameters, arguments, strict=True):
            assert (parameter.default is not parameter.empty) == argument.has_default_value(), op
        count += 1
    assert count > 1000


def test_a_skeleton_whose_onnx_operator_fits_needs_no_completing():
    volume, grid = torch.rand(1, 2, 3, 4, 5), torch.rand(1, 3, 4, 5, 3) * 2 - 1
    symbolics = _registered(_code(_refusal(Sampled(), volume, grid)))
    exported = ferry.export(Sampled(), (volume, grid), symbolic_rewriter=symbolics)
    assert [node.op_type for node in exported.model.graph] == ["GridSample"]


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (torch.ops.aten.fmax.default, 'register_symbolic("fmax", is_pytorch=True, arg_descriptors=["v", "v"])'),
        (torch.ops.aten.special_zeta.other_scalar, 'register_symbolic("special_zeta.other_scalar", is_pytorch=True, '),
        (torch.ops.aten.special_zeta.default, 'register_symbolic("special_zeta.default", is_pytorch=True, '),
        (torch.ops.prims.erf_inv.default, 'register_symbolic("prims::erf_inv", arg_descriptors=["v"])'),
        (torch.ops.aten.cummax.default, 'g.op("custom::Cummax", input, dim_i=dim, outputs=2)'),
        (torch.ops.aten.uniform.default, "def uniform(g, input, from_=0.0, to=1.0, generator=None):"),
        (torch.ops.aten.max_pool3d.default, "stride=(), padding=(0, 0, 0)"),
    ],
)
def test_a_skeleton_follows_the_schema(op, expected):
    assert expected in skeletons([op])


def test_an_operator_whose_result_has_a_size_known_only_while_running():
    class Model(torch.nn.Module):
        def forward(self, x):
            return x.masked_select(x > 0.5) * 2

    with pytest.raises(OperatorError, match="'aten::masked_select.default' of Model has no translation") as caught:
        ferry.export(Model().eval(), torch.rand(3, 4), function_rewriter=FunctionRewriter())
    assert "return x.masked_select(x > 0.5) * 2" in caught.value.where
