"""``ferry.fp16.watch``: where values pass 65504, found by module path, on whatever a module takes and gives."""

import dataclasses
import json
import math
from collections import namedtuple
from xml.etree import ElementTree as ET

import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import ConfigError, FormatError, InputError, MissingFileError, ModelError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def watched(net, *batches):
    with ferry.fp16.watch(net) as w, torch.no_grad():
        for batch in batches:
            net(batch)
    return w.report()


def crossings(report):
    return [(c.kind, c.module, c.before) for c in report.crossings]


@pytest.mark.parametrize("device", DEVICES)
def test_where_values_enter_and_leave(device):
    net = nn.Sequential(Scale(10), nn.Sequential(Scale(1e4), nn.ReLU(), Scale(1e-6)), nn.ReLU())
    report = watched(net, torch.full((2, 2), 10.0, device=device))
    assert crossings(report) == [("enters", "1.0", ""), ("leaves", "1.2", "")]
    assert [c.magnitude for c in report.crossings] == [1e6, 1e6]
    assert not report.is_within
    assert report["1.0"].headroom == pytest.approx(math.log2(65504 / 1e6))
    assert report[""].headroom == pytest.approx(math.log2(65504))
    assert [row.path for row in report.modules if row.is_leaf] == ["0", "1.0", "1.1", "1.2", "2"]
    assert "from: 1.0 (reaches 1e+06)\n  to:   1.2 (from 1e+06)" in str(report)


def test_values_that_enter_in_the_code_between_modules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.Tanh()

        def forward(self, x):
            return self.b(self.a(x) * 1e6)

    report = watched(nn.Sequential(Block()), torch.ones(1))
    assert crossings(report) == [("enters", "0", "0.b"), ("leaves", "0.b", "")]
    assert "from: 0, in its own code before 0.b" in str(report)


def test_values_that_enter_in_the_last_line_of_a_module():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Identity()

        def forward(self, x):
            return self.conv(x) + x

    report = watched(nn.Sequential(Sum(), Scale(0.1)), torch.full((1,), 4e4))
    assert crossings(report) == [("enters", "0", ""), ("leaves", "1", "")]


def test_an_input_beyond_is_said_to_be_the_models():
    report = watched(Scale(1e-3), torch.full((1,), 1e6))
    assert report[""].taken == 1e6
    assert "input: reaches 1e+06" in str(report)
    assert crossings(report) == [("leaves", "", "")]


@dataclasses.dataclass
class Data:
    x: object
    itself: object = None


Pair = namedtuple("Pair", "x y")  # noqa: PYI024 - of the old kind on purpose


def loop(x):
    data = Data(x)
    data.itself = data
    return data


@pytest.mark.parametrize(
    "nest",
    [
        lambda x: {"a": [1, {"b": x}]},
        lambda x: (None, (x, "text")),
        lambda x: Pair(3, x),
        lambda x: Data(Data(x)),
        loop,
        lambda x: [x.to_sparse()],
        lambda x: torch.complex(x * 0, x),
        lambda x: x.double(),
    ],
)
def test_any_nesting_of_what_a_module_gives(nest):
    class Nests(nn.Module):
        def forward(self, x):
            return nest(x * 3)

    report = watched(Nests(), torch.full((2, 2), 5.0))
    assert report[""].given == 15
    assert report[""].kind == "Nests"


def test_keyword_arguments_are_seen():
    class Takes(nn.Module):
        def forward(self, *, x):
            return x * 0

    net = Takes()
    with ferry.fp16.watch(net) as w:
        net(x=torch.full((1,), 7.0))
    assert (w.report()[""].taken, w.report()[""].headroom) == (7, math.inf)


def test_many_batches_add_up():
    report = watched(nn.Sequential(Scale(2)), torch.ones(2), torch.full((2,), 5e4), torch.zeros(2))
    assert (report.forwards, report["0"].calls, report["0"].given) == (3, 3, 1e5)
    assert [c.magnitude for c in report.crossings] == [1e5]


def test_a_module_that_is_called_several_times_in_one_forward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = Scale(300)
            self.alias = self.step

        def forward(self, x):
            return self.alias(self.step(x))

    report = watched(Twice(), torch.ones(1))
    assert (report["step"].calls, report["step"].given, report.forwards) == (2, 9e4, 1)
    assert crossings(report) == [("enters", "step", "")]


def test_shares_of_small_numbers_and_of_what_is_lost():
    report = watched(nn.Identity(), torch.tensor([1.0, 0.0, 1e-5, 1e-9]))
    assert (report[""].subnormal, report[""].flushed) == (0.5, 0.25)


def test_where_nan_begins():
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    net = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), Root()), nn.ReLU())
    report = watched(net, torch.tensor([1.0, -1.0]))
    assert report.origin.module == "1.1"
    assert (report["1.1"].nans, report["1.1"].infinities, report["1.0"].nans) == (1, 0, 0)
    assert report["2"].headroom == -math.inf
    assert "first NaN or infinity: 1.1" in str(report)


