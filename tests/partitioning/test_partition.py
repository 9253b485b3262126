"""Selectors, what survives a cut, and each refusal."""

import json
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from partition_graphs import MARK, assert_same, mark, model, node, proto_of, run, run_chain, values, weight

from torchferry.core.errors import ConfigError, FormatError, OutputError
from torchferry.core.signature import DimRange, Relation, Signature, TensorSpec
from torchferry.graph import as_exported
from torchferry.partitioning import join, partition, plan_partition

X = np.random.default_rng(3).standard_normal((2, 4)).astype(np.float32)
W = np.random.default_rng(4).standard_normal((4, 4)).astype(np.float32)


@pytest.fixture
def detector() -> onnx.ModelProto:
    """A backbone with two features, and a head that is called on each; marked and with module paths."""
    nodes = [
        mark("image", "image_m", "detector_forward", "input", 0, "image"),
        node("MatMul", "image_m w", "c4", "backbone.conv1"),
        node("Relu", "c4", "c5", "backbone.conv2"),
        mark("c4", "c4_m", "head", "input", 0, "feats.0"),
        mark("c5", "c5_m", "head", "input", 1, "feats.1"),
        node("MatMul", "c4_m w", "p4", "bbox_head.convs_pred"),
        node("MatMul", "c5_m w", "p5", "bbox_head.convs_pred"),
        node("Sigmoid", "p4", "s4", "bbox_head"),
        mark("s4", "s4_m", "level", "output", 0, "score"),
        node("Sigmoid", "p5", "s5", "bbox_head"),
        mark("s5", "s5_m", "level", "output", 0, "score", call=1),
        node("Concat", "s4_m s5_m", "both", axis=0),
        mark("both", "dets", "detector_forward", "output", 0, "dets"),
        node("Shape", "dets", "count"),
    ]
    info = values(
        "c4 float batch,4",
        "c5 float batch,4",
        "p4 float batch,4",
        "p5 float batch,4",
        "s4 float batch,4",
        "s5 float batch,4",
    )
    outputs = values("dets float 2*batch,4", "count int64 2")
    return model(nodes, values("image float batch,4"), outputs, [weight("w", W)], info)


def cut(graph, start, end, **more):
    (part,) = partition(graph, [{"start": start, "end": end, **more}])
    return part


def names(part) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return part.signature.input_names, part.signature.output_names


