"""Rewriters are compared with what they replace, and the log says what became of each."""

import dataclasses
import inspect

import pytest
import rewrite_samples as samples
import torch
from torch import nn
from torch.nn import functional

from torchferry.core.report import Report
from torchferry.rewrite import FunctionRewriter, ModuleRewriter, RewriteLog, RewriterContext

HERE = __name__
X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def rewriters():
    return FunctionRewriter()


def checked(rewriters, call, name=None, *, check=True, **kwargs):
    """Call with rewriters that are checked; return the log."""
    with RewriterContext(
        check=check, function_rewriter=rewriters, module_rewriter=ModuleRewriter(), **kwargs
    ) as active:
        call()
    return active.log


def pair(x):
    return x + 1, x + 2


def inplace(x):
    return x.mul_(2)


def fails(x):
    raise ZeroDivisionError("cannot do it")


def nothing(x):
    return {"a": [x * 2, None], "n": 3, "s": "text"}


@pytest.mark.parametrize(
    ("name", "replacement", "call"),
    [
        ("torch.relu", lambda x: x.clamp(min=0), lambda: torch.relu(X)),
        ("torch.nn.functional.softmax", lambda x, d: x.exp() / x.exp().sum(d, True), lambda: functional.softmax(X, 1)),
        (f"{HERE}.pair", lambda x: (1 + x, 2 + x), lambda: pair(X)),
        (f"{HERE}.nothing", lambda x: {"a": [x + x, None], "n": 3, "s": "text"}, lambda: nothing(X)),
        (f"{HERE}.inplace", lambda x: x.add_(x), lambda: inplace(X.clone())),
        ("torch.nn.functional.dropout", lambda ctx, x: ctx.origin_func(x) + 0, lambda: functional.dropout(X)),
        ("torch.Tensor.half", lambda ctx, x: x.to(torch.float16), X.half),
        ("torch.Tensor.bfloat16", lambda ctx, x: x.to(torch.bfloat16), X.bfloat16),
        ("torch.fft.fft", lambda x: torch.fft.ifft(x, norm="forward").conj(), lambda: torch.fft.fft(X)),
        ("torch.Tensor.size", lambda ctx, x: torch.Size(list(x.shape)), X.size),
        ("torch.Tensor.shape", lambda ctx, x: torch.Size(list(ctx.origin_func(x))), lambda: X.shape),
        ("torch.zeros", lambda ctx, *size: ctx.origin_func(*size) * 2, lambda: torch.zeros(2, 3)),
    ],
)  # fmt: skip
def test_one_that_agrees(name, replacement, call, rewriters):
    rewriters.register_rewriter(name)(replacement)
    log = checked(rewriters, call)
    (row,) = log.rows
    assert (row.status, row.calls, row.compared, row.problems) == ("applied", 1, 1, ())
    assert row.max_abs < 1e-5
    assert log.findings() == ()


