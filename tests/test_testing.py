"""``assert_op`` passes what is right and names what is wrong: case, element, values, tolerance, seed."""

import dataclasses

import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry import backends
from torchferry.core.engine import Availability
from torchferry.core.errors import (
    ConfigError,
    FrozenDimensionError,
    InputError,
    MissingBackendError,
    ModelError,
    UnsupportedError,
)
from torchferry.testing import assert_op

ENGINE = "onnxruntime"
ENGINES = ("onnxruntime", "reference")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def two_outputs(x):
    return {"largest": x.amax(-1), "parts": [x > 0, x.argmax(-1)]}


def wrong_when_exported(x):
    return x + torch.compiler.is_exporting() * (torch.arange(x.shape[-1]) == 1)


@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        pytest.param(torch.relu, ((2, 3),), id="a function in C"),
        pytest.param(torch.add, [((2, 3), (2, 3)), ((4, 5), (4, 5))], id="two inputs at two sizes"),
        pytest.param(lambda x, scale: x * scale, [((3,), 2.0), ((4,), 3)], id="numbers"),
        pytest.param(two_outputs, [((2, 3),), ((5, 4),), ((1, 2, 3),)], id="several outputs and ranks"),
        pytest.param(Doubled.apply, [((2, 3),), ((3, 3),)], id="an autograd.Function"),
        pytest.param(nn.Linear(3, 2), [((2, 3),), ((1, 3),), ((0, 3),)], id="a module and special sizes"),
        pytest.param(torch.cat, [([(2, 3), (1, 3)],), ([(4, 3), (2, 3)],)], id="a list of tensors"),
        pytest.param(lambda x, *, dim: x.sum(dim), {"x": (2, 3), "dim": 1}, id="keyword arguments"),
        pytest.param(torch.gather, (torch.rand(2, 3), 1, torch.tensor([[2], [0]])), id="an index"),
        pytest.param(torch.log, [(torch.tensor([1.0, -1.0, 0.0]),), ((4,),)], id="nan and infinities"),
        pytest.param(lambda x, sizes: x.expand(sizes), ((3,), [2, 3]), id="ints in a list"),
    ],
)
def test_a_right_operator_passes(fn, inputs):
    report = assert_op(fn, inputs, ENGINES)
    assert report.passed
    cases = len(inputs) if isinstance(inputs, list) else 1
    assert len(report.comparisons) == len(ENGINES) * cases * (3 if fn is two_outputs else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.float16, torch.bool])
def test_random_tensors_come_in_each_dtype(dtype):
    report = assert_op(lambda x: x.flip(0), ((2, 3),), ENGINE, dtypes=[dtype])
    assert [comparison.dtype for comparison in report.comparisons] == [str(dtype).removeprefix("torch.")]


def test_given_tensors_keep_their_dtype_unless_others_are_asked_for():
    case = (torch.rand(2, 3, dtype=torch.float64), torch.tensor([1, 0]))
    assert assert_op(lambda x, i: (x[i], i + 1), case, ENGINE).comparisons[0].dtype == "float64"
    converted = assert_op(lambda x, i: (x[i], i + 1), case, ENGINE, dtypes=[torch.float32])
    assert [comparison.dtype for comparison in converted.comparisons] == ["float32", "int64"]


def test_a_module_is_converted_and_left_as_it_was():
    layer = nn.Linear(3, 2)
    report = assert_op(layer, ((2, 3),), ENGINE, dtypes=[torch.float64])
    assert report.comparisons[0].dtype == "float64"
    assert layer.weight.dtype is torch.float32
    assert layer.training


