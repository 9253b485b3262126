"""The cases that the rewriters exist for, and what other tools are known to get wrong."""

import pytest
import rewrite_cases as cases
import torch
from torch import nn
from torch.nn import functional

from torchferry.rewrite import FunctionRewriter, LibVersionChecker, ModuleRewriter, RewriterContext, patch_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def graph(program):
    return [node.target._opname for node in program.graph.nodes if node.op == "call_function"]


class Repeat(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, x):
        return x.repeat(*self.sizes)


@pytest.fixture
def repeat_rewriters():
    rewriters = FunctionRewriter()

    @rewriters.register_rewriter(func_name="torch.Tensor.repeat", backend="tensorrt")
    def repeat_static(x, *size):
        ctx = rewriters.get_context()
        if x.dim() == 1 and len(size) == 1:
            return ctx.origin_func(x.unsqueeze(0), 1, *size).squeeze(0)
        return ctx.origin_func(x, *size)

    return rewriters


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("backend", "shape", "sizes", "expected"),
    [
        ("tensorrt", (3,), (2,), ["unsqueeze", "repeat", "squeeze"]),
        ("tensorrt", (3,), (2, 2), ["repeat"]),
        ("tensorrt", (1, 3), (2, 2), ["repeat"]),
        ("onnxruntime", (3,), (2,), ["repeat"]),
        ("default", (3,), (2,), ["repeat"]),
    ],
)
def test_case_1_a_rewritten_tensor_method(backend, shape, sizes, expected, strict, repeat_rewriters):
    model, x = Repeat(*sizes), torch.rand(shape)
    before = dict(vars(torch.Tensor))
    with RewriterContext(backend=backend, check=True, function_rewriter=repeat_rewriters) as active:
        result = model(x)
        program = torch.export.export(model, (x,), strict=strict)
    assert graph(program) == expected
    assert torch.equal(result, x.repeat(*sizes))
    assert torch.equal(program.module()(x), result)
    assert not any(finding.severity == "error" for finding in active.log.findings())
    assert graph(torch.export.export(model, (x,))) == ["repeat"]
    assert dict(vars(torch.Tensor)) == before


@pytest.fixture
def srcnn_rewriters():
    rewriters = ModuleRewriter()

    @rewriters.register_rewrite_module("rewrite_cases.SRCNN", backend="tensorrt", changes_outputs=True)
    class SRCNNWrapper(nn.Module):
        def __init__(self, module, cfg, channels=(3, 64, 32, 3), kernel_sizes=(9, 1, 5), upscale_factor=4):
            super().__init__()
            self._module = module
            self.arguments = cfg, channels, kernel_sizes, upscale_factor
            module.upsampler = nn.Identity()

        def forward(self, *args, **kwargs):
            return self._module(*args, **kwargs)

        def init_weights(self, *args, **kwargs):
            return self._module.init_weights(*args, **kwargs)

    return rewriters


@pytest.mark.parametrize("lasting", [False, True])
def test_case_2_a_rewritten_module(lasting, srcnn_rewriters):
    model = cases.Restorer().eval()
    x, cfg = torch.rand(1, 3, 8, 8), {"onnx_config": {}}
    expected, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"upscale_factor": 2, "kernel_sizes": (9, 1, 5), "unrelated": 1}
    if lasting:
        rewritten = patch_model(model, cfg, backend="tensorrt", module_rewriter=srcnn_rewriters, **arguments)
        result = rewritten(x)
    else:
        with RewriterContext(cfg, "tensorrt", model=model, module_rewriter=srcnn_rewriters, **arguments) as active:
            rewritten = active.model
            result = rewritten(x)
        assert active.log.rows[-1].sites == (("generator", 1),)
    wrapper = rewritten.generator
    assert type(wrapper).__name__ == "SRCNNWrapper"
    assert wrapper.arguments == (cfg, (3, 64, 32, 3), (9, 1, 5), 2)
    assert wrapper.init_weights() == "initialised"
    assert result.shape == (1, 3, 8, 8)
    # The user's model is what it was.
    assert type(model.generator) is cases.SRCNN
    assert isinstance(model.generator.upsampler, nn.Upsample)
    assert torch.equal(model(x), expected)
    assert expected.shape == (1, 3, 24, 24)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("backend", ["default", "openvino"])
def test_case_2_for_other_backends(backend, srcnn_rewriters):
    model = cases.Restorer()
    with RewriterContext(backend=backend, model=model, module_rewriter=srcnn_rewriters) as active:
        assert type(active.model.generator) is cases.SRCNN
    assert type(patch_model(model, None, backend, module_rewriter=srcnn_rewriters).generator) is cases.SRCNN


@pytest.mark.parametrize("name", ["torch.relu", "torch.nn.functional.relu", "torch.nn.ReLU.forward"])
def test_a_doubled_relu_is_doubled_once(name):
    """Not 16-fold, as where a rewriter fires again in every round of torch.onnx.export."""
    rewriters = FunctionRewriter()
    rewriters.register_rewriter(name)(lambda ctx, *args, **kwargs: ctx.origin_func(*args, **kwargs) * 2)
    with RewriterContext(function_rewriter=rewriters, module_rewriter=ModuleRewriter()):
        program = torch.onnx.export(nn.ReLU(), (torch.rand(3),), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph] == ["Relu", "Mul"]
    assert [float(v.const_value.numpy()) for v in program.model.graph.initializers.values()] == [2.0]


def test_a_version_check_of_torch_itself():
    rewriters = FunctionRewriter()
    checker = LibVersionChecker("torch", min_version="1.0")
    rewriters.register_rewriter("torch.relu", extra_checkers=checker)(lambda x: "new")
    with RewriterContext(function_rewriter=rewriters):
        assert functional.relu(torch.rand(1)) == "new"


def test_contexts_in_contexts_do_not_recurse():
    rewriters = FunctionRewriter()
    rewriters.register_rewriter("torch.relu")(lambda ctx, x: ctx.origin_func(x) + 1)
    x, contexts = torch.zeros(1), [RewriterContext(function_rewriter=rewriters) for _ in range(5)]
    for context in contexts:
        context.__enter__()
        assert torch.relu(x).tolist() == [1.0]
    for context in reversed(contexts):
        assert torch.relu(x).tolist() == [1.0]
        context.__exit__(None, None, None)
    assert torch.relu(x).tolist() == [0.0]