class TestSelectors:
    @pytest.mark.parametrize(
        ("start", "end", "inputs", "outputs"),
        [
            ("detector_forward:input", "head:input", ("image",), ("c4", "c5")),
            ("detector_forward[0]:input.0", ["head:input.1"], ("image",), ("c5",)),
            (["image"], "head:input.feats.0", ("image",), ("c4",)),
            ("image", "head:input.feats", ("image",), ("c4", "c5")),
            ("head:input", "level:output", ("c4", "c5"), ("s4",)),
            ("head:input", ["level:output", "level[1]:output.score"], ("c4", "c5"), ("s4", "s5")),
            ("head:input", "detector_forward:output", ("c4", "c5"), ("dets",)),
            ("backbone:input", "backbone:output", ("image",), ("c4", "c5")),
            ("backbone.conv1:output", "backbone.conv2:output", ("c4",), ("c5",)),
            ("bbox_head.convs_pred:input", "bbox_head.convs_pred:output", ("c4", "c5"), ("p4", "p5")),
            ("bbox_head:input", "bbox_head:output", ("c4", "c5"), ("s4", "s5")),
            ("bbox_head:input.1", "bbox_head:output.s5", ("c5",), ("s5",)),
            ("c5_m", "s5", ("c5",), ("s5",)),
        ],
    )
    def test_they_mean_the_tensors_of_their_boundary(self, detector, start, end, inputs, outputs):
        part = cut(detector, start, end)
        assert names(part) == (inputs, outputs)
        whole = {"image": X, **run(with_outputs(detector, "c4", "c5", "p4", "p5", "s4", "s5"), {"image": X})}
        assert_same(run(part, whole), {name: whole[name] for name in outputs})

    def test_starts_and_ends_may_be_left_out(self, detector):
        front, back = partition(detector, [{"end": "head:input"}, {"start": "head:input"}])
        assert names(front) == (("image",), ("c4", "c5"))
        assert names(back) == (("c4", "c5"), ("dets", "count"))

    def test_output_names_hold_on_both_sides(self, detector):
        front, back = partition(
            detector,
            [{"end": "head:input", "output_names": ["feat_0", "feat_1"]}, {"start": "head:input"}],
        )
        assert front.signature.output_names == back.signature.input_names == ("feat_0", "feat_1")
        assert_same(
            run_chain([back], run(front, {"image": X})) | {},
            {**run(front, {"image": X}), **run(detector, {"image": X})},
        )

    def test_an_output_may_take_the_name_of_an_inner_tensor(self, detector):
        part = cut(detector, "image", "c5", output_names="c4")
        assert names(part) == (("image",), ("c4",))
        whole = run(with_outputs(detector, "c5"), {"image": X})
        assert_same(run(part, {"image": X}), {"c4": whole["c5"]})

    def test_a_tensor_goes_before_a_mark_and_a_mark_before_a_module(self):
        nodes = [
            node("Relu", "x", "a", "f"),
            mark("a", "m", "f", "output", 0, "a"),
            node("Exp", "m", "b", "f"),
            node("Neg", "b", "f:input"),
            node("Abs", "f:input", "y"),
        ]
        graph = model(nodes, values("x float 2,4"), values("y float 2,4"))
        assert names(cut(graph, "x", "f:output"))[1] == ("a",)
        assert names(cut(graph, "x", "f:input"))[1] == ("f:input",)

    def test_a_mark_that_passes_an_input_to_an_output(self):
        nodes = [mark("x", "y", "f", "output"), mark("x", "z", "g", "output"), node("Relu", "y", "a")]
        graph = model(nodes, values("x float 2,4"), values("y float 2,4", "z float 2,4", "a float 2,4"))
        (whole,) = partition(graph, ["rest"])
        assert_same(run(whole, {"x": X}), run(graph, {"x": X}))
        assert all(each.domain == "" for each in whole.model.graph)
        assert names(cut(graph, "f:output", "a")) == (("x",), ("a",))

    @pytest.mark.parametrize(
        ("selector", "message", "hint"),
        [
            ("detector_foward:input", "no mark, module or tensor", "did you mean 'detector_forward:input'"),
            ("level[2]:output", "no mark, module or tensor", "'level:output'"),
            ("level:outputs", "no mark, module or tensor", "'level:output'"),
            ("bakbone:output", "no mark, module or tensor", "'backbone:output'"),
            ("zzzzzz", "no mark, module or tensor", "'detector_forward:input'"),
            ("head:input.2", "no tensor '2'", "0 ('feats.0'), 1 ('feats.1')"),
            ("bbox_head:input.c9", "no tensor 'c9'", "0 ('c4'), 1 ('c5')"),
            ("backbone[1]:output", "does not tell its calls apart", "ferry.mark"),
        ],
    )
    def test_one_that_means_nothing_names_the_nearest(self, detector, selector, message, hint):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            cut(detector, "image", selector, name="front")
        assert hint in caught.value.hint
        assert caught.value.where == "end of part 'front'"

    def test_a_module_that_nothing_goes_into(self):
        nodes = [node("Relu", "w", "a", "const"), node("Add", "x a", "y")]
        graph = model(nodes, values("x float 4,4"), values("y float 4,4"), [weight("w", W)])
        with pytest.raises(ConfigError, match="goes into the module 'const'"):
            cut(graph, "const:input", "y")

    @pytest.mark.parametrize("selector", ["inner", "f:input"])
    def test_one_inside_a_branch(self, selector):
        branch = helper.make_graph(
            [node("Relu", "x", "inner"), mark("inner", "marked", "f", "input"), node("Neg", "marked", "r")],
            "b", [], values("r float 2,4"),
        )  # fmt: skip
        nodes = [mark("x", "x_m", "g", "input"), node("If", "c", "y", then_branch=branch, else_branch=branch)]
        graph = model(nodes, values("c bool ", "x float 2,4"), values("y float 2,4"))
        with pytest.raises(ConfigError, match="inside a branch or loop, the If 'n_y'"):
            cut(graph, "x", selector)
        (whole,) = partition(graph, ["rest"])
        assert not [n for g in whole.model.graphs() for n in g if n.domain == MARK]
        feeds = {"c": np.array(True), "x": X}
        assert_same(run(whole, feeds), run(graph, feeds))


