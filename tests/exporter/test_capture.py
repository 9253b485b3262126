"""Names, structure, provenance and errors of ``ferry.export``."""

import threading
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import torchferry as ferry
from torchferry.core.errors import ConfigError, ExportError, InputError, ModelError, OperatorError
from torchferry.core.target import Target


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


def outputs(exported, tmp_path, **inputs):
    engine = ferry.compile(exported, Target(), tmp_path / "engine", overwrite=True)
    with engine.open() as session:
        return session.run({name: np.asarray(value) for name, value in inputs.items()})


def only(values):
    (value,) = values.values()
    return value


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)])

    def forward(self, image):
        image = torch.relu(self.stem(image))
        for block in self.blocks:
            image = block(image)
        return image.mean(dim=(2, 3))


class TestNames:
    def test_inputs_take_the_parameters_names(self):
        class Model(nn.Module):
            def forward(self, left, right, *, bias):
                return left @ right + bias

        exported = ferry.export(Model().eval(), (torch.rand(2, 3), torch.rand(3, 4)), {"bias": torch.rand(4)})
        assert exported.signature.input_names == ("left", "right", "bias")
        assert [value.name for value in exported.model.graph.inputs] == ["left", "right", "bias"]

    def test_chosen_names_win_and_may_be_fewer(self):
        class Model(nn.Module):
            def forward(self, left, right):
                return left + right, left - right

        arguments = (torch.rand(2), torch.rand(2))
        exported = ferry.export(Model().eval(), arguments, input_names=["a"], output_names=["total"])
        assert exported.signature.input_names == ("a", "right")
        assert exported.signature.output_names[0] == "total"

    def test_nested_inputs_are_named_by_their_path(self, tmp_path):
        class Model(nn.Module):
            def forward(self, feats, aux, pair, *rest, scale=None):
                return feats[0] + feats[1] * aux["k"] - pair.second + rest[1] * scale

        call = ([torch.rand(3), torch.rand(3)], {"k": torch.rand(3)}, Pair(torch.rand(3), torch.rand(3)))
        call = (*call, torch.rand(3), torch.rand(3))
        kwargs = {"scale": torch.rand(3)}
        exported = ferry.export(Model().eval(), call, kwargs)
        names = ("feats.0", "feats.1", "aux.k", "pair.first", "pair.second", "rest.0", "rest.1", "scale")
        assert exported.signature.input_names == names
        tensors = [*call[0], call[1]["k"], *call[2], *call[3:], kwargs["scale"]]
        got = outputs(exported, tmp_path, **{n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        want = Model()(*call, **kwargs).numpy()
        np.testing.assert_allclose(next(iter(got.values())), want, rtol=1e-6)

    def test_a_name_that_the_graph_uses_inside_is_made_free(self, tmp_path):
        class Model(nn.Module):
            def forward(self, x):
                return (x + 1) * 2

        inner = next(v.name for n in ferry.export(Model().eval(), torch.rand(2)).model.graph for v in n.outputs)
        exported = ferry.export(Model().eval(), torch.ones(2), input_names=[inner], output_names=["y"])
        np.testing.assert_array_equal(outputs(exported, tmp_path, **{inner: np.ones(2, np.float32)})["y"], [4, 4])

    @pytest.mark.parametrize(
        "names", [{"input_names": ["a", "b"]}, {"output_names": ["a", "b"]}, {"input_names": ["y"]}]
    )
    def test_names_that_cannot_be_used_are_refused(self, names):
        class Model(nn.Module):
            def forward(self, x):
                return x + 1

        class Two(nn.Module):
            def forward(self, x, y):
                return x + y

        model, arguments = (
            (Two(), (torch.rand(2), torch.rand(2))) if names == {"input_names": ["y"]} else (Model(), torch.rand(2))
        )
        with pytest.raises(ferry.TorchferryError, match="names|name"):
            ferry.export(model.eval(), arguments, **names)


class TestStructure:
    def test_constants_and_none_are_no_inputs(self, tmp_path):
        class Model(nn.Module):
            def forward(self, x, times, mode, mask=None):
                return x * times if mode == "mul" and mask is None else x

        exported = ferry.export(Model().eval(), (torch.ones(2), 3, "mul"))
        assert exported.signature.input_names == ("x",)
        np.testing.assert_array_equal(only(outputs(exported, tmp_path, x=np.ones(2, np.float32))), [3, 3])

    def test_an_unused_input_stays(self, tmp_path):
        class Model(nn.Module):
            def forward(self, x, unused):
                return x + 1

        exported = ferry.export(Model().eval(), (torch.ones(2), torch.ones(3)))
        assert exported.signature.input_names == ("x", "unused")
        outputs(exported, tmp_path, x=np.ones(2, np.float32), unused=np.ones(3, np.float32))

    def test_outputs_are_flattened_in_order(self, tmp_path):
        class Model(nn.Module):
            def forward(self, x):
                return {"a": x + 1, "b": [x + 2, Pair(x + 3, None)]}

        exported = ferry.export(Model().eval(), torch.zeros(1), output_names=["a", "b", "c"])
        got = outputs(exported, tmp_path, x=np.zeros(1, np.float32))
        assert [float(v[0]) for v in got.values()] == [1, 2, 3]

    def test_an_input_returned_as_it_is(self, tmp_path):
        class Model(nn.Module):
            def forward(self, x):
                return x, x + 1, x

        exported = ferry.export(Model().eval(), torch.zeros(1), output_names=["same", "more", "again"])
        got = outputs(exported, tmp_path, x=np.float32([5]))
        assert {name: float(value[0]) for name, value in got.items()} == {"same": 5, "more": 6, "again": 5}

    def test_one_tensor_given_twice(self):
        class Model(nn.Module):
            def forward(self, x, y):
                return x + y.sum()

        x = torch.rand(3, 2)
        exported = ferry.export(Model().eval(), (x, x), dynamic_shapes={"x": {0: "n"}, "y": {1: "m"}})
        assert [spec.shape for spec in exported.signature.inputs] == [("n", 2), (3, "m")]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8])
    def test_dtypes(self, dtype, tmp_path):
        class Model(nn.Module):
            def forward(self, x):
                return x.flip(0)

        x = torch.tensor([1, 0, 1]).to(dtype)
        exported = ferry.export(Model().eval(), x)
        assert exported.signature.inputs[0].dtype == x.numpy().dtype.name
        np.testing.assert_array_equal(only(outputs(exported, tmp_path, x=x.numpy())), x.flip(0).numpy())


