"""Every rule of our own: it fires, it is right at sizes never exported, and torch's exporter still needs it."""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchferry as ferry
from torchferry.core.errors import TorchferryError
from torchferry.core.target import Target
from torchferry.rewrite import FUNCTION_REWRITER, FunctionRewriter, rules

MATRIX = {0: "n", 1: "m"}
ROWS = {0: "n"}
IMAGE = {0: "n", 2: "h", 3: "w"}
SEQUENCE = {0: "n", 1: "t"}


class Case(NamedTuple):
    rule: str
    function: object
    example: tuple[int, ...]
    dims: dict
    others: tuple[tuple[int, ...], ...]


def set_by_mask(x):
    x = x.clone()
    x[:, x[0] > 0.5] = 0.0
    return x


def per_sample_convolution(x):
    kernels = torch.ones(1, 2, 3, 3).repeat(x.shape[0], 1, 1, 1)
    return F.conv2d(x.reshape(1, -1, x.shape[2], x.shape[3]), kernels, groups=x.shape[0])


def scattered(x):
    return torch.zeros(x.shape[0], 3).scatter_add(1, torch.zeros(x.shape[0], 2, dtype=torch.long), x)


def grid(x):
    return F.affine_grid(torch.eye(2, 3)[None].repeat(x.shape[0], 1, 1), list(x.shape), align_corners=False)


def positive(x):
    return x.T @ x + torch.eye(5)