def with_outputs(graph: onnx.ModelProto, *more: str) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    infos = {info.name: info for info in copy.graph.value_info}
    copy.graph.output.extend(infos[name] for name in more)
    return copy


class TestRefusals:
    @pytest.mark.parametrize(
        ("start", "end", "message", "hint"),
        [
            ("head:input", "head:input", "is empty: its end is its start", "behind the start"),
            ("level:output", "backbone:output", r"ends before it starts: 'c4' \(of MatMul 'n_c4'\)", "exchange"),
            ("c5", "c4", "ends before it starts", "exchange"),
            ("p4", "s5", r"never reaches its end: 's5' .* does not follow from 'p4'", "behind the start"),
            ("p4", "dets", r"also needs 's5' \(of Sigmoid 'n_s5'\)", "start=['p4', 's5']"),
            (["c4", "c5"], ["c5", "p4"], "hand 'c5'", "leave 'c5' out"),
            (["image", "c5"], ["c4", "p5"], "one piece: its start 'c5'", "two parts"),
            ("count", None, "is empty: no output", "behind the start"),
        ],
    )
    def test_of_one_part(self, detector, start, end, message, hint):
        with pytest.raises(ConfigError, match=message) as caught:
            partition(detector, [{"start": start, **({"end": end} if end else {}), "name": "p"}])
        assert hint in caught.value.hint

    def test_following_the_hint_about_a_missing_tensor_helps(self, detector):
        with pytest.raises(ConfigError) as caught:
            cut(detector, "p4", "dets")
        start = json.loads(caught.value.hint.partition("start=")[2].replace("'", '"'))
        assert names(cut(detector, start, "dets")) == (("p4", "s5"), ("dets",))

    def test_overlapping_parts(self, detector):
        with pytest.raises(ConfigError, match="'one' and 'two' overlap: both compute Relu 'n_c5'"):
            partition(
                detector,
                [{"start": "image", "end": "c5", "name": "one"}, {"start": "c4", "end": ["c5", "p4"], "name": "two"}],
            )

    def test_parts_that_need_each_other(self):
        nodes = [node("Relu", "x", "a"), node("Exp", "a", "b"), node("Neg", "b", "c"), node("Abs", "z", "d")]
        nodes += [node("Neg", "d", "e"), node("Add", "c e", "y"), node("Sin", "d", "f")]
        nodes += [node("Add", "f b", "g")]
        graph = model(nodes, values("x float 2,4", "z float 2,4"), values("y float 2,4", "g float 2,4"))
        parts = [
            {"start": ["x", "d"], "end": ["a", "f"], "name": "one"},
            {"start": ["a", "z"], "end": ["b", "d"], "name": "two"},
        ]
        with pytest.raises(ConfigError, match="each needs the one before: 'one' -> 'two' -> 'one'"):
            partition(graph, parts)

    @pytest.mark.parametrize(
        ("end", "message"),
        [("s4", "'p4' .* is needed outside, but lies inside part 'p'"), ("dets", "an output of the whole")],
    )
    def test_a_rest_that_needs_what_a_part_keeps(self, detector, end, message):
        if end == "s4":
            detector.graph.node.append(node("Neg", "p4", "more"))
            detector.graph.output.extend(values("more float batch,4"))
        else:
            detector.graph.output.extend(values("s4 float batch,4"))
        with pytest.raises(ConfigError, match=message) as caught:
            partition(detector, [{"start": "head:input", "end": end, "name": "p"}, "rest"])
        assert "to the end of 'p'" in caught.value.hint

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([{"start": "image", "ends": "c5"}], r"part 0: unknown key 'ends' \(did you mean 'end'"),
            ([{"end": 3}], "part 0: 'end'"),
            ([{"end": []}], "needs at least one selector"),
            (["remainder"], "part 0 must be a table"),
            ([], "at least one part"),
            ("rest", "must be a list"),
            (["rest", "rest"], "only one"),
            ([{"end": "c4", "name": "a"}, {"start": "c4", "end": "c5", "name": "a"}], "two parts have the name 'a'"),
            ([{"end": "c5", "output_names": ["a", "b"]}], r"has 1 outputs \('c5'\), got 2"),
            ([{"end": "c5", "output_names": ["image"]}], "two tensors would be called 'image'"),
            ([{"end": "c5", "save_file": "../a.onnx"}], "save_file must be the name of a file"),
            ([{"end": "c5", "name": "a/b"}], "save_file must be the name of a file"),
        ],
    )
    def test_of_what_cannot_be_read(self, detector, parts, message):
        with pytest.raises(ConfigError, match=message):
            partition(detector, parts)

    def test_nodes_in_no_order(self, detector):
        graph = ir.from_proto(detector)
        first = graph.graph[1]
        graph.graph.remove(first)
        graph.graph.append(first)
        with pytest.raises(FormatError, match="stands before"):
            partition(graph, ["rest"])

    def test_a_tensor_of_unknown_dtype(self):
        nodes = [node("Made", "x", "a", domain="mine"), node("Relu", "a", "y")]
        graph = model(nodes, values("x float 2,4"), values("y float 2,4"), domains=["mine"])
        with pytest.raises(ConfigError, match="'a' .* dtype is not known"):
            cut(graph, "a", "y")

    def test_a_sequence(self):
        nodes = [node("SequenceConstruct", "x x", "s"), node("ConcatFromSequence", "s", "y", axis=0)]
        graph = model(nodes, values("x float 2,4"), values("y float 4,4"))
        with pytest.raises(ConfigError, match="'s' .* is no tensor"):
            cut(graph, "x", "s")


