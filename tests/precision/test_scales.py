"""Solving scales: what is solved, what it costs, and what binds; and the bounds that it starts from."""

import numpy as np
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.precision.limits import FP16_MAX, constant_limits, limits
from torchferry.precision.planning import Plan, plan
from torchferry.precision.ranges import Range, constant_range, measure


class Gated(nn.Module):
    """A gate whose operand is out of range, in a network that is otherwise in range."""

    def __init__(self, gain: float = 1e6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.first.weight.data.mul_(gain)
        self.last.weight.data.div_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.silu(self.first(x)))


class Skip(nn.Module):
    """A residual stream that starts at the input, whose k is 0, and ends far out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.branch.weight.data.mul_(1e6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.branch(x))


def planned(model: nn.Module) -> Plan:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    exported = ferry.export(model.eval(), (x,), input_names=["x"])
    return plan(exported, [{"x": x.numpy()}], 2)


def test_a_gate_costs_a_clip_and_a_multiplication_at_one_edge() -> None:
    found = planned(Gated())
    assert found.solution is not None
    ((tensor, _reader), bits), *others = found.solution.shifts.items()
    assert not others
    assert bits == found.solution.scales[tensor] > 0


def test_an_addition_costs_one_multiplication_and_says_what_binds() -> None:
    found = planned(Skip())
    assert found.solution is not None
    assert len(found.solution.shifts) == 1
    (reason,) = found.solution.binding.values()
    assert "needs k = 0" in reason
    assert "needs k >= " in reason


def test_what_is_in_range_is_left_alone() -> None:
    found = planned(Gated(1.0))
    assert found.solution is not None
    assert not any(found.solution.scales.values())
    assert not found.solution.shifts


def test_every_tensor_keeps_its_bounds() -> None:
    for model in (Gated(), Skip()):
        found = planned(model)
        assert found.solution is not None
        for name, bound in found.problem.limits.items():
            k = found.solution.scales[name]
            assert bound.least is None or k >= bound.least, name
            assert bound.most is None or k <= bound.most, name


@pytest.mark.parametrize(
    ("measured", "enlarged", "least"),
    [
        (Range(1e6, 1.0), Range(4e6, 4.0), 7),  # 1.5 * 4e6 / 2**7 is below 65504
        (Range(1e6, 1.0), Range(1.6e7, 16.0), 10),  # it grows with the square of the input, and so does the margin
        (Range(1e4, 1.0), Range(1e4, 1.0), 0),  # it does not grow, and has two bits of room
        (Range(100.0, 1.0, any_order=1e6), Range(400.0, 1.0, any_order=4e6), 4),  # a sum may reach 1e6 on the way
    ],
)
def test_the_least_scale_follows_from_the_range(measured: Range, enlarged: Range, least: int) -> None:
    found = limits(measured, enlarged, 2)
    assert found.least == least
    assert found.leaves_range == (least > 0)
    assert max(measured.any_order, enlarged.largest) / 2.0**least <= FP16_MAX


def test_a_divisor_is_kept_from_zero() -> None:
    found = limits(Range(1.0, 1.0, smallest=1e-3), Range(4.0, 4.0, smallest=4e-3), 2)
    assert found.most is not None
    assert np.float16(1e-3 / 2.0**found.most) > 0


def test_a_constant_must_fit_and_infinities_do_not_count() -> None:
    assert constant_limits(constant_range(np.array([1e6, 1.0], np.float32))).least == 4
    assert constant_range(np.array([-np.inf, 2.0, 0.0], np.float32)).largest == 2.0
    assert constant_limits(constant_range(np.zeros(3, np.float32))).least is None


def test_measuring_sees_every_tensor_and_the_worst_order_of_sums() -> None:
    model = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    exported = ferry.export(model, (x,), input_names=["x"], output_names=["y"])
    (found,) = measure(exported.model, exported.signature, [{"x": x.numpy()}, {"x": 2 * x.numpy()}])
    with torch.no_grad():
        largest = max(float(model(factor * x).abs().max()) for factor in (1, 2))
        worst = float((2 * x.abs() @ model.weight.abs().T + model.bias.abs()).max())
    assert found["x"].largest == pytest.approx(float(2 * x.abs().max()))
    assert found["y"].largest == pytest.approx(largest, rel=1e-5)
    assert found["y"].any_order == pytest.approx(worst, rel=1e-5)