WRONG = {
    "values": ("torch.relu", lambda x: x, lambda: torch.relu(X), "rewrite-differs",
               "differs from the original: 6 of 12 elements, worst at (0, 0): expected 0, got -1"),
    "shape": ("torch.relu", lambda x: torch.nn.functional.gelu(x)[None], lambda: torch.relu(X), "rewrite-differs",
              "shape (1, 3, 4), expected (3, 4)"),
    "dtype": ("torch.relu", lambda x: x.clamp(min=0).double(), lambda: torch.relu(X), "rewrite-differs",
              "dtype torch.float64, expected torch.float32"),
    "second output": (f"{HERE}.pair", lambda x: (x + 1, x), lambda: pair(X), "rewrite-differs",
                      "differs from the original in output 1: "),
    "a number": (f"{HERE}.nothing", lambda x: {"a": [x * 2, None], "n": 4, "s": "text"}, lambda: nothing(X),
                 "rewrite-differs", "differs from the original in output 2: 1 of 1 elements, worst at (): expected 3"),
    "a text": (f"{HERE}.nothing", lambda x: {"a": [x * 2, None], "n": 3, "s": "txt"}, lambda: nothing(X),
               "rewrite-differs", "differs from the original in output 3: 'txt', expected 'text'"),
    "list for tuple": (f"{HERE}.pair", lambda x: [x + 1, x + 2], lambda: pair(X), "rewrite-structure",
                       "returns list[Tensor, Tensor], the original tuple[Tensor, Tensor]"),
    "too few": (f"{HERE}.pair", lambda x: x + 1, lambda: pair(X), "rewrite-structure",
                "returns Tensor, the original tuple[Tensor, Tensor]"),
    "None": ("torch.relu", lambda x: None, lambda: torch.relu(X), "rewrite-structure",
             "returns None, the original Tensor"),
    "a number for a tensor": ("torch.sum", lambda x: 0.5, lambda: torch.sum(X), "rewrite-structure",
                              "returns float, the original Tensor"),
    "other keys": (f"{HERE}.nothing", lambda x: {"a": [x * 2, None]}, lambda: nothing(X), "rewrite-structure",
                   "returns dict[a: list[Tensor, None]], the original dict[a: list[Tensor, None], n: int, s: str]"),
    "in place": ("torch.relu", lambda x: x.clamp_(min=0), lambda: torch.relu(X.clone()), "rewrite-mutates-input",
                 "leaves argument [0] changed, unlike the original: 6 of 12 elements"),
    "not in place": (f"{HERE}.inplace", lambda x: x * 2, lambda: inplace(X.clone()), "rewrite-mutates-input",
                     "leaves argument [0] changed, unlike the original"),
    "keyword in place": ("torch.relu", lambda **k: k["input"].relu_(), lambda: torch.relu(input=X.clone()),
                         "rewrite-mutates-input", "leaves argument ['input'] changed"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_one_that_is_wrong(what, rewriters):
    name, replacement, call, code, message = WRONG[what]
    rewriters.register_rewriter(name)(replacement)
    log = checked(rewriters, call)
    (finding,) = log.findings()
    assert (finding.severity, finding.code) == ("error", code)
    assert message in finding.message
    assert f"'{name}'" in finding.message
    assert log.rows[0].file in finding.where
    assert f"called at {call.__code__.co_filename}:{call.__code__.co_firstlineno}" in finding.where
    assert not Report("export", log.findings()).passed


def test_one_that_is_meant_to_differ(rewriters):
    rewriters.register_rewriter("torch.relu", changes_outputs=True)(lambda x: x)
    log = checked(rewriters, lambda: torch.relu(X))
    (finding,) = log.findings()
    assert (finding.severity, finding.code) == ("info", "rewriter-not-compared")
    assert "declared to change outputs" in finding.message
    assert log.rows[0].max_abs is None


def test_only_where_it_is_asked_for(rewriters):
    rewriters.register_rewriter("torch.relu")(lambda x: x)
    log = checked(rewriters, lambda: torch.relu(X), check=False)
    assert (log.rows[0].compared, log.findings()) == (0, ())


def test_the_original_may_be_what_fails(rewriters):
    rewriters.register_rewriter(f"{HERE}.fails")(lambda x: x)
    log = checked(rewriters, lambda: fails(X))
    (finding,) = log.findings()
    assert (finding.severity, finding.code) == ("info", "rewriter-not-compared")
    assert "the original raises ZeroDivisionError: cannot do it" in finding.message


def test_what_cannot_be_compared(rewriters):
    rewriters.register_rewriter("rewrite_samples.steps")(lambda ctx, x: iter(list(ctx.origin_func(x))))
    log = checked(rewriters, lambda: list(samples.steps(1.0)))
    assert "an iterator can be read only once" in log.findings()[0].message
    rewriters = FunctionRewriter()
    rewriters.register_rewriter("torch.relu")(lambda x: x * 1)
    log = checked(rewriters, lambda: torch.relu(torch.empty(2, device="meta")))
    assert "no values in a tensor without data" in log.findings()[0].message


def test_nothing_is_compared_while_exporting(rewriters):
    rewriters.register_rewriter("torch.relu")(lambda x: x * 2)
    log = checked(rewriters, lambda: torch.export.export(nn.ReLU(), (X,)))
    assert (log.rows[0].calls, log.rows[0].compared) == (1, 0)


def test_what_is_compared_is_not_counted(rewriters):
    """The original is run once more for a comparison; what it calls is rewritten there too, and not blamed."""
    rewriters.register_rewriter("rewrite_samples.scaled")(lambda ctx, x: torch.relu(ctx.origin_func(torch.relu(x))))
    rewriters.register_rewriter("torch.relu")(lambda ctx, x: ctx.origin_func(x) + 1)
    rewriters.register_rewriter("rewrite_samples.with_default_argument")(lambda ctx, x: ctx.origin_func(x))
    log = checked(rewriters, lambda: samples.with_default_argument(X.abs()))
    assert {row.name: row.calls for row in log.rows} == {
        "rewrite_samples.scaled": 1,
        "torch.relu": 2,
        "rewrite_samples.with_default_argument": 1,
    }


def test_only_the_one_that_is_wrong_is_blamed(rewriters):
    rewriters.register_rewriter("rewrite_samples.with_default_argument")(lambda ctx, x: samples.scaled(x))
    rewriters.register_rewriter("rewrite_samples.scaled")(lambda ctx, x: x)
    log = checked(rewriters, lambda: samples.with_default_argument(X))
    assert [bool(row.problems) for row in log.rows] == [False, True]


def test_the_result_and_the_inputs_are_the_rewriters(rewriters):
    rewriters.register_rewriter(f"{HERE}.inplace")(lambda x: x.add_(5))
    x = torch.zeros(2)

    def call():
        assert inplace(x) is x
        assert x.tolist() == [5.0, 5.0]

    checked(rewriters, call)


def test_every_call_counts_and_the_first_problem_is_kept(rewriters):
    rewriters.register_rewriter("torch.relu")(lambda x: x if x.sum() < 0 else x.clamp(min=0))

    def call():
        for value in (1.0, -1.0, -2.0):
            torch.relu(torch.tensor([value]))
        torch.relu(torch.tensor([0.0]))

    (row,) = checked(rewriters, call).rows
    line = inspect.getsourcelines(call)[1]
    assert row.sites == ((f"{__file__}:{line + 2}", 3), (f"{__file__}:{line + 3}", 1))
    assert (row.calls, row.compared, row.max_abs) == (4, 4, 2.0)
    assert "expected 0, got -1" in row.problems[0][1]


def test_calls_that_are_left_to_the_original(rewriters):
    rewriters.register_rewriter("torch.relu")(lambda ctx, x: ctx.origin_func(x) if x.dim() > 1 else x.clamp(min=0))
    rewriters.register_rewriter("torch.sin")(lambda ctx, x: ctx.origin_func(x))

    def call():
        torch.relu(X)
        torch.relu(X[0])
        torch.sin(X)

    log = checked(rewriters, call)
    assert [(row.status, row.calls, row.left) for row in log.rows] == [("applied", 2, 1), ("left", 1, 1)]
    assert "it left every call to the original" in str(log)


def test_a_line_of_the_model_not_of_torch_or_a_rewriter(rewriters):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x)

    rewriters.register_rewriter("torch.nn.ReLU.forward")(lambda self, x: torch.relu(x))
    rewriters.register_rewriter("torch.relu")(lambda x: x.clamp(min=0))
    line = inspect.getsourcelines(Model.forward)[1] + 1
    for call in (lambda: Model()(X), lambda: torch.export.export(Model(), (X,))):
        log = checked(rewriters, call, check=False)
        assert [row.sites for row in log.rows] == [((f"{__file__}:{line}", 1),)] * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lines_and_counts_under_strict_export(rewriters):
    class Model(nn.Module):
        def forward(self, x):
            x = torch.relu(samples.scaled(x))
            return x + 1 if x.sum() is not None else x

    rewriters.register_rewriter("rewrite_samples.scaled")(lambda x: x)
    rewriters.register_rewriter("torch.relu")(lambda x: x.clamp(min=0))
    line = inspect.getsourcelines(Model.forward)[1] + 1
    log = checked(rewriters, lambda: torch.export.export(Model(), (X,), strict=True), check=False)
    assert [row.sites for row in log.rows] == [((f"{__file__}:{line}", 1),)] * 2


def test_an_export_log_takes_the_comparisons_of_another(rewriters):
    rewriters.register_rewriter("torch.relu")(lambda x: x)
    rewriters.register_rewriter("torch.sin", backend="other")(lambda x: x)
    checks = checked(rewriters, lambda: torch.relu(X))

    def export():
        torch.export.export(nn.Sequential(nn.ReLU(), nn.ReLU()), (X,))

    log = checked(rewriters, export, check=False)
    assert log.findings() == ()
    both = log.with_checks(checks)
    assert [row.calls for row in both.rows] == [2, 0]
    assert [f.code for f in both.findings()] == ["rewrite-differs"]
    assert both.rows[1] == log.rows[1]
    (finding,) = log.with_checks(checked(rewriters, lambda: None)).findings()
    assert (finding.severity, finding.code) == ("info", "rewriter-not-compared")
    assert "nothing called it where calls are compared" in finding.message


class Doubling(nn.Module):
    def __init__(self, module, cfg):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) * (1 if x.sum() > 100 else 2)