class TestRest:
    def test_what_stands_around_a_part_is_two(self, detector):
        part, before, after = partition(detector, [{"start": "head:input", "end": ["s4", "s5"]}, "rest"])
        assert names(before) == (("image",), ("c4", "c5"))
        assert names(after) == (("s4", "s5"), ("dets", "count"))
        plan = plan_partition(detector, [{"start": "head:input", "end": ["s4", "s5"]}, "rest"])
        assert plan.order == (1, 0, 2)
        assert (plan.coverage, [each.save_file for each in plan.parts]) == (
            "rest", ["part_0.onnx", "rest_0.onnx", "rest_1.onnx"],
        )  # fmt: skip
        assert str(plan).splitlines()[0] == "part_0: (c4, c5) -> (s4, s5), 4 nodes"
        whole = run(detector, {"image": X})
        chained = run_chain([before, part, after], {"image": X})
        assert_same({name: chained[name] for name in whole}, whole)

    def test_what_no_part_waits_for_stands_with_its_readers(self):
        nodes = [node("Relu", "x", "a"), node("Exp", "x", "b"), node("Neg", "b", "c"), node("Add", "a c", "y")]
        graph = model(nodes, values("x float 2,4"), values("y float 2,4"))
        front, rest = partition(graph, [{"end": "a"}, "rest"])
        assert names(rest) == (("x", "a"), ("y",))
        middle, *pieces = partition(graph, [{"start": "b", "end": "c"}, "rest"])
        assert [names(piece) for piece in pieces] == [(("x",), ("b",)), (("x", "c"), ("y",))]
        for parts in ([front, rest], [middle, *pieces]):
            assert_same(run(join(parts), {"x": X}), run(graph, {"x": X}))

    def test_nothing_remains(self, detector):
        assert len(partition(detector, [{}, "rest"])) == 1

    def test_outputs_without_a_node_and_inputs_without_a_reader(self):
        nodes = [node("Relu", "x", "a"), node("Neg", "a", "y")]
        inputs = values("x float 2,4", "passed float 3", "unread float 2")
        graph = model(nodes, inputs, values("passed float 3", "y float 2,4", "w float 4,4"), [weight("w", W)])
        parts = partition(graph, [{"start": "a", "end": "y"}, "rest"])
        feeds = {"x": X, "passed": np.ones(3, np.float32), "unread": np.ones(2, np.float32)}
        joined = join(parts)
        assert joined.signature == as_exported(graph).signature
        assert_same(run(joined, feeds), run(graph, feeds))

    def test_chance_is_computed_once(self):
        nodes = [node("RandomNormal", "", "r", shape=[2, 4]), node("Add", "x r", "a"), node("Add", "z r", "b")]
        graph = model([*nodes, node("Sub", "a b", "y")], values("x float 2,4", "z float 2,4"), values("y float 2,4"))
        with pytest.raises(ConfigError, match="overlap: both compute RandomNormal"):
            partition(graph, [{"start": "x", "end": "a"}, {"start": "z", "end": "b"}])
        one, two, last = partition(
            graph, [{"start": "x", "end": ["a", "r"]}, {"start": ["z", "r"], "end": "b"}, "rest"]
        )
        chained = run_chain([one, two, last], {"x": X, "z": X})
        np.testing.assert_array_equal(chained["y"], np.zeros_like(X))


