"""Random graphs and random cuts: what is split and joined is the whole, what is refused is refused for a reason."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from partition_graphs import MARK, assert_same, mark, model, node, run, run_chain, values, weight

from torchferry.core.errors import ConfigError
from torchferry.partitioning import join, partition, plan_partition

QUICK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
ARRAY = np.random.default_rng(7).standard_normal((2, 4)).astype(np.float32)
WEIGHTS = [weight("w0", ARRAY * 0.5), weight("w1", ARRAY + 1), weight("w2", ARRAY - 2)]
FEEDS = {f"x{i}": ARRAY * (i + 1) for i in range(3)}


@dataclass
class Graph:
    """A random graph, and what a second look at its protobuf says about it."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    pool: list[str] = field(default_factory=lambda: [*FEEDS, "w0", "w1", "w2"])
    typed: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def proto(self) -> onnx.ModelProto:
        infos = values(*(f"{name} float 2,4" for name in self.typed if name not in self.outputs))
        inputs, outputs = (values(*(f"{name} float 2,4" for name in names)) for names in (FEEDS, self.outputs))
        return model(self.nodes, inputs, outputs, WEIGHTS, infos)

    def real(self) -> list[onnx.NodeProto]:
        return [each for each in self.nodes if each.domain != MARK]

    def origin(self, name: str) -> str:
        marks = {each.output[0]: each.input[0] for each in self.nodes if each.domain == MARK}
        while name in marks:
            name = marks[name]
        return name

    def reads(self, each: onnx.NodeProto) -> set[str]:
        found, pending, own = set(), [each], set()
        while pending:
            current = pending.pop()
            found |= set(current.input)
            for attribute in current.attribute:
                pending += attribute.g.node
                own |= {out for inner in attribute.g.node for out in inner.output}
        return {self.origin(name) for name in found - own if name}

    def after(self, names) -> set[str]:
        known = set(names)
        for each in self.real():
            if self.reads(each) & known:
                known |= set(each.output)
        return known

    def between(self, starts, ends) -> list[str]:
        """Return the first outputs of the nodes that are needed."""
        needed, found = set(ends) - set(starts), []
        for each in reversed(self.real()):
            if needed & set(each.output):
                found.append(each.output[0])
                needed |= self.reads(each) - set(starts)
        return found


@st.composite
def graphs(draw) -> Graph:
    graph = Graph()

    def pick() -> str:
        return draw(st.sampled_from(graph.pool[-8:] if draw(st.booleans()) else graph.pool))

    for at in range(draw(st.integers(3, 12))):
        out = f"v{at}"
        kind = draw(st.sampled_from(["Add", "Mul", "Sub", "Sin", "Split", "If", "Mark", "Constant"]))
        if kind in ("Add", "Mul", "Sub"):
            graph.nodes.append(node(kind, f"{pick()} {pick()}", out))
        elif kind == "Sin":
            graph.nodes.append(node("Sin", pick(), out))
        elif kind == "Constant":
            graph.nodes.append(node("Constant", "", out, value=weight("", ARRAY * at)))
        elif kind == "Mark":
            graph.nodes.append(mark(pick(), out, f"f{at}", "input"))
        elif kind == "Split":
            graph.nodes.append(node("Concat", f"{pick()} {pick()}", f"{out}_both", axis=0))
            graph.nodes.append(node("Split", f"{out}_both", f"{out} {out}_second", axis=0, num_outputs=2))
            graph.pool.append(f"{out}_second")
        else:
            branches = [
                helper.make_graph(
                    [
                        node(op, f"{pick()} {pick()}", f"{out}_{op}_in"),
                        node("Add", f"{out}_{op}_in {pick()}", "result"),
                    ],
                    op,
                    [],
                    [helper.make_tensor_value_info("result", 1, None)],
                )
                for op in ("Sub", "Mul")
            ]
            graph.nodes.append(node("ReduceSum", pick(), f"{out}_sum", keepdims=0))
            graph.nodes.append(node("Cast", f"{out}_sum", f"{out}_bool", to=9))
            graph.nodes.append(node("If", f"{out}_bool", out, then_branch=branches[0], else_branch=branches[1]))
        graph.pool.append(out)
    computed = [name for name in graph.pool if name.startswith("v")]
    graph.typed = draw(st.lists(st.sampled_from(computed), unique=True))
    graph.nodes.append(node("Sin", computed[-1], "last"))
    outputs = draw(st.lists(st.sampled_from(computed), unique=True, max_size=3))
    # One name for each tensor; several are a test of their own.
    own = {graph.origin(name): name for name in outputs if graph.origin(name).startswith("v")}
    graph.outputs = ["last", *own.values()]
    return graph


