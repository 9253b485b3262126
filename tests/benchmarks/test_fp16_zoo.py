import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FP16 = Path(__file__).parents[2] / "benchmarks" / "fp16"
LARGEST = 65504.0
MASKS = 1e8  # what is beyond this is -1e9 or finfo.min, put there on purpose


@pytest.fixture(scope="module", autouse=True)
def _on_path():
    sys.path.insert(0, str(FP16))
    yield
    sys.path.remove(str(FP16))


def nets():
    sys.path.insert(0, str(FP16))
    try:
        from zoo import ZOO
    finally:
        sys.path.remove(str(FP16))
    return ZOO


ZOO = nets()


class Watched(TorchDispatchMode):
    """Keeps the largest value of any operator, and the largest that enters a norm, whose square is larger still."""

    NORMS = ("layer_norm", "group_norm", "vector_norm")

    def __init__(self):
        super().__init__()
        self.largest = self.into_norms = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inside = value.abs()[value.abs() < MASKS]
                self.largest = max(self.largest, float(inside.max()) if inside.numel() else 0.0)
        if any(norm in str(func) for norm in self.NORMS):
            self.into_norms = max(self.into_norms, float(args[0].abs().max()))
        return result


def run(model, batch):
    with torch.no_grad():
        return [value for value in tree_leaves(model(*batch)) if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", ZOO)
def test_fp32_is_finite_and_the_outputs_fit_fp16_up_to_four_times_the_data(name):
    net = ZOO[name]
    model = net.build()
    assert not model.training
    for scale in (1.0, 4.0):
        for batch in net.held_out(scale=scale):
            for value in [*run(model, batch), *(value for value in batch if value.is_floating_point())]:
                assert value.isfinite().all()
                assert value.abs().max() <= LARGEST


@pytest.mark.parametrize("name", ZOO)
def test_the_overflow_is_there_and_is_of_the_kind_that_the_net_says(name):
    net = ZOO[name]
    model = net.build()
    watched = Watched()
    with watched:
        for batch in net.held_out():
            run(model, batch)
    if net.overflow == "acc32":
        assert watched.largest > LARGEST
    else:
        assert watched.largest <= LARGEST
    if net.overflow == "strict":
        assert watched.into_norms**2 > LARGEST
    if net.overflow == "none":
        assert watched.into_norms < 16
    if net.overflow == "small":
        half, single = run(net.build().half(), [value.half() for value in batch]), run(model, batch)
        errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(single, half, strict=True)]
        assert 5e-3 < max(errors) < 1.0  # rounding alone gives a tenth of this


@pytest.mark.parametrize("name", ["resnet18", "llama", "keywords", "gemma"])
def test_a_net_is_the_same_every_time_and_leaves_the_random_state_alone(name):
    net = ZOO[name]
    state = torch.get_rng_state()
    first, second = (run(net.build(), net.inputs(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["resnet18", "t5_encoder", "bert", "diffusion"])
def test_scale_multiplies_data_alone(name):
    net = ZOO[name]
    for place, (once, fourfold) in enumerate(zip(net.inputs(7), net.inputs(7, 4.0), strict=True)):
        assert torch.equal(fourfold, once if place in net.fixed else once * 4)


@pytest.mark.parametrize("name", ZOO)
def test_calibration_and_held_out_data_differ(name):
    net = ZOO[name]
    held = net.held_out()
    for batch in net.calibration():
        assert all(not torch.equal(batch[0], other[0]) for other in held)


def test_a_third_is_frozen_and_stands_apart():
    from zoo import DEVELOPMENT, FROZEN

    assert len(ZOO) >= 24
    assert len(FROZEN) >= len(ZOO) / 3
    assert not set(FROZEN) & set(DEVELOPMENT)
    assert {net.kind for net in FROZEN.values()} == {net.kind for net in DEVELOPMENT.values()}


def test_no_frozen_net_has_changed_since_it_was_sealed():
    import freeze
    from zoo import FROZEN

    seal = json.loads(freeze.SEAL.read_text(encoding="utf-8"))
    assert freeze.sources() == seal["sources"]
    assert set(seal["outputs"]) == set(FROZEN)
    for name, net in FROZEN.items():
        for seen, sealed in zip(freeze.figures(net), seal["outputs"][name], strict=True):
            assert seen["shape"] == sealed["shape"], name
            assert seen["mean"] == pytest.approx(sealed["mean"], rel=1e-3), name
            assert seen["largest"] == pytest.approx(sealed["largest"], rel=5e-3), name


CASES = """
import torch
from cases import Case
from torch import nn

def cases():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    module[0].weight.data *= 1e5
    module[2].weight.data *= 1e-5
    batch = (torch.randn(3, 4),)
    return [Case("tiny", "outside", module, [batch], {1.0: [batch], 4.0: [(4 * batch[0],)]})]
"""


def table(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FP16 / "table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_the_table_judges_modules_of_any_file_and_takes_up_earlier_rows(tmp_path):
    (tmp_path / "mine.py").write_text(CASES)
    rows = tmp_path / "rows.json"
    text = table("--cases", tmp_path / "mine.py", "--methods", "naive", "--json", rows)
    assert re.search(r"outside +naive +0/1 +0/1 +0/1 +0/1 +1/1 +0\.0%", text)
    (row,) = json.loads(rows.read_text())
    assert re.match(r"(MatMul|Gemm|Add) in 0: ", row["runs"]["acc32 1x"]["first_bad"])
    row["fp32_nodes"], row["float_nodes"] = 1, 4
    rows.write_text(json.dumps([row]))
    text = table("--cases", tmp_path / "mine.py", "--methods", "naive", "--rows", rows, "--markdown")
    assert "| tiny | naive | overflow | overflow | overflow | overflow | 1/4 |" in text


@pytest.mark.slow
def test_the_table_finds_a_control_right_and_half_of_a_net_that_grows_wrong(tmp_path):
    rows = tmp_path / "rows.json"
    table("--nets", "resnet18_control", "vit_strict", "--methods", "naive", "--json", rows)
    control, strict = json.loads(rows.read_text())
    assert not any(run["first_bad"] for run in control["runs"].values())
    assert all(run["ratio"] < 3 for run in control["runs"].values())
    assert control["fp32_nodes"] == control["added"] == 0
    assert not strict["runs"]["acc32 4x"]["first_bad"]
    assert strict["runs"]["strict 1x"]["first_bad"]


def test_macs_are_those_of_the_layers(tmp_path):
    import judge
    import onnx

    import torchferry as ferry

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, groups=1), torch.nn.ConvTranspose2d(8, 4, 2, 2))
    head = torch.nn.Sequential(model, torch.nn.Flatten(), torch.nn.Linear(4 * 8 * 8, 5)).eval()
    ferry.export(head, (torch.randn(2, 3, 4, 4),)).save(tmp_path / "m.onnx")
    layers = judge.layers(onnx.load(str(tmp_path / "m.onnx")))
    assert sorted(macs for _, macs in layers) == sorted([2 * 8 * 16 * 27, 2 * 16 * 8 * 16, 2 * 5 * 256])
