"""Symbolic functions in the ways that people wrote them for torch's TorchScript-based exporter."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.onnx import symbolic_helper

import torchferry as ferry
from torchferry.rewrite import SymbolicRewriter

# torch.export warns of torch's own use of what it deprecates; a domain that nobody registered cannot be inferred.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def registered(name, symbolic, **kwargs):
    rewriter = SymbolicRewriter()
    rewriter.register_symbolic(name, is_pytorch=True, **kwargs)(symbolic)
    return rewriter


def node_of(exported, op_type):
    (node,) = (node for node in exported.model.graph if node.op_type == op_type)
    return node


def constant(value):
    return ir.convenience.get_const_tensor(value).numpy().tolist()


def test_a_list_of_numbers_is_one_constant_input():
    symbolics = registered("adaptive_avg_pool2d", lambda g, x, size: g.op("own::Pool", x, size))
    exported = ferry.export(
        Of(lambda x: functional.adaptive_avg_pool2d(x, (2, 3))),
        (torch.zeros(1, 2, 8, 9),),
        symbolic_rewriter=symbolics,
    )
    assert constant(node_of(exported, "Pool").inputs[1]) == [2, 3]


def test_a_list_with_a_dynamic_size_is_still_a_list():
    def symbolic(g, x, shape):
        assert symbolic_helper._is_packed_list(shape)
        parts = [symbolic_helper._unsqueeze_helper(g, size, [0]) for size in symbolic_helper._unpack_list(shape)]
        return g.op("Reshape", x, g.op("Concat", *parts, axis_i=0))

    exported = ferry.export(
        Of(lambda x: x.reshape(x.shape[0], 6)),
        (torch.zeros(4, 2, 3),),
        dynamic_shapes={"x": {0: "n"}},
        symbolic_rewriter=registered("reshape", symbolic),
    )
    assert str(exported.model.graph.outputs[0].shape) == "[n,6]"


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda x: x / 4, "div"), (lambda x: x - 4, "sub"), (lambda x: x.clamp(4, 9), "clamp"), (lambda x: x**4, "pow")],
    ids=["div", "sub", "clamp", "pow"],
)
def test_a_number_is_a_constant_though_torch_casts_it(function, name):
    def symbolic(g, x, value, *_):
        return g.op("own::Op", x, value_f=symbolic_helper._get_const(value, "f", "value"))

    exported = ferry.export(Of(function), (torch.zeros(3),), symbolic_rewriter=registered(name, symbolic))
    assert node_of(exported, "Op").attributes["value"].as_float() == 4


def test_the_context_may_be_asked_for_by_name():
    rewriter = SymbolicRewriter()

    @rewriter.register_symbolic("squeeze", is_pytorch=True)
    def squeeze(g, x, dim):
        axis = rewriter.get_context("squeeze").cfg["axis"]
        return g.op("own::Squeeze", x, axis_i=axis)

    exported = ferry.export(
        Of(lambda x: x.squeeze(1)), (torch.zeros(2, 1),), symbolic_rewriter=rewriter, cfg={"axis": 7}
    )
    assert node_of(exported, "Squeeze").attributes["axis"].as_int() == 7


def test_what_one_call_is_known_of_does_not_reach_the_next():
    def short(g, x, *_):
        for number in range(8):
            g.op("Constant", value_t=torch.tensor(float(number)))
        return g.op("Identity", x)

    def long(g, x, *_):
        flat = g.op("Reshape", x, g.op("Constant", value_t=torch.tensor([0, -1])))
        own = g.op("own::Same", flat, flat, flat, flat)
        return g.op("Reshape", own, g.op("Shape", x))

    symbolics = SymbolicRewriter()
    symbolics.register_symbolic("tanh", is_pytorch=True)(short)
    symbolics.register_symbolic("sigmoid", is_pytorch=True)(long)
    exported = ferry.export(
        Of(lambda x: x.tanh().sigmoid()),
        (torch.zeros(2, 3, 4),),
        dynamic_shapes={"x": {0: "n"}},
        symbolic_rewriter=symbolics,
    )
    assert [node.op_type for node in exported.model.graph if node.domain == "own"] == ["Same"]
    assert str(exported.model.graph.outputs[0].shape) == "[n,3,4]"


def test_helpers_that_torch_has_dropped_are_there_while_a_symbolic_runs():
    def symbolic(g, x):
        from torch.onnx.symbolic_opset9 import _cast_Long

        one = g.op("Constant", value_t=torch.tensor([5]))
        return g.op("own::Op", _cast_Long(g, x, False), value_i=int(one.node()["value"]))

    exported = ferry.export(Of(torch.tanh), (torch.zeros(3),), symbolic_rewriter=registered("tanh", symbolic))
    assert node_of(exported, "Op").attributes["value"].as_int() == 5
    assert not hasattr(torch._C.Node, "__getitem__")


def maximum(g, x, dim, keepdim):
    axis = symbolic_helper._get_const(dim, "i", "dim")
    return g.op("ReduceMax", x, axes_i=[axis], keepdims_i=0), None


def test_none_stands_for_an_output_that_nobody_uses():
    model, x = Of(lambda x: x.max(1)[0]), torch.rand(3, 4)
    exported = ferry.export(model, (x,), symbolic_rewriter=registered("max.dim", maximum))
    session = onnxruntime.InferenceSession(ir.to_proto(exported.model).SerializeToString())
    np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], model(x).numpy())


def test_none_for_an_output_that_is_used_is_refused():
    with pytest.raises(ferry.TorchferryError, match="gives None for output 1, which is used"):
        ferry.export(Of(lambda x: x.max(1)[1]), (torch.rand(3, 4),), symbolic_rewriter=registered("max.dim", maximum))


def compiled(*tensors):
    """Stand for code in C++: it needs memory, which fake tensors have not."""
    for tensor in tensors:
        tensor.detach().numpy()


class Conv(torch.autograd.Function):
    """A convolution in C++ whose sizes Python works out."""

    @staticmethod
    def symbolic(g, x, weight, stride):
        return g.op("own::Conv", x, weight, stride_i=stride)

    @staticmethod
    def forward(ctx, x, weight, stride):
        out = x.new_zeros([int((n - 1) // stride + 1) if axis > 1 else int(n) for axis, n in enumerate(x.shape)])
        compiled(x, weight, out)
        return out


class Block(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride
        self.first, self.norm, self.last = nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.last(self.norm(Conv.apply(x, self.last.weight, self.stride)).relu())
        return x + y if self.stride == 1 else y


@pytest.mark.parametrize("dynamic", [{}, {0: "n", 2: "h"}], ids=["static", "dynamic"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_sizes_of_compiled_code_are_measured_so_that_layers_may_follow(dynamic, stride):
    exported = ferry.export(Block(stride), (torch.zeros(2, 4, 16, 16),), dynamic_shapes={"x": dynamic})
    batch, channels, height, width = exported.model.graph.outputs[0].shape
    assert (channels, width) == (4, 8 // stride)
    if dynamic:
        assert str(batch) == "n"
        assert "h" in str(height)
    else:
        assert (batch, height) == (2, 8 // stride)


class Positive(torch.autograd.Function):
    """As many rows as there are positive numbers, found in C++."""

    @staticmethod
    def symbolic(g, x):
        return g.op("own::Positive", x)

    @staticmethod
    def forward(ctx, x):
        compiled(x)
        return x[x.sum(1) > 0]


def test_a_size_that_depends_on_the_data_is_left_unknown():
    exported = ferry.export(Of(Positive.apply), (torch.tensor([[1.0], [-1.0], [2.0]]),))
    rows, columns = exported.model.graph.outputs[0].shape
    assert not isinstance(rows, int)
    assert columns == 1


class Random(torch.autograd.Function):
    """Boxes of which forward makes up the number."""

    @staticmethod
    def symbolic(g, boxes, scores):
        limit = g.op("Constant", value_t=torch.tensor([10]))
        return g.op("NonMaxSuppression", boxes, scores, limit)

    @staticmethod
    def forward(ctx, boxes, scores):
        return torch.zeros(int(np.random.randint(1, 10**6)), 3, dtype=torch.int64)  # noqa: NPY002


def test_a_size_that_forward_makes_up_is_left_unknown():
    class Net(nn.Module):
        def forward(self, boxes, scores):
            return Random.apply(boxes, scores)[:, 2] + 1

    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 1, 1.01], [2, 2, 3, 3]]])
    exported = ferry.export(Net(), (boxes, torch.rand(1, 1, 3)))
    assert not isinstance(exported.model.graph.outputs[0].shape[0], int)
    session = onnxruntime.InferenceSession(ir.to_proto(exported.model).SerializeToString())
    (kept,) = session.run(None, {"boxes": boxes.numpy(), "scores": np.float32([[[0.9, 0.8, 0.7]]])})
    assert set(kept.tolist()) <= {1, 2, 3}
