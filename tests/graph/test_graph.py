"""Reading graphs in every form, saving them whole, and refusing what is not one."""

import errno

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from torchferry.core.errors import FormatError, MissingFileError, OutputError
from torchferry.core.signature import DimRange, Relation, Signature, TensorSpec
from torchferry.core.target import Target
from torchferry.graph import as_exported, exported, provenance
from torchferry.graph.provenance import user_line


@pytest.fixture
def model() -> onnx.ModelProto:
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.arange(16, dtype=np.float32).tobytes(), raw=True)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    made = helper.make_model(
        helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights]),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    made.ir_version = 10
    return made


class TestReading:
    def test_every_form_gives_the_same_signature(self, model, tmp_path):
        onnx.save(model, tmp_path / "m.onnx")

        class Program:
            model_proto = model

        program = Program()
        program.model = ir.from_proto(model)
        read = as_exported(tmp_path / "m.onnx")
        assert as_exported(read) is read
        for form in (str(tmp_path / "m.onnx"), model, ir.from_proto(model), program):
            assert as_exported(form).signature == read.signature
        assert read.signature == Signature(
            (TensorSpec("x", "float32", ("batch", 4)),),
            (TensorSpec("y", "float32", ("batch", 4)),),
            {"batch": DimRange()},
        )

    def test_sizes_that_follow_from_no_input_are_unknown(self, model):
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "unk__7"
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "batch + 2"
        assert as_exported(model).signature.outputs[0].shape == (None, "batch + 2")
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "?? what"
        assert as_exported(model).signature.outputs[0].shape == (None, None)

    def test_sizes_of_inputs_without_a_name_get_one(self, model):
        sizes = model.graph.input[0].type.tensor_type.shape.dim
        sizes[0].dim_param = "batch size"
        sizes[1].dim_value = -1
        model.graph.input[0].name = model.graph.node[0].input[0] = "images/x:0"
        signature = as_exported(model).signature
        assert signature.inputs[0].shape == ("images_x_0_0", "images_x_0_1")
        assert signature.dims == {"images_x_0_0": DimRange(), "images_x_0_1": DimRange()}

    def test_nodes_in_no_order_are_sorted_and_onnxs_own_domain_has_one_name(self, model):
        model.opset_import[0].domain = "ai.onnx"
        model.graph.node[0].output[0] = "inside"
        model.graph.node.insert(0, helper.make_node("Neg", ["inside"], ["y"]))
        read = as_exported(model).model
        assert [node.op_type for node in read.graph][-1] == "Neg"
        assert dict(read.opset_imports) == {"": model.opset_import[0].version}

    def test_an_initializer_among_the_inputs_is_no_input(self, model):
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
        assert as_exported(model).signature.input_names == ("x",)

    @pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"PK\x03\x04"])
    def test_what_is_no_onnx_file_is_refused_by_name(self, content, tmp_path):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(FormatError, match="m.onnx"):
            as_exported(tmp_path / "m.onnx")

    def test_a_truncated_file(self, model, tmp_path):
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString()[:-20])
        with pytest.raises(FormatError, match="m.onnx"):
            as_exported(tmp_path / "m.onnx")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(MissingFileError, match="m.onnx"):
            as_exported(tmp_path / "m.onnx")
        with pytest.raises(MissingFileError, match="folder"):
            as_exported(tmp_path)

    @pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
    def test_external_data_outside_the_folder_is_never_read(self, model, tmp_path, location):
        folder = tmp_path / "model"
        folder.mkdir()
        (tmp_path / "secret").write_bytes(bytes(64))
        weights = model.graph.initializer[0]
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "64")):
            weights.external_data.add(key=key, value=value)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(FormatError, match="outside its own folder"):
            as_exported(folder / "m.onnx")

    def test_missing_external_data_is_named(self, model, tmp_path):
        onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1)
        (tmp_path / "weights.bin").unlink()
        with pytest.raises(MissingFileError, match="weights.bin"):
            as_exported(tmp_path / "m.onnx")

    def test_a_damaged_signature_is_refused(self, model):
        model.metadata_props.add(key=exported.SIGNATURE_KEY, value="{}")
        with pytest.raises(FormatError, match="signature"):
            as_exported(model)


class TestSaving:
    def test_the_signature_survives(self, model, tmp_path):
        read = as_exported(model)
        dims = {"batch": DimRange(4, 9, {5: "unlucky"}, "net.py:3")}
        signature = Signature(read.signature.inputs, read.signature.outputs, dims, (Relation("batch % 2 == 0", "x"),))
        read.replace(signature=signature).save(tmp_path / "m.onnx")
        assert as_exported(tmp_path / "m.onnx").signature == signature
        onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    def test_large_weights_become_external_data(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(exported, "EXTERNAL_DATA_BYTES", 32)
        monkeypatch.setattr("onnx_ir.save", lambda *a, **k: real(*a, **{**k, "size_threshold_bytes": 16}))
        as_exported(model).save(tmp_path / "m.onnx")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
        loaded = onnx.load(tmp_path / "m.onnx")
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]).ravel(), np.arange(16))
        again = as_exported(tmp_path / "m.onnx")
        again.save(tmp_path / "m.onnx")  # over the very data that it reads
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0]).ravel(), np.arange(16)
        )

    def test_a_full_disk_keeps_the_old_file(self, model, tmp_path, monkeypatch):
        read = as_exported(model)
        read.save(tmp_path / "m.onnx")
        before = (tmp_path / "m.onnx").read_bytes()

        def full(model, path, **options):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("onnx_ir.save", full)
        with pytest.raises(OutputError, match="the disk is full"):
            read.save(tmp_path / "m.onnx")
        assert (tmp_path / "m.onnx").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

    def test_a_folder_that_is_not_there(self, model, tmp_path):
        with pytest.raises(OutputError, match="nowhere"):
            as_exported(model).save(tmp_path / "nowhere" / "m.onnx")


real = ir.save


def test_a_copy_elsewhere_brings_its_external_data_along(model, tmp_path):
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1)
    (tmp_path / "copy").mkdir()
    as_exported(tmp_path / "m.onnx").save(tmp_path / "copy" / "c.onnx")
    (tmp_path / "weights.bin").unlink()
    copied = onnx.load(tmp_path / "copy" / "c.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(copied.graph.initializer[0]).ravel(), np.arange(16))


class TestShowing:
    def test_a_line_for_people(self, model):
        assert str(as_exported(model)) == "(x: float32[batch, 4]) -> (y: float32[batch, 4]), 1 nodes, batch 0.."

    def test_statistics(self, model):
        statistics = as_exported(model, Target("reference")).statistics()
        assert statistics["nodes"] == "1"
        assert statistics["operators"] == "MatMul x1"
        assert statistics["parameters"] == "16"
        assert as_exported(model).weights_bytes == 64

    def test_a_node_of_a_foreign_graph_has_no_provenance(self, model):
        node = next(iter(as_exported(model).model.graph))
        assert provenance.provenance(node) == provenance.Provenance()
        assert str(provenance.provenance(node)) == "(root) at unknown line"

    def test_the_users_line_is_the_innermost_that_is_not_torchs(self):
        torch_file = provenance._library_folders()[0] + "nn/functional.py"
        trace = (
            'File "/me/outer.py", line 3, in forward\n    y = self.block(x)\n'
            'File "/me/inner.py", line 9, in forward\n    return F.relu(x)\n'
            f'File "{torch_file}", line 1700, in relu\n    result = torch.relu(input)\n'
        )
        assert user_line(trace) == "/me/inner.py:9 in forward: return F.relu(x)"
        assert user_line("") == ""