def fixed(graph: Graph) -> set[str]:
    """Return what depends on no input."""
    return {name for each in graph.real() for name in each.output} - graph.after(FEEDS)


@QUICK
@given(graphs(), st.data())
def test_stages_joined_again_are_the_whole(graph, data):
    """Cut where every node has a stage, no node an earlier one than what it needs; one stage may be the rest."""
    made, stage = fixed(graph), {}
    for each in graph.real():
        before = max((stage.get(name, 0) for name in graph.reads(each)), default=0)
        number = data.draw(st.sampled_from([before, min(before + 1, 2)]))
        stage |= dict.fromkeys(each.output, number)
    ends = {graph.origin(name) for name in graph.outputs}
    parts = []
    for number in range(3):
        own = [each for each in graph.real() if stage[each.output[0]] == number and each.output[0] not in made]
        inner = {out for each in own for out in each.output}
        others = {name for each in graph.real() if each not in own for name in graph.reads(each)}
        start = sorted({name for each in own for name in graph.reads(each)} - inner - made - {"w0", "w1", "w2"})
        end = sorted(inner & (ends | others))
        if start and end:
            parts.append({"start": start, "end": end, "name": f"stage{number}"})
    if not parts:
        return
    if data.draw(st.booleans()):
        parts[data.draw(st.integers(0, len(parts) - 1))] = "rest"
    else:
        parts.append("rest")
    whole = graph.proto()
    unchanged = whole.SerializeToString(deterministic=True)
    want = run(whole, FEEDS)
    cut = partition(whole, parts)
    assert not [n for part in cut for g in part.model.graphs() for n in g if n.domain == MARK]
    joined = join(data.draw(st.permutations(cut)))
    got = run(joined, FEEDS)
    assert_same({name: got[name] for name in want}, want)
    assert list(got) == list(want)
    plan = plan_partition(whole, parts)
    known = run_chain([cut[at] for at in plan.order], FEEDS)
    assert_same({name: known[name] for name in want}, want)
    assert whole.SerializeToString(deterministic=True) == unchanged


def _needs(graph, starts, ends) -> set[str]:
    """Return what the part reads that follows from an input, but not from its start."""
    after, nodes = graph.after(starts), graph.between(starts, ends)
    foreign = graph.after(FEEDS) - after
    return {
        name for each in graph.real() if each.output[0] in nodes and set(each.output) & after
        for name in graph.reads(each) & foreign
    }  # fmt: skip


def _is_circular(graph, starts, ends) -> bool:
    inner = graph.between(starts, ends)
    made = {out for each in graph.real() if each.output[0] in inner for out in each.output}
    return bool(set(starts) & (made | graph.after(made - fixed(graph))))


def refusal(graph: Graph, parts) -> str:
    """Return why a cut is refused; empty if it is not."""
    try:
        partition(graph.proto(), parts)
    except ConfigError as exc:
        return exc.message
    return ""


REASONS = {
    "is empty": lambda g, s, e: set(e) <= set(s),
    "hand ": lambda g, s, e: bool(set(e) & set(s)),
    "before it starts": lambda g, s, e: any(
        set(s) & g.after([end]) and end not in g.after(s) for end in e if end not in s
    ),
    "never reaches": lambda g, s, e: not set(e) <= g.after(s),
    "also needs": lambda g, s, e: bool(_needs(g, s, e)),
    "one piece": _is_circular,
}