SIZES = ((6, 5), ((4, 7), (9, 2)))
PICTURES = ((1, 2, 7, 8), ((3, 2, 11, 5), (2, 2, 6, 13)))
CASES = [
    Case("adaptive_pool", lambda x: F.adaptive_avg_pool2d(x, (3, 3)), PICTURES[0], IMAGE, PICTURES[1]),
    Case("adaptive_pool", lambda x: F.adaptive_max_pool2d(x, (3, 2)), PICTURES[0], IMAGE, PICTURES[1]),
    Case("add", lambda x: ((x > 0.5) + (x > 0.2)).float(), SIZES[0], MATRIX, SIZES[1]),
    Case("affine_grid", grid, PICTURES[0], IMAGE, PICTURES[1]),
    Case("arange", lambda x: torch.arange(0.5, x.shape[0]), SIZES[0], MATRIX, SIZES[1]),
    Case("attention", lambda x: F.scaled_dot_product_attention(x, x, x), (4, 6, 5), SEQUENCE, ((2, 3, 5), (5, 9, 5))),
    Case("cdist", lambda x: torch.cdist(x, x + 1), SIZES[0], MATRIX, SIZES[1]),
    Case("conv", per_sample_convolution, (3, 2, 7, 8), IMAGE, ((5, 2, 9, 6), (2, 2, 6, 13))),
    Case("cumulative", lambda x: torch.cumprod(x, 1), SIZES[0], MATRIX, SIZES[1]),
    Case("cumulative", lambda x: torch.cummax(x, 1)[0], SIZES[0], MATRIX, SIZES[1]),
    Case("fill_diagonal", lambda x: x.clone().fill_diagonal_(2.0), SIZES[0], MATRIX, SIZES[1]),
    Case("hypot", lambda x: torch.hypot(x, x + 1), SIZES[0], MATRIX, SIZES[1]),
    Case(
        "interpolate",
        lambda x: F.interpolate(x, scale_factor=0.6, mode="bilinear", antialias=True),
        PICTURES[0], IMAGE, PICTURES[1],
    ),
    Case("linalg_solve", lambda x: torch.linalg.solve(positive(x), torch.ones(5, 2)), (6, 5), ROWS, ((4, 5), (9, 5))),
    Case("linalg_solve", lambda x: torch.linalg.inv(positive(x)), (6, 5), ROWS, ((4, 5), (9, 5))),
    Case("linspace", lambda x: torch.linspace(0, 1, x.shape[0]), SIZES[0], MATRIX, SIZES[1]),
    Case("masked_select", lambda x: x.masked_select(x > 0.5), SIZES[0], MATRIX, SIZES[1]),
    Case("median", lambda x: x.median(1)[0], SIZES[0], MATRIX, SIZES[1]),
    Case("median", lambda x: x.kthvalue(2, 1)[0], (6, 5), ROWS, ((4, 5), (9, 5))),
    Case("new_tensor", lambda x: x.new_tensor([x.shape[0], x.shape[1]]), SIZES[0], MATRIX, SIZES[1]),
    Case("new_tensor", lambda x: torch.as_tensor([x.shape[0], x.shape[1]]) * 2, SIZES[0], MATRIX, SIZES[1]),
    Case(
        "one_hot",
        lambda x: F.one_hot(torch.arange(x.shape[0]), x.shape[0]).float() @ x,
        SIZES[0], MATRIX, SIZES[1],
    ),
    Case("pool", lambda x: F.avg_pool2d(x, x.shape[2:]), PICTURES[0], IMAGE, PICTURES[1]),
    Case("pool", lambda x: F.avg_pool2d(x, 2, divisor_override=3), PICTURES[0], IMAGE, PICTURES[1]),
    Case("pool", lambda x: F.max_pool2d(x, x.shape[2:]), PICTURES[0], IMAGE, PICTURES[1]),
    Case("recurrent", nn.LSTM(5, 4, batch_first=True), (2, 6, 5), SEQUENCE, ((3, 2, 5), (1, 9, 5))),
    Case("recurrent", nn.GRU(5, 4, batch_first=True, bidirectional=True), (2, 6, 5), SEQUENCE, ((3, 2, 5), (1, 9, 5))),
    Case("remainder", lambda x: torch.arange(10) % x.shape[0], SIZES[0], MATRIX, SIZES[1]),
    Case("repeat_interleave", lambda x: x.repeat_interleave(x.shape[1], 0), SIZES[0], MATRIX, SIZES[1]),
    Case("roll", lambda x: torch.roll(x, x.shape[1] // 2, 1), SIZES[0], MATRIX, SIZES[1]),
    Case("roll", lambda x: torch.fft.fftshift(x, (1,)), SIZES[0], MATRIX, SIZES[1]),
    Case("scatter", scattered, (6, 5), ROWS, ((4, 5), (9, 5))),
    Case("searchsorted", lambda x: torch.searchsorted(torch.arange(6.0) / 6, x), SIZES[0], MATRIX, SIZES[1]),
    Case("searchsorted", lambda x: torch.isin((x * 4).long(), torch.tensor([1, 2])), SIZES[0], MATRIX, SIZES[1]),
    Case("setitem", set_by_mask, SIZES[0], MATRIX, SIZES[1]),
    Case("split", lambda x: x.chunk(2, 0)[0] + 1, SIZES[0], MATRIX, SIZES[1]),
    Case("take_along_dim", lambda x: torch.take_along_dim(x, x.argsort(1), 1), SIZES[0], MATRIX, SIZES[1]),
]  # fmt: skip


def model_of(function) -> nn.Module:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = function if isinstance(function, nn.Module) else None

        def forward(self, x):
            result = function(x)
            return result[0] if self.inner is not None else result

    return Model().eval()


def answers(case, tmp_path, registry=None):
    """Export, then run at every size; return the exported graph and (PyTorch's, the engine's) for each size."""
    model = model_of(case.function)
    example = torch.rand(case.example)
    exported = ferry.export(model, example, dynamic_shapes={"x": case.dims}, function_rewriter=registry)
    exported.report.raise_for_failure()
    engine = ferry.compile(exported, Target(), tmp_path / "engine")
    pairs = []
    with engine.open() as session:
        for shape in (case.example, *case.others):
            x = torch.rand(shape)
            (got,) = session.run({"x": x.numpy()}).values()
            pairs.append((model(x).detach().numpy(), got))
    return exported, pairs


def assert_right(pairs):
    for want, got in pairs:
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def names(case):
    return {
        row for row in ferry.rewriters.explain().rows if row.replacement.startswith(f"{rules.__name__}.{case.rule}.")
    }


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}-{place}" for place, case in enumerate(CASES)])
class TestRule:
    def test_it_fires_once_and_is_right_at_sizes_never_exported(self, case, tmp_path):
        exported, pairs = answers(case, tmp_path)
        own = {row.name for row in names(case)}
        assert own & exported.rewrites.keys() or case.rule == "arange"  # which only adds an argument
        assert_right(pairs)

    def test_without_it_the_export_fails_or_is_wrong(self, case, tmp_path):
        with pytest.raises((TorchferryError, AssertionError)):
            assert_right(answers(case, tmp_path, FunctionRewriter())[1])


def test_every_rule_has_a_case():
    modules = {module.name for module in pkgutil.iter_modules(rules.__path__) if not module.name.startswith("_")}
    assert modules == {case.rule for case in CASES}


@pytest.mark.parametrize("rule", sorted({case.rule for case in CASES}))
def test_every_rule_says_what_it_does_what_happens_without_it_and_when_it_declines(rule):
    module = importlib.import_module(f"{rules.__name__}.{rule}")
    registered = {
        record.replacement for record in FUNCTION_REWRITER.records() if record.replacement.__module__ == module.__name__
    }
    assert registered
    for replacement in registered:
        assert "→" in replacement.__doc__
        assert "Without it:" in replacement.__doc__
        assert "Declines:" in replacement.__doc__


def test_the_reference_page_lists_exactly_what_is_registered():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "rules.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[1])}
    registered = {r.name for r in FUNCTION_REWRITER.records() if r.replacement.__module__.startswith(rules.__name__)}
    assert listed == registered
    assert {re.findall(r"`([^`]+)`", row)[0] for row in rows} == {case.rule for case in CASES}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.avg_pool2d(x, 2) + F.max_pool2d(x, 2),
        lambda x: F.conv2d(x, torch.ones(2, 2, 3, 3)).repeat_interleave(2, 0).roll(1, 1),
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic") + 1,
        lambda x: torch.cat(x.split(1, 1)) + torch.arange(3)[1],
    ],
)
def test_where_the_exporter_is_right_the_rules_leave_the_call_to_it(function):
    exported = ferry.export(model_of(function), torch.rand(1, 2, 8, 8))
    assert exported.rewrites == {}


def test_a_method_of_tensor_that_calls_its_base_does_not_recurse(tmp_path):
    """``Tensor.unflatten`` is Python that calls the C method of the same name, as attention layers do."""
    exported, pairs = answers(Case("", lambda x: x.unflatten(1, (5, 1)) + 1, (6, 5), ROWS, ((4, 5),)), tmp_path)
    assert exported.rewrites == {}
    assert_right(pairs)
