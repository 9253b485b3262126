"""The page that draws a graph: it holds all of it, opens few boxes, and takes nothing that a file says for HTML."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from torchferry.graph import as_exported
from torchferry.graph.inspection_page import BOXES_AT_FIRST, MOST_IN_A_BOX, page_data, render
from torchferry.graph.provenance import MODULE_KEY, SOURCE_KEY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        self.text.append(data)

    @property
    def graph(self):
        return json.loads(self.scripts[0])


def tensor(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def chain(count: int, module=lambda _: "", name=lambda at: f"n{at}"):
    """A chain of Relu."""
    nodes = [helper.make_node("Relu", [f"v{at}"], [f"v{at + 1}"], name=name(at)) for at in range(count)]
    for at, node in enumerate(nodes):
        if module(at):
            node.metadata_props.add(key=MODULE_KEY, value=module(at))
            node.metadata_props.add(key=SOURCE_KEY, value=f"/home/me/net.py:{at} in forward: x = relu(x)")
    graph = helper.make_graph(nodes, "chain", [tensor("v0", "n", 4)], [tensor(f"v{count}", "n", 4)])
    return as_exported(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def leaves(data, box=0):
    """The numbers of the nodes in a box, in order."""
    found = []
    for item in data["boxes"][box][3]:
        found += [-1 - item] if item < 0 else leaves(data, item)
    return found


def shown(data, box=0):
    """How many boxes and nodes are to be seen at first."""
    return sum(shown(data, item) if item > 0 and data["boxes"][item][4] else 1 for item in data["boxes"][box][3])


class TestContent:
    def test_it_is_the_graph(self):
        whole = chain(6, lambda at: f"stages.{at // 3}")
        page = Page(render(whole, "m.onnx"))
        data = page.graph
        assert data == json.loads(json.dumps(page_data(whole)))
        names = [value[0] for value in data["values"]]
        found = [
            (node["op"], node["name"], [names[v] for v in node["inputs"]], [names[v] for v in node["outputs"]])
            for node in data["nodes"]
        ]
        assert found == [
            (node.op_type, node.name, [v.name for v in node.inputs], [v.name for v in node.outputs])
            for node in whole.model.graph
        ]
        assert [node["module"] for node in data["nodes"]] == [f"stages.{at // 3}" for at in range(6)]
        assert data["nodes"][4]["source"] == "/home/me/net.py:4 in forward: x = relu(x)"
        assert data["values"][names.index("v0")] == ["v0", "float32[n, 4]", "input"]
        assert [names[v] for v in (*data["inputs"], *data["outputs"])] == ["v0", "v6"]
        assert [box[:3] for box in data["boxes"]] == [
            ["", "", "whole"], ["stages", "stages", "module"], ["0", "stages.0", "module"], ["1", "stages.1", "module"],
        ]  # fmt: skip
        assert leaves(data) == list(range(6))

    def test_a_module_of_one_node_is_that_node(self):
        data = page_data(chain(3, lambda at: f"backbone.act{at}"))
        assert [box[0] for box in data["boxes"]] == ["", "backbone"]
        assert [node["label"] for node in data["nodes"]] == ["act0", "act1", "act2"]

    def test_weights_marks_attributes_and_inputs_left_out(self):
        mark = helper.make_node("Mark", ["x"], ["m"], domain="torchferry.mark", func="f", func_id=1, type="input", id=0)
        mark.attribute.append(helper.make_attribute("name", "image"))
        value = helper.make_tensor("c", TensorProto.INT64, [2], [3, 4])
        nodes = [
            mark,
            helper.make_node("Constant", [], ["c"], value=value),
            helper.make_node("Clip", ["m", "", "w"], ["y"], name="clip"),
            helper.make_node("Conv", ["y", "w"], ["z"], name="conv", strides=[2, 2], auto_pad="SAME_UPPER"),
        ]
        weight = helper.make_tensor("w", TensorProto.FLOAT, [], [1.0])
        graph = helper.make_graph(nodes, "g", [tensor("x", 1, 4)], [tensor("z")], [weight])
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("torchferry.mark", 1)]
        data = page_data(as_exported(helper.make_model(graph, opset_imports=imports, ir_version=10)))
        marked, constant, clip, conv = data["nodes"]
        assert marked["mark"] == "f[1]:input image"
        assert constant["attributes"] == [["value", "int64[2] [3, 4]"]]
        assert clip["inputs"][1] == -1
        assert data["values"][clip["inputs"][2]] == ["w", "float32[]", "weight"]
        assert dict(conv["attributes"]) == {"strides": "[2, 2]", "auto_pad": "SAME_UPPER"}

    def test_subgraphs_are_boxes(self):
        branches = {
            name: helper.make_graph([helper.make_node("Abs", ["x"], [name])], name, [], [tensor(name)])
            for name in ("then_branch", "else_branch")
        }
        nodes = [helper.make_node("If", ["c"], ["y"], name="choice", **branches)]
        condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
        graph = helper.make_graph(nodes, "g", [condition, tensor("x", 1)], [tensor("y")])
        data = page_data(as_exported(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])))
        assert [node["op"] for node in data["nodes"]] == ["If", "Abs", "Abs"]
        assert {tuple(box[:1] + box[2:3]) for box in data["boxes"][1:]} == {
            ("choice then_branch", "subgraph"), ("choice else_branch", "subgraph"),
        }  # fmt: skip
        captured = {data["values"][node["inputs"][0]][0] for node in data["nodes"][1:]}
        assert captured == {"x"}


class TestSize:
    @pytest.mark.parametrize(
        ("module", "few"),
        [
            (lambda _: "", False),
            (lambda at: f"layers.{at // 20}.part{at % 4}", False),
            (lambda at: f"layers.{at}", False),
            (lambda at: f"layers.{at // 40}.part{at % 4}", True),
        ],
        ids=["flat", "modules", "many modules", "fifty modules"],
    )
    def test_few_boxes_at_first_and_none_too_large(self, module, few):
        data = page_data(chain(2000, module))
        assert 5 < shown(data) <= (MOST_IN_A_BOX if few else BOXES_AT_FIRST)
        assert max(len(box[3]) for box in data["boxes"]) <= MOST_IN_A_BOX
        assert sorted(leaves(data)) == list(range(2000))

    def test_a_foreign_graph_is_grouped_by_its_names(self):
        data = page_data(chain(8, name=lambda at: f"/backbone/layer{at // 4}/Relu_{at}"))
        assert [box[1] for box in data["boxes"][1:]] == ["backbone", "backbone.layer0", "backbone.layer1"]

    def test_a_small_graph_is_open(self):
        assert all(box[4] for box in page_data(chain(10, lambda at: f"a.b{at // 5}"))["boxes"])


HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>'\"&\u2028"


class TestSafety:
    def test_nothing_is_asked_of_the_network(self):
        html = render(chain(3), "m.onnx")
        page = Page(html)
        assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
        (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
        assert policy.startswith("default-src 'none';")
        assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML", html)

    def test_hostile_names_are_text(self):
        whole = chain(3, lambda _: HOSTILE, name=lambda at: f"{HOSTILE}{at}")
        whole.model.graph.inputs[0].name = HOSTILE
        next(iter(whole.model.graph)).attributes["note"] = ir.AttrString("note", HOSTILE)
        page = Page(render(whole, HOSTILE))
        tags = [tag for tag, _ in page.tags]
        assert tags.count("script") == 2
        assert "img" not in tags
        assert page.graph["nodes"][1]["name"] == f"{HOSTILE}1"
        assert page.graph["nodes"][0]["attributes"] == [["note", HOSTILE]]
        assert HOSTILE in page.text  # the title


def dom(html: str, folder, fragment: str = "") -> str:
    """Return the page as Chromium has it after its script ran; what the script's errors say goes with it."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    flags += ["--window-size=1400,900", "--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom"]
    address = (folder / "page.html").as_uri() + fragment
    done = subprocess.run(
        [CHROMIUM, *flags, address], capture_output=True, text=True, timeout=120, check=False, env={**os.environ}
    )
    assert "Uncaught" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
class TestInBrowser:
    def test_a_graph_is_drawn(self, tmp_path):
        drawn = dom(render(chain(6, lambda at: f"stages.{at // 3}"), "m.onnx"), tmp_path)
        assert drawn.count('class="node') == 6
        assert drawn.count('class="box') == 3
        assert drawn.count('class="end') == 2
        assert drawn.count("<path") >= 9
        assert ">net.py:4</text>" in drawn

    def test_a_link_to_a_node_opens_what_is_around_it(self, tmp_path):
        html = render(chain(2000, lambda at: f"layers.{at // 50}.part{at // 10}"), "m.onnx")
        assert 'class="node' not in dom(html, tmp_path)
        drawn = dom(html, tmp_path, "#n1234")
        assert 'class="node chosen"' in drawn
        assert "/home/me/net.py:1234 in forward: x = relu(x)" in drawn

    def test_hostile_names_are_shown_and_not_run(self, tmp_path):
        drawn = dom(render(chain(3, lambda _: HOSTILE, name=lambda at: f"{HOSTILE}{at}"), HOSTILE), tmp_path)
        assert "<img" not in re.sub(r"<script.*?</script>", "", drawn, flags=re.DOTALL)
        assert drawn.count('class="node') == 3