def test_a_wrong_value_is_named_with_everything_that_repeats_it():
    expected = torch.randn(3, generator=torch.Generator().manual_seed(7), dtype=torch.float64).float()[1].item()
    with pytest.raises(AssertionError) as caught:
        assert_op(wrong_when_exported, [((3,),), ((4,),)], ENGINE, seed=7, atol=0.5)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == "test of wrong_when_exported failed with seed 7:"
    assert lines[1] == (
        f"output 0 differs: 1 of 3 elements, worst at (1,): expected {expected:.7g}, got {expected + 1:.7g}; "
        f"max abs 1, max rel {1 / abs(expected):.3g}, allowed atol 0.5, rtol 0.0001"
    )
    assert lines[2] == "at onnxruntime-fp32, case 1 (float32[3])"
    assert lines[4] == "at onnxruntime-fp32, case 2 (float32[4])"


def when_exported(other, otherwise=lambda x: x + 1):
    def fn(x):
        return other(x) if torch.compiler.is_exporting() else otherwise(x)

    return fn


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        pytest.param(when_exported(lambda x: x[:, :2] + 1), r"shape \(2, 2\), expected \(2, 3\)", id="shape"),
        pytest.param(when_exported(lambda x: (x + 1).double()), "dtype float64, expected float32", id="dtype"),
        pytest.param(when_exported(lambda x: (x, x)), "PyTorch gives 1 outputs, the engine 2", id="count"),
        pytest.param(when_exported(lambda x: x / 0), "6 with NaN or Inf on one side only", id="infinity"),
        pytest.param(
            when_exported(lambda x: (x > 1).int(), lambda x: (x > 2).int()),
            r"worst at \(1, 0\): expected 0, got 1",
            id="integers",
        ),
    ],
)
def test_what_differs_is_named(fn, said):
    case = (torch.tensor([[0.0, 0.5, 1.0], [1.5, 0.5, 0.0]]),)
    with pytest.raises(AssertionError, match=said):
        assert_op(fn, case, ENGINE, rtol=100, atol=100)


def test_a_tolerance_is_that_of_the_output_unless_given():
    off = when_exported(lambda x: x + 0.995, lambda x: x + 1)
    assert_op(off, ((3,),), ENGINE, dtypes=[torch.float16])
    assert_op(off, ((3,),), ENGINE, atol=0.006)
    with pytest.raises(AssertionError, match=r"allowed atol 0\.0001, rtol 0\.0001"):
        assert_op(off, ((3,),), ENGINE, dtypes=[torch.float16, torch.float32])


def test_a_wrong_rewriter_is_caught_although_it_may_change_outputs():
    registry = ferry.rewriters.FunctionRewriter()

    @registry.register_rewriter("torch.relu", changes_outputs=True)
    def relu(x):
        return x.clamp(min=0.25)

    with pytest.raises(AssertionError, match=r"worst at \(1,\): expected 0, got 0\.25; max abs 0\.25, max rel 1"):
        assert_op(torch.relu, (torch.tensor([0.125, -1.0]),), ENGINE, function_rewriter=registry)


def test_a_rewriter_that_changes_its_input_is_caught_although_the_outputs_are_right():
    registry = ferry.rewriters.FunctionRewriter()

    @registry.register_rewriter("torch.relu")
    def relu(x):
        return x.relu_()

    with pytest.raises(AssertionError, match="rewrite-mutates-input"):
        assert_op(torch.relu, ((4,),), ENGINE, function_rewriter=registry)


def only_at_three(x):
    return x + 1 if x.shape[0] == 3 else x - 1


def from_three(x):
    return x + 1 if x.shape[0] >= 3 else x - 1


def test_an_axis_that_cannot_be_dynamic_names_the_line():
    cases = [((3, 2),), ((5, 2),)]
    with pytest.raises(FrozenDimensionError) as caught:
        assert_op(only_at_three, cases, ENGINE)
    assert "in only_at_three: return x + 1 if x.shape[0] == 3" in str(caught.value)
    assert (
        "while testing only_at_three on onnxruntime-fp32 at case 1 (float32[3, 2]), seed 0" in caught.value.__notes__[0]
    )
    assert assert_op(only_at_three, cases, ENGINE, dynamic=False).passed


