"""Rewriters during ``ferry.export`` and ``ferry.deploy``: they act, are checked and listed, and leave no trace."""

import numpy as np
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import ConfigError, VerificationError
from torchferry.core.target import Target
from torchferry.rewrite import FunctionRewriter, ModuleRewriter


class Repeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.relu(self.linear(x)).sum(0).repeat(2)


@pytest.fixture
def functions():
    return FunctionRewriter()


@pytest.fixture
def modules():
    return ModuleRewriter()


def run(exported, tmp_path, x):
    with ferry.compile(exported, Target(), tmp_path / "engine").open() as session:
        (value,) = session.run({"x": x.numpy()}).values()
    return value


def codes(exported, severity=None):
    return [f.code for f in exported.report.findings if severity in (None, f.severity)]


def test_a_tensor_method_for_one_backend_only(functions):
    """A rewritten ``Tensor.repeat``: unsqueeze, repeat, squeeze for one engine; the original for all others."""

    @functions.register_rewriter(func_name="torch.Tensor.repeat", backend="tensorrt")
    def repeat_static(input, *size):  # noqa: A002 - its name in torch
        ctx = functions.get_context()
        if input.ndim == 1 and len(size) == 1:
            return ctx.origin_func(input.unsqueeze(0), 1, *size).squeeze(0)
        return ctx.origin_func(input, *size)

    before = torch.Tensor.repeat
    shapes = {}
    for backend in ("tensorrt", "onnxruntime"):
        exported = ferry.export(Repeats().eval(), torch.rand(4, 3), target=Target(backend), function_rewriter=functions)
        assert exported.rewrites == ({"torch.Tensor.repeat": 1} if backend == "tensorrt" else {})
        tiles = [node for node in exported.model.graph if node.op_type in ("Tile", "Expand")]
        shapes[backend] = {len(node.inputs[0].shape) for node in tiles}
    assert shapes == {"tensorrt": {2}, "onnxruntime": {1}}
    assert torch.Tensor.repeat is before


def test_each_rewriter_that_acted_was_compared_and_has_its_row(functions, tmp_path):
    @functions.register_rewriter("torch.relu")
    def relu(x):
        return torch.clamp(x, min=0)

    model, x = Repeats().eval(), torch.randn(4, 3)
    exported = ferry.export(model, x, function_rewriter=functions)
    row = exported.report.facts["rewriters"]["torch.relu"]
    assert row.startswith("applied")
    assert "1 call" in row
    assert "max abs 0 over 1 compared" in row
    assert __file__ in row
    assert not codes(exported, "error")
    assert "Relu" not in [node.op_type for node in exported.model.graph]
    np.testing.assert_allclose(run(exported, tmp_path, x), model(x).detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("replacement", "code", "says"),
    [
        (lambda x: torch.clamp(x, min=0) + 1e-2, "rewrite-differs", "expected"),
        (lambda x: torch.clamp(x, min=0).double().float().half().float(), "rewrite-differs", ""),
        (lambda x: x.clamp_(min=0), "rewrite-mutates-input", "x"),
    ],
    ids=["a constant off", "rounded", "in place"],
)
def test_a_rewriter_that_is_wrong_is_an_error_that_export_does_not_raise(functions, replacement, code, says):
    functions.register_rewriter("torch.relu")(replacement)
    exported = ferry.export(Repeats().eval(), torch.randn(64, 3), function_rewriter=functions)
    assert codes(exported, "error") == [code]
    finding = next(f for f in exported.report.findings if f.code == code)
    assert "torch.relu" in finding.message
    assert says in finding.message
    assert __file__ in finding.where
    with pytest.raises(VerificationError, match=r"torch\.relu"):
        exported.report.raise_for_failure()


def test_a_typo_names_the_nearest_name(functions):
    @functions.register_rewriter("torch.nn.functional.rellu")
    def relu(x):
        return x

    exported = ferry.export(Repeats().eval(), torch.rand(4, 3), function_rewriter=functions)
    finding = next(f for f in exported.report.findings if f.code == "rewriter-unknown")
    assert "torch.nn.functional.relu" in finding.hint
    assert exported.report.passed


def test_one_that_nothing_calls_is_said(functions):
    @functions.register_rewriter("torch.cdist")
    def cdist(a, b):
        return a

    exported = ferry.export(Repeats().eval(), torch.rand(4, 3), function_rewriter=functions)
    assert "rewriter-unused" in codes(exported, "info")