def test_parameters_and_modules_that_are_not_called():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net[0].weight.data[0, 0] = 1e5
    net.unused = nn.BatchNorm1d(2)
    net.forward = lambda x: net[1](net[0](x))
    net.unused.running_var.fill_(7e4)
    report = watched(net, torch.zeros(1, 2))
    assert [(p.name, p.magnitude) for p in report.parameters] == [("0.weight", 1e5), ("unused.running_var", 7e4)]
    assert report.not_called == ("unused",)
    with pytest.raises(InputError, match="'unused' was not called"):
        report["unused"]
    with pytest.raises(InputError, match="no module '2'"):
        report["2"]


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_hooks_go_and_the_watch_still_works_after_an_exception():
    class Fails(nn.Module):
        def forward(self, x):
            if x.sum() < 0:
                raise RuntimeError("broken")
            return x

    net = nn.Sequential(Scale(2), Fails())
    with ferry.fp16.watch(net) as w:
        with pytest.raises(RuntimeError, match="broken"):
            net(-torch.ones(1))
        net(torch.full((1,), 4e4))
    assert hooks(net) == 0
    assert crossings(w.report()) == [("enters", "0", "")]
    with pytest.raises(RuntimeError), w:
        net(-torch.ones(1))
    assert hooks(net) == 0


def test_watches_may_be_nested_and_entered_again():
    net = nn.Sequential(Scale(2))
    with ferry.fp16.watch(net) as outer:
        with ferry.fp16.watch(net) as inner:
            net(torch.ones(1))
        with pytest.raises(ConfigError, match="entered already"), outer:
            pass
        net(torch.full((1,), 3.0))
    with inner:
        net(torch.full((1,), 2.0))
    assert (outer.report()["0"].given, inner.report()["0"].given) == (6, 4)
    assert hooks(net) == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradients_and_values_stay_as_they_were(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    x = torch.randn(2, 3)
    with mode():
        expected = net(x)
        with ferry.fp16.watch(net) as w:
            got = net(x)
    assert torch.equal(got, expected)
    assert got.requires_grad is expected.requires_grad
    assert w.report()["1"].taken == net[0](x).abs().max()  # measured before it was changed in place


def test_half_precision_and_integers_and_nothing():
    class Mixed(nn.Module):
        def forward(self, x):
            return x.half() * 300 * 300, torch.ones(2, dtype=torch.long) * 10**6, x[:0]

    report = watched(Mixed(), torch.ones(2))
    assert (report[""].infinities, report[""].given) == (2, math.inf)
    assert report.origin.module == ""


@pytest.mark.parametrize("suffix", [".json", ".html", ".svg", ".txt"])
def test_saved(suffix, tmp_path):
    net = nn.Sequential(Scale(1e6), nn.Sequential(nn.Tanh()), nn.Identity())
    net.append(nn.ReLU())
    report = watched(net, torch.tensor([0.5, torch.inf]))
    path = tmp_path / f"watch{suffix}"
    report.save(path)
    text = path.read_text()
    if suffix == ".json":
        assert ferry.fp16.WatchReport.load(path) == report
        assert json.loads(text)["modules"][2]["path"] == "1"
        assert json.loads(text)["modules"][0]["taken"] == "inf"
    elif suffix == ".svg":
        bars = ET.fromstring(text).findall(".//{*}rect")
        assert [bar.get("class") for bar in bars] == ["bad", "ok", "ok", "ok"]
        assert bars[1].findtext("{*}title") == "1.0 (Tanh): largest 1, +16.0 bits"
    elif suffix == ".html":
        assert "<svg" in text
        assert text.count("<tr") == len(report.modules) + 1
    else:
        assert text.startswith("Sequential in FP16, 1 forward: OUT OF RANGE")


def test_names_are_escaped_in_the_page():
    net = nn.Sequential()
    net.add_module("<b>&", nn.ReLU())
    assert "&lt;b&gt;&amp; (ReLU)" in watched(net, torch.ones(1)).to_html()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "other"}', '{"format": "torchferry.fp16.watch"}'])
def test_what_is_not_a_saved_watch(text, tmp_path):
    path = tmp_path / "watch.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="is not a saved watch"):
        ferry.fp16.WatchReport.load(path)
    with pytest.raises(MissingFileError):
        ferry.fp16.WatchReport.load(tmp_path / "absent.json")


def test_exporting_while_watching():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with ferry.fp16.watch(net) as w:
        exported = ferry.export(net, torch.ones(1, 2))
    assert {node.op_type for node in exported.model.graph} == {"Gemm", "Relu"}
    assert all(row.calls <= 2 for row in w.report().modules)  # at most those that were run for real


def test_only_modules_can_be_watched():
    with pytest.raises(ModelError, match="got function"):
        ferry.fp16.watch(lambda x: x)


def test_a_rewriter_reads_the_saved_report(tmp_path):
    registry = type(ferry.FUNCTION_REWRITER)()

    @registry.register_rewriter("test_watch.Scale.forward")
    def scaled(self, x):
        ctx = registry.get_context()
        seen = ferry.fp16.WatchReport.load(ctx.cfg["watch"])
        return ctx.origin_func(self, x / 64) * 64 if seen["0"].is_beyond else ctx.origin_func(self, x)

    net = nn.Sequential(Scale(1e5))
    watched(net, torch.ones(1)).save(tmp_path / "watch.json")
    cfg = {"watch": tmp_path / "watch.json"}
    exported = ferry.export(net, torch.ones(1), cfg=cfg, function_rewriter=registry)
    assert len(exported.model.graph) > 1