def test_a_size_that_the_graph_is_wrong_for_names_the_line():
    with pytest.raises(AssertionError, match=r"'x_dim_0' = 2 is outside .*in from_three: return x \+ 1") as caught:
        assert_op(from_three, [((3,),), ((2,),)], ENGINE)
    assert "at onnxruntime-fp32, case 2 (float32[2])" in str(caught.value)


def test_dynamic_axes_can_be_given():
    cases = [((3, 2),), ((5, 2),)]
    assert assert_op(torch.nn.functional.relu, cases, ENGINE, dynamic_shapes={"input": {0: "n"}}).passed
    with pytest.raises(AssertionError, match="axis 0 of 'input' must be 3, got 5"):
        assert_op(torch.nn.functional.relu, cases, ENGINE, dynamic_shapes={"input": {1: "n"}})


def test_a_backend_that_is_not_installed_is_an_error_by_name_and_else_skipped_with_a_finding(monkeypatch):
    absent = Availability(False, reason="it is not installed")
    others = [name for name in backends.names() if name != ENGINE]
    for name in others:
        monkeypatch.setattr(backends.get(name), "availability", lambda: absent)
    with pytest.raises(MissingBackendError, match="'reference' cannot be used here: it is not installed"):
        assert_op(torch.relu, ((3,),), [ENGINE, "reference"])
    report = assert_op(torch.relu, ((3,),))
    assert [comparison.case for comparison in report.comparisons] == ["onnxruntime-fp32, case 1 (float32[3])"]
    assert [finding.code for finding in report.findings] == ["backend-skipped"] * len(others)
    assert "reference-fp32: the engine 'reference' cannot be used here: it is not installed" in str(report)

    monkeypatch.setattr(backends.get(ENGINE), "availability", lambda: absent)
    with pytest.raises(MissingBackendError, match="no engine is installed"):
        assert_op(torch.relu, ((3,),))


def test_an_engine_without_dynamic_shapes_gets_every_case_on_its_own(monkeypatch):
    fixed = dataclasses.replace(backends.get(ENGINE).capabilities(), dynamic_shapes=False)
    monkeypatch.setattr(backends.get(ENGINE), "capabilities", lambda: fixed)
    assert assert_op(only_at_three, [((3, 2),), ((5, 2),)], ENGINE).passed


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        pytest.param((torch.relu, ((3,),), "onnxrutime"), MissingBackendError, "did you mean", id="unknown backend"),
        pytest.param((torch.relu, ((3,),), ferry.Target(ENGINE, "int8")), UnsupportedError, "int8", id="precision"),
        pytest.param((torch.relu, (3, 4)), InputError, r"case 1 \(3, 4\) of relu has no tensor", id="a bare shape"),
        pytest.param(
            (torch.relu, {"input": (3,)}), InputError, "do not fit forward", id="a keyword of a function in C"
        ),
        pytest.param((torch.relu, []), ConfigError, "compares nothing", id="no case"),
        pytest.param((torch.relu, ((3,),), []), ConfigError, "compares nothing", id="no backend"),
        pytest.param((torch.add, ((3,), (4,))), ModelError, r"add fails in PyTorch at case 1 \(", id="PyTorch refuses"),
        pytest.param((3, ((3,),)), ModelError, "must be a function", id="no operator"),
        pytest.param((Doubled, ((3,),)), ModelError, "give the apply of an autograd.Function", id="a class"),
    ],
)
def test_what_cannot_be_tested_is_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        assert_op(*arguments)


def test_a_case_has_the_same_values_alone_and_among_others():
    seen = []

    def fn(x):
        if not torch.compiler.is_exporting():
            seen.append(x.clone())
        return x + 1

    assert_op(fn, [((2, 3),), ((4, 3),)], ENGINE, seed=3)
    together = next(x for x in seen if x.shape == (4, 3))
    seen.clear()
    assert_op(fn, ((4, 3),), ENGINE, seed=3)
    assert torch.equal(seen[0], together)
    seen.clear()
    assert_op(fn, ((4, 3),), ENGINE, seed=4)
    assert not torch.equal(seen[0], together)