class TestSurvival:
    def test_dimensions_ranges_and_relations(self, detector):
        whole = as_exported(detector)
        dims = {"batch": DimRange(2, 9, {5: "unlucky"}, "net.py:3")}
        signature = Signature(
            whole.signature.inputs, whole.signature.outputs, dims, (Relation("batch % 2 == 0", "net.py:4"),)
        )
        front, back = partition(whole.replace(signature=signature), [{"end": "head:input"}, {"start": "head:input"}])
        for part in (front, back):
            assert part.signature.dims == dims
            assert part.signature.relations == signature.relations
            assert as_exported(part.model).signature == part.signature
        assert back.signature.outputs[0] == TensorSpec("dets", "float32", ("2*batch", 4))
        joined = join([back, front])
        assert joined.signature == signature
        assert as_exported(joined.model).signature == signature

    def test_a_size_that_no_longer_follows_gets_a_name_and_its_range(self):
        nodes = [
            node("MaxPool", "x", "a", kernel_shape=[2], strides=[2]),
            node("Relu", "a", "b"),
            node("Neg", "b", "y"),
        ]
        info = values("a float n,3,length//2", "b float n,3,length//2")
        graph = model(nodes, values("x float n,3,length"), values("y float n,3,length//2"), value_info=info)
        whole = as_exported(graph)
        signature = Signature(
            whole.signature.inputs,
            whole.signature.outputs,
            {"n": DimRange(1), "length": DimRange(4, 11, where="a.py:1")},
        )
        front, back = partition(whole.replace(signature=signature), [{"end": "a"}, {"start": "a"}])
        assert front.signature.outputs[0].shape == ("n", 3, "length//2")
        assert back.signature.inputs[0].shape == back.signature.outputs[0].shape == ("n", 3, "length_2")
        assert back.signature.dims == {"n": DimRange(1), "length_2": DimRange(2, 5, where="a.py:1")}
        assert [str(dim.value) if not isinstance(dim, int) else dim for dim in back.model.graph.inputs[0].shape] == [
            "n", 3, "length_2",
        ]  # fmt: skip
        assert join([front, back]).signature == signature

    def test_unknown_sizes_get_names_of_their_own(self):
        nodes = [node("NonZero", "x", "a"), node("Neg", "a", "b"), node("Abs", "b", "y")]
        graph = model(nodes, values("x float a_1,4"), values("y int64 2,?"), value_info=values("a int64 2,?"))
        front, back = partition(graph, [{"end": "a"}, {"start": "a"}])
        (given,), (taken,) = front.model.graph.outputs, back.model.graph.inputs
        assert given.shape == taken.shape == ir.Shape([2, "a_1_2"])
        assert back.signature.inputs[0].shape == (2, "a_1_2")
        assert front.signature.outputs[0].shape == (2, None)
        assert back.signature.dims == {"a_1_2": DimRange()}

    def test_types_that_the_graph_does_not_tell_are_inferred(self):
        nodes = [node("Cast", "x", "a", to=TensorProto.FLOAT16), node("Neg", "a", "b"), node("Abs", "b", "y")]
        graph = model(nodes, values("x float batch,4"), values("y float16 batch,4"))
        assert cut(graph, "a", "b").signature.inputs == (TensorSpec("a", "float16", ("batch", 4)),)

    def test_domains_functions_and_their_opsets(self):
        body = [node("Relu", "p", "q"), node("Inner", "q", "r", domain="local")]
        inner = [mark("s", "s_m", "f", "input"), node("Neg", "s_m", "t")]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1), helper.make_opsetid(MARK, 1)]
        functions = [
            helper.make_function("local", "Outer", ["p"], ["r"], body, opsets),
            helper.make_function("local", "Inner", ["s"], ["t"], inner, opsets),
            helper.make_function("local", "Unused", ["s"], ["t"], inner, opsets),
        ]
        nodes = [node("Exp", "x", "a"), mark("a", "m", "g", "input"), node("Outer", "m", "y", domain="local")]
        graph = model(
            nodes, values("x float 2,4"), values("y float 2,4"), functions=functions, domains=["local", "ext"]
        )
        front, back = partition(graph, [{"end": "a"}, {"start": "a"}])
        assert not front.model.functions
        assert {key[1] for key in back.model.functions} == {"Outer", "Inner"}
        assert dict(back.model.opset_imports) == {"": 20, "local": 1, "ext": 1}
        assert_same(run(join([front, back]), {"x": X}), run(graph, {"x": X}))
        for function in back.model.functions.values():
            assert MARK not in {*function.opset_imports, *(each.domain for each in function)}

    def test_weights_are_shared(self, detector):
        whole = ir.from_proto(detector)
        front, back = partition(whole, [{"end": "head:input"}, {"start": "head:input"}])
        tensor = whole.graph.initializers["w"].const_value
        joined = join([front, back])
        for part in (front, back, joined):
            assert part.model.graph.initializers["w"].const_value is tensor
        assert list(joined.model.graph.initializers) == ["w"]

    @pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
    def test_subgraphs_that_capture(self, kind):
        inner = [node("Mul", "carried outer", "t"), node("Add", "t w", "next")]
        carried = values("carried float 2,4")
        if kind == "If":
            branch = helper.make_graph(
                [node("Mul", "a outer", "t"), node("Add", "t w", "r")], "b", [], values("r float 2,4")
            )
            nodes = [node("If", "c", "y", then_branch=branch, else_branch=branch)]
        elif kind == "Loop":
            inner.append(node("Identity", "go", "again"))
            loop = helper.make_graph(
                inner, "b", values("at int64 ", "go bool ") + carried, values("again bool ", "next float 2,4")
            )
            nodes = [node("Loop", "n c a", "y", body=loop)]
        else:
            inner.append(node("Identity", "row", "copy"))
            scan = helper.make_graph(
                inner, "b", carried + values("row float 4"), values("next float 2,4", "copy float 4")
            )
            nodes = [node("Scan", "a x", "y rows", body=scan, num_scan_inputs=1)]
        nodes = [node("Relu", "x", "a"), node("Exp", "x", "e"), mark("e", "outer", "f", "input"), *nodes]
        weights = [weight("w", X), weight("n", np.int64(3))]
        graph = model(nodes, values("x float 2,4", "c bool "), values("y float 2,4"), weights)
        start = ["a", "f:input", *(["x"] if kind == "Scan" else ["c"])]
        parts = partition(graph, [{"start": start, "end": "y"}, "rest"])
        feeds = {"x": X, "c": np.array(True)}
        want = run(graph, feeds)
        assert_same(run(join(parts), feeds), want)
        chained = run_chain(parts[::-1], feeds)
        assert_same({"y": chained["y"]}, want)
        if kind == "Scan":  # 'e' follows from the 'x' that it scans
            return
        with pytest.raises(ConfigError, match="also needs 'e'"):
            cut(graph, [each for each in start if each != "f:input"], "y")

    def test_quantised_tensors(self):
        nodes = [
            node("QuantizeLinear", "x scale zero", "q"),
            node("DequantizeLinear", "q scale zero", "d"),
            node("DequantizeLinear", "w4 scale4", "dw"),
            node("MatMul", "d dw", "y"),
        ]
        packed = helper.make_tensor("w4", TensorProto.INT4, [4, 4], list(range(-8, 8)))
        weights = [
            weight("scale", np.float32(0.1)),
            weight("zero", np.int8(3)),
            weight("scale4", np.float32(0.2)),
            packed,
        ]
        graph = model(nodes, values("x float 2,4"), values("y float 2,4"), weights, values("q int8 2,4"))
        graph.opset_import[0].version = 21  # that brought int4
        note = graph.graph.quantization_annotation.add(tensor_name="q")
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unread_scale")
        graph.graph.initializer.append(weight("unread_scale", np.float32(0.1)))
        front, back = partition(graph, [{"end": "q"}, {"start": "q"}])
        assert back.signature.inputs[0].dtype == "int8"
        for part in (front, back):
            proto = proto_of(part)
            assert proto.graph.quantization_annotation == graph.graph.quantization_annotation
            assert "unread_scale" in part.model.graph.initializers
        assert back.model.graph.initializers["w4"].const_value.dtype == ir.DataType.INT4
        assert_same(run(join([front, back]), {"x": X}), run(graph, {"x": X}))

    def test_metadata_of_model_and_nodes(self, detector):
        detector.metadata_props.add(key="author", value="me")
        detector.producer_name = "maker"
        part = cut(detector, "head:input", "bbox_head:output")
        assert (part.model.metadata_props["author"], part.model.producer_name) == ("me", "maker")
        assert part.provenance(part.model.graph[0]).module == "bbox_head.convs_pred"

    def test_the_whole_is_not_changed(self, detector):
        whole = ir.from_proto(detector)
        before = ir.to_proto(whole).SerializeToString(deterministic=True)
        partition(whole, [{"end": "head:input", "output_names": ["a", "b"]}, "rest"])
        assert ir.to_proto(whole).SerializeToString(deterministic=True) == before