def test_two_that_fit_equally_well_are_refused_by_name(functions):
    for number in range(2):
        exec(f"def relu_{number}(x): return x", scope := {})
        functions.register_rewriter("torch.relu")(scope[f"relu_{number}"])
    with pytest.raises(ConfigError, match=r"relu_0[\s\S]*relu_1|relu_1[\s\S]*relu_0"):
        ferry.export(Repeats().eval(), torch.rand(4, 3), function_rewriter=functions)


def test_a_rewriter_sees_the_config_and_the_target(functions):
    seen = []

    @functions.register_rewriter("torch.relu", flavour="mint")
    def relu(ctx, x):
        seen.append((ctx.cfg, ctx.backend, ctx.target, ctx.flavour))
        return ctx.origin_func(x)

    ferry.export(Repeats().eval(), torch.rand(4, 3), cfg={"a": 1}, function_rewriter=functions)
    assert set(map(str, seen)) == {str(({"a": 1}, "onnxruntime", Target(), "mint"))}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.sigmoid(self.conv(x))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = Block()
        self.blocks = nn.Sequential(Block(), self.shared, nn.ModuleList([Block()])[0])

    def forward(self, x):
        return self.blocks(self.shared(x))


def test_every_instance_of_a_module_class_is_replaced_and_the_model_left_alone(modules, tmp_path):
    @modules.register_rewrite_module(f"{Block.__module__}.Block", backend="onnxruntime")
    class Gate(nn.Module):
        def __init__(self, module, cfg):
            super().__init__()
            self.conv = module.conv

        def forward(self, x):
            return 1 / (1 + torch.exp(-self.conv(x)))

    model, x = Tower().eval(), torch.rand(1, 3, 4, 4)
    before = list(model.modules())
    exported = ferry.export(model, x, module_rewriter=modules)
    assert list(model.modules()) == before
    assert exported.rewrites == {f"{Block.__module__}.Block": 3}
    operators = [node.op_type for node in exported.model.graph]
    assert "Sigmoid" not in operators
    assert operators.count("Exp") == 4
    assert {exported.provenance(n).module for n in exported.model.graph} >= {"shared", "blocks.0", "blocks.2"}
    assert exported.report.passed
    np.testing.assert_allclose(run(exported, tmp_path, x), model(x).detach().numpy(), rtol=1e-5)


def test_outputs_changed_on_purpose_are_proved_against_the_rewritten_model(functions, tmp_path, monkeypatch):
    monkeypatch.setattr("torchferry.rewrite.context.FUNCTION_REWRITER", functions)

    @functions.register_rewriter("torch.relu", changes_outputs=True)
    def relu(x):
        return x + 7

    model, x = Repeats().eval(), torch.randn(4, 3)
    shapes = {"x": {0: "n"}}
    exported = ferry.export(model, x, dynamic_shapes=shapes, function_rewriter=functions)
    assert exported.outputs_changed_by == ("torch.relu",)
    assert exported.report.passed
    assert exported.signature.dims["n"].min == 0
    assert not np.allclose(run(exported, tmp_path, x), model(x).detach().numpy())


def test_a_rewriter_that_breaks_an_export_that_worked_is_found_by_settling(functions):
    @functions.register_rewriter("torch.relu")
    def relu(ctx, x):
        return ctx.origin_func(x) if not torch.compiler.is_exporting() else x * 2

    exported = ferry.export(
        Repeats().eval(), torch.randn(4, 3), dynamic_shapes={"x": {0: "n"}}, function_rewriter=functions
    )
    assert codes(exported, "error") == ["graph-differs"]


def test_rewriters_stand_in_the_package(tmp_path):
    """Through the public registry, as a user's model file would have it."""

    @ferry.FUNCTION_REWRITER.register_rewriter("torch.special.expit", backend="reference")
    def expit(x):
        return torch.sigmoid(x)

    class Model(nn.Module):
        def forward(self, x):
            return torch.special.expit(x)

    source = ferry.Source(Model().eval(), torch.rand(2, 3), dynamic_shapes={"x": {0: "n"}})
    package = ferry.deploy(source, [Target("reference")], tmp_path / "package")
    assert package.manifest.rewrites == {"torch.special.expit": 1}
    assert "torch.special.expit" in (package.folder / "report.json").read_text()
    plain = ferry.deploy(source, [Target("onnxruntime")], tmp_path / "plain")
    assert plain.manifest.rewrites == {}
