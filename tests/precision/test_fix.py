"""Repairing graphs and modules: nothing overflows up to four times the input, and little is added."""

import copy
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import torchferry as ferry
from torchferry.core.errors import ConfigError, FormatError
from torchferry.precision.emulate import Emulation


class Residual(nn.Module):
    """Convolutions, batch norms and residual additions whose tensors reach millions."""

    def __init__(self, gain: float = 300.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 4)
        for block in self.blocks:
            block[1].weight.data.mul_(gain)
            self.head.weight.data.div_(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self, gain: float = 30000.0, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2, self.last = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), gate or nn.GELU(), nn.Linear(32, 16))
        self.mlp[2].weight.data.mul_(gain)
        self.out.weight.data.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
            x = x + self.out(torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v) * 10
            x = x + self.mlp(self.norm2(x)) * 10
        return self.last(x)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class SwiGLU(nn.Module):
    """RMS norms, gated products, and an embedding of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(20, 16), RMSNorm(16), RMSNorm(16)
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.up.weight.data.mul_(400)
        self.down.weight.data.mul_(400)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(2):
            y = self.norm(x)
            x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return self.last(x)


class Stack(nn.Module):
    """Root-mean-square norms of the user's own, far out of range inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.norm2 = nn.Linear(8, 16), RMSNorm(16), nn.Linear(16, 16), RMSNorm(16)
        self.first.weight.data.mul_(1e5)
        self.last.weight.data.mul_(1e4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.last(self.norm(self.first(x))))


class Masked(nn.Module):
    def __init__(self, hidden: float = -1e9) -> None:
        super().__init__()
        self.qkv, self.hidden = nn.Linear(8, 24), hidden
        self.qkv.weight.data[16:].mul_(1e6)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~keep, self.hidden)
        return torch.softmax(scores, -1) @ v * 1e-5


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3)
        self.conv.weight.data.mul_(1e6)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(nn.functional.silu(self.norm(self.conv(x))))