@settings(QUICK, max_examples=200)
@given(graphs(), st.data())
def test_a_random_cut_works_or_is_refused_for_its_reason(graph, data):
    names = [name for name in graph.pool if name.startswith(("v", "x"))]
    chosen = [data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))]
    behind = graph.after(map(graph.origin, chosen[0])) - {*chosen[0]} & {*names}
    likely = sorted(behind) if behind and data.draw(st.booleans()) else names
    chosen.append(data.draw(st.lists(st.sampled_from(likely), min_size=1, max_size=2, unique=True)))
    start, end = ([*dict.fromkeys(map(graph.origin, each))] for each in chosen)
    cut = [{"start": chosen[0], "end": chosen[1]}]
    message = refusal(graph, cut)
    if message:
        (reason,) = [reason for text, reason in REASONS.items() if text in message]
        assert reason(graph, start, end), message
        return
    (part,) = partition(graph.proto(), cut)
    assert not _needs(graph, start, end)
    assert not _is_circular(graph, start, end)
    everything = graph.proto()
    have = {each.name for each in everything.graph.output}
    known = sorted({*start, *end} - have - set(FEEDS))
    everything.graph.output.extend(values(*(f"{name} float 2,4" for name in known)))
    everything.graph.ClearField("value_info")
    recorded = {**FEEDS, **run(everything, FEEDS)}
    got = run(part, dict(zip(part.signature.input_names, (recorded[name] for name in start), strict=True)))
    assert [array.tobytes() for array in got.values()] == [recorded[name].tobytes() for name in end]


@QUICK
@given(graphs(), st.data())
def test_two_random_parts_and_the_rest(graph, data):
    """Two parts from what single cuts allow: refused where they share a node or need each other, else whole again."""
    made_of_nothing, pairs = fixed(graph) | {"w0", "w1", "w2"}, []
    loose = [each for each in graph.real() if each.output[0] not in made_of_nothing]
    assume(loose)
    for _ in range(2):
        some = data.draw(st.lists(st.integers(0, len(loose) - 1), min_size=1, max_size=4))
        own = [each for at, each in enumerate(loose) if at in some]
        inner = {out for each in own for out in each.output}
        start = sorted({name for each in own for name in graph.reads(each)} - inner - made_of_nothing)
        others = {name for each in graph.real() if each not in own for name in graph.reads(each)}
        end = sorted(inner & (others | {graph.origin(name) for name in graph.outputs}))
        if len(end) > 1 and data.draw(st.booleans()):
            end.pop()
        assume(start and end)
        assume(not refusal(graph, [{"start": start, "end": end}]))
        pairs.append((start, end))
    parts = [{"start": start, "end": end, "name": f"p{at}"} for at, (start, end) in enumerate(pairs)]
    inner = [set(graph.between(*pair)) - fixed(graph) for pair in pairs]
    made = [{o for each in graph.real() if each.output[0] in own for o in each.output} for own in inner]
    message = refusal(graph, [*parts, "rest"])
    if "overlap" in message:
        assert inner[0] & inner[1]
    elif "one after the other" in message:
        assert graph.after(made[0]) & set(pairs[1][0])
        assert graph.after(made[1]) & set(pairs[0][0])
    elif message:
        assert "lies inside" in message
        outside = [e for e in graph.real() if e.output[0] not in inner[0] | inner[1]]
        hidden = (made[0] | made[1]) - {*pairs[0][1], *pairs[1][1]}
        read = {name for each in outside for name in graph.reads(each)}
        starts = {*pairs[0][0], *pairs[1][0]}
        assert hidden & (read | starts | {graph.origin(name) for name in graph.outputs})
    else:
        joined = join(partition(graph.proto(), [*parts, "rest"]))
        assert_same(run(joined, FEEDS), run(graph.proto(), FEEDS))


@pytest.mark.parametrize("count", [1, 3])
def test_the_graphs_are_what_the_properties_are_about(count):
    """The second look at a graph sees captured values and marks."""
    graph = Graph(nodes=[mark("x0", "m", "f", "input"), node("Sin", "m", "v0")], outputs=["v0"])
    graph.nodes += [node("Sin", f"v{at}", f"v{at + 1}") for at in range(count - 1)]
    assert graph.after(["x0"]) == {"x0", *(f"v{at}" for at in range(count))}
    assert graph.between(["x0"], ["v0"]) == ["v0"]