class TestState:
    def test_training_mode_is_found_and_left_as_it_was(self, tmp_path):
        model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 3)).train()
        model[1].eval()
        exported = ferry.export(model, torch.rand(2, 3))
        assert [finding.code for finding in exported.report.findings] == ["training-mode"]
        assert [module.training for module in model.modules()] == [True, True, False]
        x = torch.rand(2, 3)
        got = only(outputs(exported, tmp_path, input=x.numpy()))
        np.testing.assert_allclose(got, model[1](x).detach().numpy(), rtol=1e-5, atol=1e-6)

    def test_parameters_are_shared_not_copied(self):
        model = nn.Linear(64, 64).eval()
        exported = ferry.export(model, torch.rand(2, 64))
        addresses = {
            value.const_value.raw.data_ptr()
            for value in exported.model.graph.initializers.values()
            if isinstance(getattr(value.const_value, "raw", None), torch.Tensor)
        }
        assert model.weight.data_ptr() in addresses

    def test_nothing_stays_patched(self):
        before = ShapeEnv.__dict__["_get_sloc"]

        class Failing(nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x

        with pytest.raises(ExportError):
            ferry.export(Failing().eval(), torch.rand(3), dynamic_shapes={"x": {0: "n"}})
        ferry.export(nn.ReLU().eval(), torch.rand(3), dynamic_shapes={"input": {0: "n"}})
        assert ShapeEnv.__dict__["_get_sloc"] is before


class TestProvenance:
    def test_every_node_knows_its_module_and_line(self):
        exported = ferry.export(
            TwoConvolutions().eval(), torch.rand(1, 3, 8, 8), dynamic_shapes={"image": {0: "n", 2: "h"}}
        )
        nodes = list(exported.model.graph)
        assert nodes
        assert all(exported.provenance(node).source for node in nodes)
        modules = {exported.provenance(node).module for node in nodes if node.op_type == "Conv"}
        assert modules <= {"stem", "blocks.0", "blocks.1"}
        assert {"stem"} < modules
        relu = next(node for node in nodes if node.op_type == "Relu")
        assert exported.provenance(relu).source.startswith(f"{__file__}:")
        assert "torch.relu(self.stem(image))" in exported.provenance(relu).source

    def test_it_survives_in_the_file(self, tmp_path):
        exported = ferry.export(TwoConvolutions().eval(), torch.rand(1, 3, 8, 8))
        exported.save(tmp_path / "m.onnx")
        loaded = ir.load(tmp_path / "m.onnx")
        assert [exported.provenance(a) for a in exported.model.graph] == [exported.provenance(b) for b in loaded.graph]


class TestErrors:
    def test_a_data_dependent_branch_names_the_users_line(self, capsys):
        class Model(nn.Module):
            def forward(self, x):
                if x.sum() > 3:
                    x = x + 1
                return x

        with pytest.raises(ExportError) as caught:
            ferry.export(Model().eval(), torch.rand(3))
        assert caught.value.where.startswith(f"{__file__}:")
        assert "if x.sum() > 3" in caught.value.where
        assert caught.value.hint
        assert capsys.readouterr() == ("", "")

    def test_a_forward_that_fails_in_pytorch_is_not_blamed_on_the_export(self):
        class Model(nn.Module):
            def forward(self, x):
                return x @ torch.rand(7, 7)

        with pytest.raises(ModelError, match="before any export") as caught:
            ferry.export(Model().eval(), torch.rand(2, 3))
        assert "x @ torch.rand(7, 7)" in caught.value.where

    def test_an_operator_without_a_translation_names_the_users_line(self):
        class Model(nn.Module):
            def forward(self, x):
                return torch.linalg.eigvalsh(x)

        with pytest.raises(ExportError) as caught:
            ferry.export(Model().eval(), torch.eye(3))
        assert "torch.linalg.eigvalsh(x)" in caught.value.where
        assert "eigh" in caught.value.message

    @pytest.mark.parametrize("arguments", [(), (torch.rand(2), torch.rand(2)), {"z": torch.rand(2)}])
    def test_arguments_that_do_not_fit_forward(self, arguments):
        class Model(nn.Module):
            def forward(self, x):
                return x

        with pytest.raises(InputError, match="forward"):
            ferry.export(Model().eval(), arguments)

    def test_a_function_is_not_a_module(self):
        with pytest.raises(ModelError, match="torch.nn.Module"):
            ferry.export(lambda x: x, torch.rand(2))

    def test_inputs_of_another_type(self):
        with pytest.raises(InputError, match="tuple"):
            ferry.export(nn.ReLU().eval(), 3.0)

    def test_a_source_brings_everything_itself(self):
        source = ferry.Source(nn.ReLU().eval(), torch.rand(2))
        assert ferry.export(source).signature.input_names == ("input",)
        with pytest.raises(ConfigError, match="Source"):
            ferry.export(source, torch.rand(2))

    @pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 21, 24])
    def test_every_opset_that_can_be_converted_to_is_delivered(self, opset, tmp_path):
        model = TwoConvolutions().eval()
        target = Target(opset=opset)
        exported = ferry.export(model, torch.rand(1, 3, 8, 8), target=target, dynamic_shapes={"image": {0: "n"}})
        assert exported.model.opset_imports[""] == opset
        mean = next(node for node in exported.model.graph if node.op_type == "ReduceMean")
        assert "return image.mean(dim=(2, 3))" in str(exported.provenance(mean))
        image = torch.rand(3, 3, 8, 8)
        with torch.no_grad():
            expected = model(image)
        np.testing.assert_allclose(only(outputs(exported, tmp_path, image=image)), expected, atol=1e-5)

    def test_an_opset_that_cannot_be_converted_to_names_the_operator_and_its_line(self):
        class Model(nn.Module):
            def forward(self, x):
                return torch.tril(x)

        with pytest.raises(OperatorError, match="Trilu.* 13") as caught:
            ferry.export(Model().eval(), torch.rand(3, 3), target=Target(opset=13))
        assert "return torch.tril(x)" in caught.value.where
        assert "opset 14" in caught.value.hint


def test_constants_that_torch_forgets_are_in_the_graph(tmp_path):
    class Model(nn.Module):
        def forward(self, x):
            y = x.floor()
            return y.clamp(0, 6).long() * 2, y.clamp(0, 6).long() + 1

    exported = ferry.export(Model().eval(), torch.rand(3, 4))
    x = torch.linspace(-9, 9, 12).reshape(3, 4)
    for got, expected in zip(outputs(exported, tmp_path, x=x).values(), Model()(x), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_target_without_its_engine_can_be_exported_for():
    exported = ferry.export(
        nn.ReLU().eval(), torch.rand(2, 3), target=Target("tensorrt"), dynamic_shapes={"input": {0: "n"}}
    )
    assert 1 in exported.signature.dims["n"]


def test_exporting_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(ferry.export(nn.ReLU().eval(), torch.rand(2))))
    thread.start()
    thread.join()
    assert results[0].signature.input_names == ("input",)