class Gates(nn.Module):
    """Gates whose inputs themselves leave the range."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 8)
        self.wide.weight.data.mul_(1e5)
        self.last = nn.Linear(32, 4)
        self.last.weight.data.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        gates = [nn.functional.silu(x), nn.functional.gelu(x), torch.tanh(x), torch.softmax(x, -1)]
        return self.last(torch.cat(gates, -1))


def calls(*shape: int, count: int = 4, scale: float = 1.0) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(*shape, generator=generator) * scale,) for _ in range(count)]


CASES: dict[str, tuple[Any, list[tuple[Tensor, ...]]]] = {
    "residual": (Residual, calls(1, 3, 8, 8)),
    "transformer": (Transformer, calls(1, 6, 16)),
    "swiglu": (SwiGLU, [(torch.randint(0, 20, (1, 6), generator=torch.Generator().manual_seed(i)),) for i in range(4)]),
    "masked": (Masked, [(x, torch.ones(6, 6).tril().bool()) for (x,) in calls(1, 6, 8)]),
    "groups": (Groups, calls(1, 3, 8, 8)),
    "stack": (Stack, calls(5, 8)),
    "gates": (Gates, calls(3, 8)),
}


def build(name: str) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    factory, data = CASES[name]
    return factory().eval(), data


def enlarge(call: tuple[Tensor, ...], factor: float) -> tuple[Tensor, ...]:
    return tuple(t * factor if t.is_floating_point() else t for t in call)


@pytest.mark.parametrize("name", CASES)
def test_a_repaired_graph_overflows_nowhere_up_to_four_times_the_input(name: str) -> None:
    model, data = build(name)
    exported = ferry.export(model, data[0])
    with Emulation(exported, "acc32") as plain:
        plain.run(data[0])
        assert plain.bad  # else there would be nothing to repair

    fixed, certificate = ferry.fp16.fix(exported, data)

    assert certificate.passed, str(certificate)
    assert not certificate.islands
    for factor in (1.0, 2.0, 4.0):
        for mode in ("acc32", "strict"):
            with Emulation(fixed, mode) as emulation:
                emulation.run(enlarge(data[-1], factor))
                assert not emulation.bad, (factor, mode, [str(bad) for bad in emulation.bad])


def test_weights_alone_repair_convolutions_norms_and_residuals() -> None:
    model, data = build("residual")
    exported = ferry.export(model, data[0])
    fixed, certificate = ferry.fp16.fix(exported, data)
    assert certificate.weights_only
    assert [node.op_type for node in fixed.model.graph] == [node.op_type for node in exported.model.graph]
    dtypes = {v.dtype for node in fixed.model.graph for v in node.outputs} | {v.dtype for v in fixed.model.graph.inputs}
    assert dtypes == {ir.DataType.FLOAT16}
    assert fixed.target.precision == "fp16"
    assert fixed.signature.inputs[0].dtype == "float16"


def test_a_graph_is_left_as_it_was() -> None:
    model, data = build("residual")
    exported = ferry.export(model, data[0])
    before = {name: v.const_value.numpy().copy() for name, v in exported.model.graph.initializers.items()}
    ferry.fp16.fix(exported, data)
    assert {v.dtype for v in exported.model.graph.inputs} == {ir.DataType.FLOAT}
    for name, value in exported.model.graph.initializers.items():
        assert (value.const_value.numpy() == before[name]).all()


@pytest.mark.parametrize("factory", [Residual, lambda: Residual(300).train()], ids=["eval", "training"])
def test_half_of_a_repaired_module_is_right(factory: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = factory()
    was_training = model.training
    data = calls(1, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())

    fixed, certificate = ferry.fp16.fix(model, data)

    assert certificate.passed, str(certificate)
    assert certificate.weights_only
    assert model.training == was_training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fixed.load_state_dict(fixed.state_dict())
    model.eval(), fixed.eval()
    for factor in (1, 4):
        (x,) = enlarge(data[-1], factor)
        want = model(x).detach()
        torch.testing.assert_close(fixed(x), want, rtol=1e-5, atol=1e-5)
        assert not copy.deepcopy(model).half()(x.half()).isfinite().all()
        got = copy.deepcopy(fixed).half()(x.half()).float()
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2 * float(want.abs().max()))
    model.half()  # the evidence is its own
    certificate.save(tmp_path / "proof")
    assert ferry.fp16.certify(tmp_path / "proof").passed


@pytest.mark.parametrize("name", ["stack", "groups"])
def test_half_of_a_module_with_norms_is_right(name: str) -> None:
    model, data = build(name)
    fixed, certificate = ferry.fp16.fix(model, data)
    assert certificate.passed, str(certificate)
    want = model(*data[-1]).detach()
    half = tuple(t.half() if t.is_floating_point() else t for t in data[-1])
    got = copy.deepcopy(fixed).half()(*half).float()
    torch.testing.assert_close(got, want, rtol=5e-2, atol=2e-2 * float(want.abs().max()))


def test_convolutions_without_bias_and_means_are_repaired_by_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
    ).eval()
    model[1].weight.data.fill_(1e5)
    model[3].running_mean.fill_(1e5)
    model[3].running_var.fill_(1e10)  # no FP16 number
    _, certificate = ferry.fp16.fix(model, calls(1, 3, 8, 8))
    assert certificate.passed, str(certificate)
    assert certificate.weights_only


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.second.weight = self.first.weight
            self.first.weight.data.mul_(2000)
            self.last.weight.data.mul_(1e-6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    model = Tied().eval()
    fixed, certificate = ferry.fp16.fix(model, calls(4, 8))
    assert certificate.passed, str(certificate)
    assert fixed.second.weight is fixed.first.weight


def test_an_output_out_of_range_stays_fp32_and_is_listed() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    model.weight.data.mul_(1e6)
    data = calls(2, 8)
    fixed, certificate = ferry.fp16.fix(ferry.export(model, data[0], output_names=["big"]), data)
    assert certificate.passed, str(certificate)
    assert certificate.outside == ("big",)
    assert fixed.signature.outputs[0].dtype == "float32"
    with Emulation(fixed, "strict") as emulation:
        got = emulation.run(data[-1])["big"]
    want = model(*data[-1]).detach()
    torch.testing.assert_close(torch.tensor(got), want, rtol=1e-2, atol=1e-3 * float(want.abs().max()))


def test_an_input_out_of_range_stays_fp32_and_is_listed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].weight.data.mul_(1e-6)
    data = calls(2, 8, scale=1e6)
    fixed, certificate = ferry.fp16.fix(ferry.export(model, data[0], input_names=["x"]), data)
    assert certificate.passed, str(certificate)
    assert certificate.outside == ("x",)
    assert fixed.signature.inputs[0].dtype == "float32"


def test_inputs_and_outputs_stay_fp32_where_asked() -> None:
    model, data = build("residual")
    fixed, certificate = ferry.fp16.fix(ferry.export(model, data[0]), data, keep_io_types=True)
    assert certificate.passed, str(certificate)
    assert [spec.dtype for spec in (*fixed.signature.inputs, *fixed.signature.outputs)] == ["float32", "float32"]
    assert {added.operator for added in certificate.added} == {"Cast"}


def test_masks_are_bounded_and_listed() -> None:
    model, data = build("masked")
    _, certificate = ferry.fp16.fix(ferry.export(model, data[0]), data)
    assert any("mask" in line for line in certificate.exceptions())


def test_a_mask_of_zeros_and_ones_is_not_enlarged() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return torch.softmax(x @ x.transpose(-1, -2) + (1 - keep) * -1e9, -1) @ x

    data = [(x, torch.ones(6, 6).tril()) for (x,) in calls(1, 6, 8)]
    _, certificate = ferry.fp16.fix(ferry.export(Hidden(), data[0]), data)
    assert certificate.passed, str(certificate)
    assert certificate.weights_only


def test_gates_out_of_range_are_clipped_where_they_are_flat_and_listed() -> None:
    model, data = build("gates")
    _, certificate = ferry.fp16.fix(ferry.export(model, data[0]), data)
    assert sum(added.operator == "Clip" for added in certificate.added) >= 3
    assert any("clipped" in line for line in certificate.exceptions())


@pytest.mark.parametrize("gate", [nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.Mish(), nn.Hardsigmoid()], ids=str)
def test_a_gate_in_range_gets_its_true_operand_although_the_sum_before_it_wants_room(gate: nn.Module) -> None:
    wide = nn.Linear(4096, 8, bias=False)
    wide.weight.data = torch.ones(8, 4096) * torch.tensor([1.0, -1.0]).repeat(2048)  # sums of 40960 that cancel
    model = nn.Sequential(wide, gate, nn.Linear(8, 4)).eval()
    data = [(10 + x / 16,) for (x,) in calls(3, 4096)]
    _, certificate = ferry.fp16.fix(ferry.export(model, data[0]), data)
    assert certificate.check("agreement").passed, str(certificate)
    assert certificate.check("bounds").passed, str(certificate)
    assert not certificate.islands


def test_a_model_in_range_is_only_converted() -> None:
    torch.manual_seed(0)
    model = Residual(1.0).eval()
    data = calls(1, 3, 8, 8)
    _, certificate = ferry.fp16.fix(ferry.export(model, data[0]), data)
    assert certificate.weights_only
    assert not any(k for name, (_, k) in certificate.scales.items())


def test_one_call_is_perturbed_for_judging_and_the_certificate_says_so() -> None:
    model, data = build("residual")
    _, certificate = ferry.fp16.fix(ferry.export(model, data[0]), data[0])
    assert "perturbed" in certificate.held_out
    assert "perturbed" in certificate.check("error").data


def test_an_operator_without_a_rule_gets_scale_1_and_is_listed() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 18, "my" : 1]>
        g (float[4] x) => (float[4] y) { a = my.Twice (x)  y = Relu (a) }
        <domain: "my", opset_import: ["" : 18]>
        Twice (a) => (b) { b = Add (a, a) }
    """
    _, certificate = ferry.fp16.fix(ir.from_onnx_text(text), (torch.ones(4),))
    assert certificate.passed, str(certificate)
    assert not certificate.unknown_operators  # a function of the model is looked into

    softsign = """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[4] x) => (float[4] y) { a = Bernoulli (x)  y = Relu (a) }
    """
    _, certificate = ferry.fp16.fix(ir.from_onnx_text(softsign), (torch.zeros(4),))
    assert certificate.unknown_operators


def test_bad_requests_are_refused() -> None:
    half = '<ir_version: 8, opset_import: ["" : 18]> g (float16[4] x) => (float16[4] y) { y = Relu (x) }'
    with pytest.raises(FormatError, match="FLOAT16 already"):
        ferry.fp16.fix(ir.from_onnx_text(half), (torch.ones(4).half(),))
    with pytest.raises(ConfigError, match="headroom_bits"):
        ferry.fp16.fix(nn.ReLU(), (torch.ones(4),), headroom_bits=99)
