"""Repairing modules that weights alone do not repair: ``half()`` is safe, FP32 the same to the bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fix import CASES, build, calls, enlarge
from torch import Tensor, nn

import torchferry as ferry
from torchferry.core.errors import ModelError
from torchferry.pipeline.half import fix_weights
from torchferry.precision.emulate import Emulation
from torchferry.precision.modules.expansions import EXPANSIONS


def halved(call: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.half() if t.is_floating_point() else t for t in call)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().float() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("name", CASES)
def test_half_of_a_repaired_module_is_right_up_to_four_times_the_input(name: str) -> None:
    model, data = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    fixed, certificate = ferry.fp16.fix(model, data)

    assert certificate.passed, str(certificate)
    assert not certificate.islands
    assert fixed.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    half = copy.deepcopy(fixed).half()
    for factor in (1.0, 4.0):
        call = enlarge(data[-1], factor)
        want = model(*call).detach()
        assert error(fixed(*call), want) < 1e-5
        got = half(*halved(call))
        assert got.dtype == torch.float16
        assert error(got, want) < 2e-2


@pytest.mark.parametrize("name", ["transformer", "swiglu", "gates"])
def test_a_repaired_module_takes_other_sizes_and_is_exported_like_any_other(name: str) -> None:
    model, data = build(name)
    fixed, _ = ferry.fp16.fix(model, data)
    (x,) = data[0]
    more = torch.cat([x, x.flip(0), x])  # the example has a batch of 1
    assert error(fixed(more), model(more).detach()) < 1e-5

    batched = [(torch.cat([x, x, x]),) for (x,) in data]
    fixed, _ = ferry.fp16.fix(model, batched)
    assert error(fixed(x), model(x).detach()) < 1e-5  # and the other way round

    exported = ferry.export(fixed.half(), halved(data[0]))
    with Emulation(exported, "acc32") as emulation:
        emulation.run(tuple(t.float() for t in halved(data[0])) if x.is_floating_point() else data[0])
        assert not emulation.bad


def test_the_certificate_of_a_repaired_module_is_checked_again_from_its_files(tmp_path: Path) -> None:
    model, data = build("gates")
    _, certificate = ferry.fp16.fix(model, data)
    assert {added.operator for added in certificate.added} >= {"Mul"}
    certificate.save(tmp_path / "proof")
    assert ferry.fp16.certify(tmp_path / "proof").passed


class Code(nn.Module):
    """What ``half()`` does not reach in code: dtypes by name, constants, defaults, buffers that are not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.wide.weight.data.mul_(1e5)
        self.last.weight.data.mul_(1e-3)
        self.register_buffer("places", torch.linspace(-1, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.wide(x.to(torch.float32)))
        wide = wide + torch.zeros(8, dtype=torch.float32) + torch.arange(8) * 0.5 + torch.full((8,), 3.0)
        wide = torch.tanh(wide * torch.tensor(0.25)) + self.places
        return self.last(torch.softmax(self.wide(wide), -1, dtype=torch.float32))


def test_half_reaches_what_the_code_of_a_module_fixes() -> None:
    torch.manual_seed(0)
    model, data = Code().eval(), calls(3, 8)
    fixed, certificate = ferry.fp16.fix(model, data)
    assert certificate.passed, str(certificate)
    assert fixed.state_dict().keys() == model.state_dict().keys()
    want = model(*data[-1]).detach()
    assert error(fixed(*data[-1]), want) < 1e-5
    got = copy.deepcopy(fixed).half()(*halved(data[-1]))
    assert got.dtype == torch.float16
    assert error(got, want) < 1e-2


class Flat(nn.Module):
    """Attention on three axes, which torch.onnx does not translate without a rule of ours."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x) * 1e6
        return torch.tanh(y) + y / 1e6


def test_what_the_exporter_needs_a_rule_for_is_repaired_too() -> None:
    data = calls(2, 5, 8)
    fixed, certificate = ferry.fp16.fix(Flat(), data)
    assert certificate.passed, str(certificate)
    assert error(copy.deepcopy(fixed).half()(*halved(data[-1])), Flat()(*data[-1])) < 1e-2


def test_what_differs_in_size_among_the_calls_is_free_and_the_rest_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data.mul_(1e6)
    model[2].weight.data.mul_(1e-5)
    data = [(torch.randn(1, 3, height, 8),) for height in (8, 12, 10, 16)]
    fixed, certificate = ferry.fp16.fix(model, data)
    assert certificate.passed, str(certificate)
    assert not certificate.weights_only
    x = torch.randn(2, 3, 9, 8)
    assert error(fixed(x), model(x)) < 1e-5
    with pytest.raises(AssertionError, match=r"size\(\)\[3\]"):
        fixed(torch.randn(1, 3, 8, 9))


def test_what_works_in_place_is_written_out_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(inplace=True), nn.Linear(8, 2)).eval()
    model[0].weight.data.mul_(1e6)
    model[2].weight.data.mul_(1e-5)
    data = calls(3, 8)
    fixed, certificate = ferry.fp16.fix(model, data)
    assert certificate.passed, str(certificate)
    assert not certificate.islands
    assert error(copy.deepcopy(fixed).half()(*halved(data[-1])), model(*data[-1])) < 1e-2


class Ends(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x * 1e-6)
        return y, x * 10 + y


def test_inputs_and_outputs_out_of_range_stay_fp32_and_are_listed() -> None:
    data = calls(4, 8, scale=1e6)
    fixed, certificate = ferry.fp16.fix(Ends(), data)
    assert certificate.passed, str(certificate)
    assert len(certificate.outside) == 2
    half = copy.deepcopy(fixed).half()
    for got, want in zip(half(*data[-1]), Ends()(*data[-1]), strict=True):
        assert error(got, want) < 1e-2
    assert [each.dtype for each in half(*data[-1])] == [torch.float16, torch.float32]


class Recurrence(nn.Module):
    """An exponential out of range, which no scale holds: it has to stay FP32."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.exp(x * 20).sum(-1))


def test_what_no_scale_holds_stays_fp32_and_is_listed() -> None:
    data = [(x.clamp(-1, 1),) for (x,) in calls(4, 8)]
    fixed, certificate = ferry.fp16.fix(Recurrence(), data, headroom_bits=0)
    assert certificate.passed, str(certificate)
    assert "exp" in certificate.islands
    got = copy.deepcopy(fixed).half()(*halved(data[-1]))
    assert error(got, Recurrence()(*data[-1])) < 1e-2


def test_where_weights_alone_are_asked_for_what_they_cannot_do_is_said_with_the_place(tmp_path: Path) -> None:
    model, data = build("gates")
    with pytest.raises(ModelError, match="weights alone cannot") as caught:
        fix_weights(model, data, 2, tmp_path / "weights.safetensors")
    assert "ferry.fp16.fix(model, calibration)" in str(caught.value)
    assert not (tmp_path / "weights.safetensors").exists()


ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    torch.ops.aten.softmax.int: (-1,),
    torch.ops.aten._softmax.default: (-1, False),
    torch.ops.aten.log_softmax.int: (-1,),
    torch.ops.aten._log_softmax.default: (-1, False),
}


@pytest.mark.parametrize("operator", [o for o in EXPANSIONS if "attention" not in str(o)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_an_operator_written_out_is_the_operator(operator: Any, scale: float) -> None:
    x = torch.randn(6, 33, generator=torch.Generator().manual_seed(1)) * scale
    x[0, :4] = torch.tensor([0.0, 64.0, -64.0, -128.0])
    arguments = ARGUMENTS.get(operator, ())
    torch.testing.assert_close(EXPANSIONS[operator](x, *arguments), operator(x, *arguments), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": "bool"}, {"attn_mask": "float"}],
    ids=["plain", "causal", "scale", "bool mask", "float mask"],
)
def test_attention_written_out_is_attention(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    masks = {"bool": torch.ones(5, 5).tril().bool(), "float": torch.randn(5, 5, generator=generator)}
    options = {key: masks.get(value, value) for key, value in options.items()}
    operator = torch.ops.aten.scaled_dot_product_attention.default
    torch.testing.assert_close(EXPANSIONS[operator](q, k, v, **options), operator(q, k, v, **options))