@pytest.mark.parametrize("changes_outputs", [False, True])
def test_modules_are_compared_too(changes_outputs):
    modules = ModuleRewriter()
    modules.register_rewrite_module("torch.nn.ReLU", changes_outputs=changes_outputs)(Doubling)
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    with RewriterContext(
        model=model, check=True, function_rewriter=FunctionRewriter(), module_rewriter=modules
    ) as active:
        assert torch.equal(active.model(X), torch.relu(X) * 4)
    (row,) = active.log.rows
    assert (row.status, row.calls, row.sites) == ("applied", 2, (("0", 1), ("1", 1)))
    if changes_outputs:
        assert (row.compared, row.problems) == (0, ())
    else:
        assert (row.compared, row.max_abs) == (2, 2.0)
        (finding,) = active.log.findings()
        assert (finding.severity, finding.code) == ("error", "rewrite-differs")


def test_the_log_can_be_read(rewriters):
    rewriters.register_rewriter("torch.relu")(lambda x: x.clamp(min=0))
    log = checked(rewriters, lambda: [torch.relu(X), torch.relu(X)])
    (row,) = log.rows
    expected = f"applied  torch.relu -> {row.replacement} ({row.file}): 2 calls, max abs 0 over 2 compared"
    assert str(log) == expected
    assert log.applied() == (row,)
    assert str(RewriteLog()) == "no rewriter is registered"
    assert dataclasses.asdict(log)["rows"][0]["name"] == "torch.relu"
