"""``ferry.custom_op``: torch, the graph and the engines learn one operator from one place."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import torchferry as ferry
from torchferry.core.errors import BackendError, ConfigError
from torchferry.rewrite import SYMBOLIC_REWRITER
from torchferry.testing import assert_op

ENGINES = ["onnxruntime", "openvino", "reference"]


@pytest.fixture(autouse=True)
def _no_symbolics_left(monkeypatch):
    monkeypatch.setattr(SYMBOLIC_REWRITER, "_records", [])


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def export(function, *tensors, **options):
    return ferry.export(Calling(function).eval(), tensors, **options)


def nodes(exported):
    return [(node.domain, node.op_type) for node in exported.model.graph]


def test_a_composition_is_a_function_beside_the_graph(tmp_path):
    def body(g, a, b, alpha):
        return g.op("Add", g.op("Mul", a, torch.tensor([alpha])), b)

    @ferry.custom_op("samples_a::my_add", composition=body)
    def my_add(a: Tensor, b: Tensor, alpha: float = 2.0) -> Tensor:
        """Return alpha * a + b."""
        return torch.from_numpy(alpha * a.numpy() + b.numpy())

    assert my_add(torch.ones(2), torch.ones(2)).tolist() == [3.0, 3.0]
    assert my_add.__doc__ == "Return alpha * a + b."
    assert assert_op(my_add, [((2, 3), (2, 3)), ((5, 1), (5, 1))], ENGINES).passed

    exported = export(lambda x: my_add(my_add(x, x), my_add(x, x * 2), 3.0), torch.rand(2, 3))
    assert [operator for domain, operator in nodes(exported) if domain] == ["MyAdd", "MyAdd", "MyAdd_1"]
    exported.save(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(f.domain, f.name) for f in model.functions] == [("samples_a", "MyAdd"), ("samples_a", "MyAdd_1")]


def test_a_symbolic_puts_its_nodes_into_the_graph():
    seen = []

    def symbolic(g, x, sizes, how, times):
        seen.append((sizes, how, times))
        return g.op("Tile", x, g.op("Constant", value_t=torch.tensor(sizes)))

    @ferry.custom_op("samples_b::tiled", symbolic=symbolic)
    def tiled(x: Tensor, sizes: list[int], how: str = "plain", times: int | None = None) -> Tensor:
        return x.repeat(*sizes)

    assert assert_op(tiled, [((2, 3), [2, 1]), ((4, 3), [2, 1])], ENGINES).passed
    assert set(map(str, seen)) == {"([2, 1], 'plain', None)"}
    assert nodes(export(lambda x: tiled(x, [2, 2]), torch.rand(2, 3))) == [("", "Tile")]


def test_a_kernel_runs_in_every_engine_that_calls_python():
    @ferry.custom_op(
        "samples_c::power",
        domain="own",
        onnx_name="Power",
        kernel=lambda x, by, name, inverse: 1 / x**by if inverse else x**by,
    )
    def power(x: Tensor, by: float, name: str = "sum", inverse: bool = False) -> Tensor:
        return 1 / x**by if inverse else x**by

    x = torch.rand(2, 3) + 1
    model = Calling(lambda x: power(x, 2.0) + power(x, 3.0, inverse=True))
    assert assert_op(model, [(x,), (torch.rand(5, 3) + 1,)], ENGINES).passed
    assert nodes(export(model.function, x)) == [("own", "Power"), ("own", "Power"), ("", "Add")]


def test_a_kernel_of_other_dtypes_with_several_results():
    @ferry.custom_op(
        "samples_d::sorted",
        kernel=lambda x: (np.sort(x, axis=-1), np.argsort(x, axis=-1, kind="stable")),
        kernel_dtypes=(["float64"], ["float64", "int64"]),
    )
    def ordered(x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = torch.sort(x, dim=-1, stable=True)
        return values, places

    assert assert_op(ordered, [((3, 4),), ((2, 4),)], ENGINES, dtypes=[torch.float64]).passed


def test_without_anything_the_node_has_every_argument():
    @ferry.custom_op("samples_e::deform")
    def deform(
        x: Tensor, w: Tensor, bias: Tensor | None, stride: list[int], alpha: float, on: bool, how: str
    ) -> Tensor:
        return x + w

    exported = export(lambda x: deform(x, x, None, [1, 2], 0.5, True, "up"), torch.rand(2, 3))
    (node,) = exported.model.graph
    assert (node.domain, node.op_type, len(node.inputs)) == ("samples_e", "Deform", 2)
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert {**values, "stride": list(values["stride"])} == {"stride": [1, 2], "alpha": 0.5, "on": 1, "how": "up"}
    schema = deform.schema
    assert (schema.domain, schema.name) == ("samples_e", "Deform")
    assert [(i.name, i.option.name) for i in schema.inputs] == [("x", "Single"), ("w", "Single"), ("bias", "Optional")]
    assert {name: attribute.type.name for name, attribute in schema.attributes.items()} == {
        "stride": "INTS", "alpha": "FLOAT", "on": "INT", "how": "STRING",
    }  # fmt: skip


def test_an_engine_without_the_operator_says_so(tmp_path):
    @ferry.custom_op("samples_f::alone")
    def alone(x: Tensor) -> Tensor:
        return x + 1

    exported = export(alone, torch.rand(2))
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(BackendError, match="samples_f::?Alone") as caught:
            ferry.compile(exported, ferry.Target(engine), tmp_path / "engine")
        assert "import the module that gives 'samples_f::Alone' a kernel" in caught.value.hint


def padded_in_onnx(g, x):
    return g.op("Pad", x, g.op("Constant", value_t=torch.tensor([0, 1, 0, 1])))


class TestWhatItGivesForFakeTensors:
    def test_its_own_function(self):
        @ferry.custom_op("samples_g::padded", symbolic=padded_in_onnx)
        def padded(x: Tensor) -> Tensor:
            return nn.functional.pad(x, (1, 1))

        exported = export(lambda x: padded(x).mean(0), torch.rand(2, 3), dynamic_shapes={"x": {1: "w"}})
        assert str(exported.signature.outputs[0].shape[0]) == "w + 2"

    def test_onnx_shape_inference(self):
        @ferry.custom_op("samples_h::joined", symbolic=lambda g, x: g.op("Concat", x, x, axis_i=0))
        def joined(x: Tensor) -> Tensor:
            return torch.from_numpy(np.concatenate([x.numpy()] * 2))

        assert assert_op(joined, [((2, 3),), ((4, 3),)], ENGINES).passed

    def test_fake_is_given(self):
        @ferry.custom_op("samples_i::cubed", fake=torch.empty_like, kernel=lambda x: x**3)
        def cubed(x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() ** 3)

        assert assert_op(cubed, [((2, 3),), ((4, 3),)], ENGINES).passed

    def test_none_of_them(self):
        @ferry.custom_op("samples_j::cubed")
        def cubed(x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() ** 3)

        with pytest.raises(ferry.TorchferryError, match="not known before it is run") as caught:
            export(cubed, torch.rand(2))
        assert "fake=" in str(caught.value)


class TestTheGeneratedTest:
    def test_it_finds_a_wrong_kernel(self):
        @ferry.custom_op("samples_k::twice", kernel=lambda x: x * 3)
        def twice(x: Tensor) -> Tensor:
            return x * 2

        with pytest.raises(AssertionError, match="seed 0"):
            assert_op(twice, [((2, 3),)], ["reference"])

    def test_it_finds_an_operator_that_returns_its_argument(self):
        @ferry.custom_op("samples_l::same", symbolic=lambda g, x: g.op("Identity", x))
        def same(x: Tensor) -> Tensor:
            return x

        with pytest.raises((AssertionError, ferry.TorchferryError), match="alias|opcheck"):
            assert_op(same, [((2, 3),)], ["reference"])

    def test_it_finds_a_wrong_fake(self):
        @ferry.custom_op("samples_m::flat", symbolic=lambda g, x: g.op("Flatten", x), fake=torch.empty_like)
        def flat(x: Tensor) -> Tensor:
            return x.flatten(1).clone()

        with pytest.raises(AssertionError, match="opcheck refuses 'samples_m::flat' at case 1"):
            assert_op(flat, [((2, 3, 4),)], ["reference"])


class TestWhatIsRefused:
    def test_a_name_without_a_namespace(self):
        with pytest.raises(ConfigError, match="'add' has no namespace"):
            ferry.custom_op("add")

    def test_a_symbolic_and_a_composition(self):
        with pytest.raises(ConfigError, match="a symbolic and a composition"):
            ferry.custom_op("samples::add", symbolic=lambda g: g, composition=lambda g: g)

    def test_no_annotations(self):
        with pytest.raises(ConfigError, match="has no schema") as caught:
            ferry.custom_op("samples::add")(lambda x: x)
        assert "annotate" in caught.value.hint

    def test_kernels_of_lists(self):
        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors)

        with pytest.raises(ConfigError, match="cannot take 'tensors', a list"):
            ferry.custom_op("samples_n::joined", kernel=lambda tensors: tensors)(joined)

    @pytest.mark.parametrize("dtypes", [(["float32"], ["complex"]), (["float32", "float32"], ["float32"])])
    def test_dtypes_of_kernels(self, dtypes):
        def plain(x: Tensor) -> Tensor:
            return x + 1

        with pytest.raises(ConfigError, match=r"has the dtype 'complex'|for 2 inputs and 1 outputs"):
            ferry.custom_op(f"samples_o::plain{len(dtypes[0])}", kernel=abs, kernel_dtypes=dtypes)(plain)


def test_a_package_finds_the_kernel_of_the_process_that_opens_it(tmp_path):
    module = tmp_path / "kernel_module.py"
    module.write_text(
        "from torchferry.core.kernels import Kernel, register_kernel\n"
        "register_kernel(Kernel('samples_p::Negated', lambda x: -x, ('float32',)))\n"
    )

    @ferry.custom_op("samples_p::negated", kernel=lambda x: -x)
    def negated(x: Tensor) -> Tensor:
        return -x

    exported = export(negated, torch.rand(2))
    code = (
        "import numpy, torchferry\n{}\n"
        "with torchferry.load('{}').open() as session:\n"
        "    print(session.run({{'x': numpy.ones(2, numpy.float32)}}))\n"
    )
    for name in ("onnxruntime", "openvino"):
        ferry.pack(ferry.compile(exported, ferry.Target(name), tmp_path / name), tmp_path / f"{name}_package")
        run = [
            subprocess.run(
                [sys.executable, "-c", code.format(line, f"{name}_package")],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            for line in ("import kernel_module", "")
        ]
        assert (run[0].returncode, run[0].stderr) == (0, "")
        assert "array([-1., -1.]" in run[0].stdout
        assert run[1].returncode == 1
        assert "import the module that gives 'samples_p::Negated' a kernel" in run[1].stderr
