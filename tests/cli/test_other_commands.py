"""``torchferry export``, ``compile`` and ``verify``, end to end."""

import random

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from torchferry.package import load

GIVEN = ("--model", "net.py:net", "--input", "picture.png")


@pytest.fixture
def foreign(place):
    """An ONNX file that another tool made."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "a"], ["sum"]), helper.make_node("Relu", ["sum"], ["b"])],
        "foreign",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, ["rows", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, place / "foreign.onnx")
    return place / "foreign.onnx"


def test_export(ferry, place):
    ran = ferry("export", *GIVEN, "--dynamic", "x:0=n", "--output-names", "y", "-o", "net.onnx")
    assert (ran.status, ran.out, ran.err) == (0, "net.onnx\n", "")
    model = onnx.load(place / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    [given], [result] = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("x", "y")
    assert given.type.tensor_type.shape.dim[0].dim_param == "n"


def test_export_as_json_in_place_of_what_was_there(ferry, place):
    (place / "net.onnx").write_text("old")
    values = ferry("export", *GIVEN, "-o", "net.onnx", "--json").values
    assert values["model"] == "net.onnx"
    assert values["report"]["passed"] is True
    assert [step["name"] for step in values["steps"]] == ["import torch", "load model and data", "export"]
    onnx.checker.check_model(place / "net.onnx")


def test_export_with_marks(ferry, place):
    (place / "marked.py").write_text(
        "import torch\nimport torchferry\nclass Marked(torch.nn.Module):\n"
        "    @torchferry.mark('body')\n    def forward(self, x):\n        return x * 2\n"
    )
    for flags, expected in (((), ["Mul"]), (("--marks",), ["Mark", "Mul", "Mark"])):
        ran = ferry("export", "--model", "marked.py:Marked", "--input", "picture.png", "-o", "net.onnx", *flags)
        assert ran.status == 0
        assert [node.op_type for node in onnx.load(place / "net.onnx").graph.node] == expected


def test_export_of_what_cannot_be_exported(ferry, place, tree):
    (place / "looks.py").write_text(
        "import torch\nclass Looks(torch.nn.Module):\n    def forward(self, x):\n"
        "        return x * 2 if x.sum() > 0 else x\n"
    )
    before = tree(place)
    refusal = ferry("export", "--model", "looks.py:Looks", "--input", "picture.png", "-o", "net.onnx").refusal
    assert "torch cannot export Looks" in refusal
    assert f"{place}/looks.py:4 in forward: return x * 2 if x.sum() > 0 else x" in refusal
    assert tree(place) == before


def test_export_of_a_dimension_that_the_model_fixes(ferry, place):
    (place / "fixes.py").write_text(
        "import torch\nclass Fixes(torch.nn.Module):\n    def forward(self, x):\n"
        "        return x.reshape(x.shape[0], 3, 48)\n"
    )
    given = ["--model", "fixes.py:Fixes", "--input", "picture.png", "--dynamic", "x:2=h"]
    refusal = ferry("export", *given, "-o", "net.onnx").refusal
    assert "declared dynamic, but the model fixes 'h' (axis 2 of 'x') to 6" in refusal
    assert "fixes.py:4" in refusal


def test_compile_what_we_exported(ferry, place):
    assert ferry("export", *GIVEN, "--dynamic", "x:2=h,3=w", "-o", "net.onnx").status == 0
    values = ferry("compile", "net.onnx", "-o", "out", "--json").values
    assert values["package"] == "out"
    assert [step["name"] for step in values["steps"]] == ["compile for onnxruntime-fp32", "pack"]
    package = load(place / "out")
    assert package.manifest.name == "net"
    assert package.manifest.verified is None
    assert str(package.signature.dims["h"]) == "1..", "the ranges that export settled"


def test_ranges_of_dimensions_are_given_while_exporting_or_compiling(ferry, place, foreign):
    assert ferry("export", *GIVEN, "--dynamic", "x:2=h=4..9,3=w", "-o", "net.onnx").status == 0
    assert ferry("compile", "net.onnx", "--range", "h=1..8", "-o", "net").status == 0
    assert str(load(place / "net").signature.dims["h"]) == "4..8"
    assert ferry("compile", foreign, "--range", "rows=2..3", "-o", "out").status == 0
    np.savez(place / "a.npz", a=np.zeros((4, 2), np.float32))
    assert "'rows' = 4 is outside" in ferry("run", "out", "--input", "a.npz", "--output", "b.npz").refusal


@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
def test_compile_what_somebody_else_exported(ferry, place, foreign, engine):
    ran = ferry("compile", foreign, "-o", "out", "--backend", engine)
    assert ran.status == 0
    assert "proof   none" in ran.out
    a = np.float32([[1, -2], [3, 4], [0, -1]])
    np.savez(place / "a.npz", a=a)
    assert ferry("run", "out", "--input", "a.npz", "--output", "b.npz").status == 0
    with np.load(place / "b.npz") as outputs:
        np.testing.assert_array_equal(outputs["b"], np.maximum(2 * a, 0))


@pytest.mark.parametrize(
    ("arguments", "status", "fragment"),
    [
        (["missing.onnx"], 1, "ONNX model 'missing.onnx' does not exist"),
        (["."], 1, "ONNX model '.' is a folder"),
        (["empty.onnx"], 1, "'empty.onnx' is not an ONNX model"),
        (["text.onnx"], 1, "'text.onnx' is not a whole ONNX model"),
        (["foreign.onnx", "--backend", "onnxrutime"], 1, "did you mean 'onnxruntime'"),
        (["foreign.onnx", "--precision", "fp16"], 1, "it offers fp32"),
        (["foreign.onnx", "--precision", "fp31"], 2, "did you mean 'fp32'"),
        (["unknown.onnx"], 1, "ONNX Runtime has no operator Unheard"),
        (["foreign.onnx", "--range", "rows=1-8"], 2, "--range 'rows=1-8' must look like batch=1..8"),
        (["foreign.onnx", "--range", "row=1..8"], 2, "no dynamic dimension 'row'"),
        (["foreign.onnx", "--device", "cuda"], 1, "'onnxruntime' runs on 'cpu' here, not on 'cuda'"),
    ],
)
def test_compile_what_cannot_be(ferry, place, foreign, arguments, status, fragment):
    (place / "empty.onnx").touch()
    (place / "text.onnx").write_text("this is a text, and no graph is in it")
    unknown = onnx.load(foreign)
    unknown.graph.node[1].op_type = "Unheard"
    onnx.save(unknown, place / "unknown.onnx")
    ran = ferry("compile", *arguments, "-o", "out")
    assert fragment in ran.refusal
    assert ran.status == status
    assert not (place / "out").exists()


def test_compile_damaged_files(ferry, place, foreign, tree):
    whole = foreign.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.5:
            data = data[: rng.randrange(1, len(data))]
        else:
            data[rng.randrange(len(data))] = rng.randrange(256)
        (place / "damaged.onnx").write_bytes(data)
        ran = ferry("compile", "damaged.onnx", "-o", "out", "--overwrite")
        if ran.status == 0:  # the damage was to a name, say
            load(place / "out")
        else:
            assert ran.refusal, data
    assert {path.name for path in place.iterdir()} <= {"damaged.onnx", "foreign.onnx", "net.py", "out", "picture.png"}


def test_verify(ferry, package, place):
    ran = ferry("verify", package, *GIVEN, "--report", "report.json")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("verification of Net on onnxruntime-fp32: passed\n")
    assert (place / "report.json").exists()


def test_verify_against_other_weights_fails(ferry, package, place):
    (place / "other.py").write_text("import torch\ndef net():\n    torch.manual_seed(1)\n"
                                    "    return torch.nn.Conv2d(3, 3, 3, padding=1)\n")  # fmt: skip
    given = ["--model", "other.py:net", "--input", "picture.png", "--input-names", "x"]
    ran = ferry("verify", package, *given, "--report", "report.html", "--json")
    assert (ran.status, ran.err) == (1, "")
    assert ran.values["report"]["passed"] is False
    assert {finding["code"] for finding in ran.values["report"]["findings"]} == {"output-differs"}
    assert "FAILED" in (place / "report.html").read_text() or "failed" in (place / "report.html").read_text()


def test_verify_takes_the_names_of_the_package(ferry, deploy, package):
    assert deploy("--input-names", "image").status == 0
    assert ferry("verify", "out", *GIVEN).status == 0


def test_verify_every_engine_or_the_one_that_is_named(ferry, deploy):
    assert deploy("--set", "targets=[{backend='onnxruntime'}, {backend='reference'}]").status == 0
    steps = [step["name"] for step in ferry("verify", "out", *GIVEN, "--json").values["steps"]]
    assert steps[2:] == ["verify onnxruntime-fp32", "verify reference-fp32"]
    steps = [step["name"] for step in ferry("verify", "out", *GIVEN, "--target", "reference", "--json").values["steps"]]
    assert steps[2:] == ["verify reference-fp32"]
    assert (
        "has no engine 'referenz'\n  hint: did you mean 'reference'"
        in ferry("verify", "out", *GIVEN, "--target", "referenz").refusal
    )


def test_verify_a_package_that_was_changed(ferry, deploy, place):
    assert deploy().status == 0
    engine = place / "out" / "engines" / "onnxruntime-fp32" / "model.onnx"
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    for command in (["verify", "out", *GIVEN], ["run", "out", "--input", "picture.png", "--output", "y.png"]):
        assert "file 'engines/onnxruntime-fp32/model.onnx' of package 'out' has changed" in ferry(*command).refusal


def test_inspect(ferry, place):
    (place / "tree.py").write_text(
        "import torch\nimport torchferry\nclass Tree(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.stem = torch.nn.Conv2d(3, 4, 3)\n"
        "        self.blocks = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.ReLU())\n"
        "    @torchferry.mark('tree', inputs=['image'])\n"
        "    def forward(self, x):\n        return self.blocks(self.stem(x))\n"
    )
    flags = ("--input", "picture.png", "--dynamic", "x:0=n", "--marks", "-o", "net.onnx", "--output-names", "y")
    assert ferry("export", "--model", "tree.py:Tree", *flags).status == 0
    ran = ferry("inspect", "net.onnx")
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[:2] == ["inputs", lines[1]]
    assert lines[1].startswith("  x: float32[n, 3, ")
    assert "  n 0.." in lines
    assert "  132, 0.00 MiB" in lines
    assert "  ai.onnx: Conv x2, Relu x1" in lines
    assert [line.split(" [")[0] for line in lines if "tree[0]" in line] == [
        "  tree[0]:input image",
        "  tree[0]:output output",
    ]
    modules = {line.split()[0]: line.split()[1::2] for line in lines[lines.index("modules") + 1 :]}
    assert modules == {
        "(root)": ["5", "132"], "stem": ["1", "112"], "blocks": ["2", "20"], "0": ["1", "20"], "1": ["1", "0"],
    }  # fmt: skip
    assert "    0" not in ferry("inspect", "net.onnx", "--depth", "1").out
    values = ferry("inspect", "net.onnx", "--json").values
    assert values["parameters"] == 132
    assert {row["path"] for row in values["modules"]} == {"", "stem", "blocks", "blocks.0", "blocks.1"}


def test_inspect_what_somebody_else_exported(ferry, foreign):
    out = ferry("inspect", str(foreign)).out
    assert "  a: float32[rows, 2]" in out
    assert "  ai.onnx 13" in out
    assert "modules" not in out


def test_inspect_what_is_no_model(ferry, place):
    assert "is not a whole ONNX model" in ferry("inspect", "picture.png").refusal
    assert "absent.onnx" in ferry("inspect", "absent.onnx").refusal


def test_partition(ferry, foreign, place):
    ran = ferry("partition", str(foreign), "--start", "a", "--end", "sum", "-o", "first.onnx")
    assert (ran.status, ran.out, ran.err) == (0, "first.onnx\n", "")
    model = onnx.load(place / "first.onnx")
    assert ([node.op_type for node in model.graph.node], model.graph.output[0].name) == (["Add"], "sum")
    values = ferry("partition", str(foreign), "--start", "sum", "--json").values
    assert (values["model"], values["inputs"]) == ("part.onnx", ["sum: float32[rows, 2]"])
    assert [node.op_type for node in onnx.load(place / "part.onnx").graph.node] == ["Relu"]


def test_partition_of_what_is_not_there(ferry, foreign, place, tree):
    before = tree(place)
    ran = ferry("partition", str(foreign), "--start", "summ", "-o", "first.onnx")
    assert ran.status == 2
    assert "summ" in ran.err
    assert "'sum'" in ran.err
    assert tree(place) == before


class TestInt8:
    """``compile --precision int8`` of a file that another tool made."""

    @pytest.fixture
    def product(self, place):
        rng = np.random.default_rng(0)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["a", "w"], ["b"])],
            "product",
            [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["rows", 16])],
            [helper.make_tensor_value_info("b", TensorProto.FLOAT, ["rows", 8])],
            [numpy_helper.from_array(rng.standard_normal((16, 8), np.float32), "w")],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "product.onnx")
        np.savez(place / "data.npz", a=rng.standard_normal((32, 16), np.float32))
        np.savez(place / "more.npz", a=rng.standard_normal((8, 16), np.float32))
        return "product.onnx"

    def test_it_is_quantised_on_the_data(self, ferry, place, product):
        given = ("--target", "openvino", "--precision", "int8", "--input", "data.npz", "--input", "more.npz")
        ran = ferry("compile", product, *given, "-o", "out")
        assert (ran.status, ran.err) == (0, "")
        assert "engine  openvino-int8" in ran.out
        x = np.load(place / "data.npz")["a"]
        want = x @ numpy_helper.to_array(onnx.load(product).graph.initializer[0])
        with load(place / "out").open() as session:
            got = session.run({"a": x})["b"]
        assert 0 < np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)

    def test_one_call_is_warned_of_and_json_tells_the_steps(self, ferry, product):
        given = ("--precision", "int8", "--input", "data.npz", "-o", "out")
        ran = ferry("compile", product, *given)
        assert ran.err.startswith("warning: the graph was quantised on one call")
        values = ferry("compile", product, *given, "--overwrite", "--json").values
        assert [step["name"] for step in values["steps"]] == ["quantize", "compile for onnxruntime-int8", "pack"]

    def test_what_is_refused(self, ferry, place, product, tree):
        before = tree(place)
        assert "int8 needs data to quantise on" in ferry("compile", product, "--precision", "int8", "-o", "o").refusal
        assert "--precision int8 asks for" in ferry("compile", product, "--input", "data.npz", "-o", "o").refusal
        given = ("--precision", "int8", "--input", "a=1,2")
        assert "input 'a' must have 2 dimensions" in ferry("compile", product, *given, "-o", "o").refusal
        assert tree(place) == before

    def test_a_file_that_is_quantised_already_needs_no_data(self, ferry, place, product):
        import torchferry

        data = [(np.load(place / f"{name}.npz")["a"],) for name in ("data", "more")]
        torchferry.quantize(product, data).save("quantised.onnx")
        assert ferry("compile", "quantised.onnx", "--precision", "int8", "-o", "out").status == 0
        assert "would be computed in int8" in ferry("compile", "quantised.onnx", "-o", "other").refusal