class TestFiles:
    def test_parts_are_written_where_asked(self, detector, tmp_path):
        onnx.save(detector, tmp_path / "m.onnx")
        parts = [{"end": "head:input", "save_file": "front.onnx"}, {"start": "head:input", "name": "back"}]
        for _ in range(2):  # into a new folder, and into one that is there
            front, back = partition(tmp_path / "m.onnx", parts, out=tmp_path / "new" / "out")
        assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["back.onnx", "front.onnx"]
        read = [as_exported(tmp_path / "new" / "out" / f"{name}.onnx") for name in ("front", "back")]
        assert [each.signature for each in read] == [front.signature, back.signature]
        assert_same(run(join(read), {"image": X}), run(detector, {"image": X}))

    def test_nothing_is_written_unless_asked(self, detector, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        partition(detector, [{"end": "head:input", "save_file": "front.onnx"}])
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("exists", [True, False])
    def test_all_files_or_none(self, detector, tmp_path, exists, monkeypatch):
        out = tmp_path / "out"
        if exists:
            out.mkdir()
        real = ir.save

        def save(model, path, **options):
            if path.name == "back.onnx":
                raise OSError(28, "No space left on device")
            real(model, path, **options)

        monkeypatch.setattr("onnx_ir.save", save)
        with pytest.raises(OutputError, match="disk is full"):
            partition(
                detector, [{"end": "head:input", "name": "front"}, {"start": "head:input", "name": "back"}], out=out
            )
        assert out.exists() == exists
        assert not list(out.glob("*"))
        assert not [path for path in tmp_path.iterdir() if path != out]

    def test_out_that_is_a_file(self, detector, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(OutputError, match="is a file"):
            partition(detector, [{"end": "head:input"}], out=tmp_path / "out")


class TestJoin:
    def test_parts_of_other_origin(self):
        one = model(
            [node("Relu", "x", "t"), node("Add", "t w", "a")],
            values("x float n,4"),
            values("a float n,4"),
            [weight("w", X[:1])],
        )
        two = model(
            [node("Neg", "a", "t"), node("Mul", "t w", "y")],
            values("a float n,4"),
            values("y float n,4"),
            [weight("w", W[:1])],
        )
        joined = join([two, one])
        assert names(joined) == (("x",), ("y",))
        np.testing.assert_array_equal(run(joined, {"x": X})["y"], -(np.maximum(X, 0) + X[:1]) * W[:1])

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (model([node("Neg", "b", "a")], values("b float 4"), values("a float 4")), "two parts give a tensor 'a'"),
            (model([node("Neg", "a", "b")], values("a float16 4"), values("b float16 4")), "'a' is FLOAT in one"),
            (model([node("Neg", "a", "x")], values("a float 4"), values("x float 4")), "circle"),
        ],
    )
    def test_parts_that_do_not_fit(self, other, message):
        one = model(
            [node("Relu", "x", "a")],
            values("x float 4"),
            values(
                "a float 4",
            ),
        )
        with pytest.raises(ConfigError, match=message):
            join([one, other])

    def test_parts_of_other_opsets(self):
        one, two = (
            model([node("Relu", a, b)], values(f"{a} float 4"), values(f"{b} float 4")) for a, b in ("xa", "ay")
        )
        two.opset_import[0].version = 18
        with pytest.raises(ConfigError, match="'ai.onnx' is 20 in one and 18"):
            join([one, two])

    def test_no_parts(self):
        with pytest.raises(ConfigError, match="no parts"):
            join([])

    def test_what_two_parts_both_compute_from_weights_alone(self):
        nodes = [node("Neg", "w", "v"), node("MatMul", "x v", "a"), node("MatMul", "a v", "y")]
        graph = model(nodes, values("x float 2,4"), values("y float 2,4"), [weight("w", W)])
        parts = partition(graph, [{"end": "a"}, {"start": "a"}])
        assert [len(part.model.graph) for part in parts] == [2, 2]
        assert_same(run(join(parts), {"x": X}), run(graph, {"x": X}))

    def test_a_weight_may_be_a_boundary(self):
        nodes = [mark("w", "w_m", "f", "input", 0), mark("x", "x_m", "f", "input", 1), node("MatMul", "x_m w_m", "y")]
        graph = model(nodes, values("x float 2,4"), values("y float 2,4"), [weight("w", W)])
        part, rest = partition(graph, [{"start": "f:input", "end": "y"}, "rest"])
        assert (names(part), names(rest)) == ((("w", "x"), ("y",)), ((), ("w",)))
        assert not part.model.graph.initializers
        assert_same(run(join([part, rest]), {"x": X}), run(graph, {"x": X}))

    def test_some_parts_of_a_whole(self, detector):
        front, middle, _ = partition(
            detector, [{"end": "head:input"}, {"start": "head:input", "end": ["s4", "s5"]}, "rest"]
        )
        assert names(join([middle, front])) == (("image",), ("s4", "s5"))
