"""Random graphs cut at random: the parts, run one after the other on engines, give what the whole gives."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from partition_graphs import run
from test_partition_properties import FEEDS, QUICK, fixed, graphs

from torchferry.backends import get
from torchferry.core.errors import ConfigError
from torchferry.partitioning import plan_partition, split, with_boundaries


def random_cut(graph, data):
    """Return one or two random pieces and perhaps what remains."""
    loose = [each for each in graph.real() if each.output[0] not in fixed(graph)]
    assume(loose)
    parts = []
    for number in range(data.draw(st.integers(1, 2))):
        own = data.draw(st.lists(st.sampled_from(range(len(loose))), min_size=1, max_size=4, unique=True))
        nodes = [loose[at] for at in sorted(own)]
        inner = {out for each in nodes for out in each.output}
        read = {name for each in nodes for name in graph.reads(each)} - inner - fixed(graph)
        start = sorted(read - {"w0", "w1", "w2"})
        end = sorted(inner & ({graph.origin(name) for name in graph.outputs} | outside(graph, nodes)))
        assume(start and end)
        parts.append({"start": start, "end": end, "name": f"p{number}"})
    return [*parts, "rest"] if data.draw(st.booleans()) else parts


def outside(graph, nodes):
    return {name for each in graph.real() if each not in nodes for name in graph.reads(each)}


@settings(QUICK, max_examples=50)
@given(graph=graphs(), data=st.data())
@pytest.mark.parametrize("backends", [("onnxruntime",), ("reference", "onnxruntime")])
def test_what_runs_in_parts_is_the_whole(graph, backends, data, tmp_path_factory):
    whole = graph.proto()
    try:
        plan = plan_partition(whole, random_cut(graph, data))
        recorder = with_boundaries(plan)
    except ConfigError:
        assume(False)
    recorded = {**FEEDS, **run(recorder, FEEDS)}
    want = run(whole, FEEDS)
    for name, array in want.items():
        assert recorded[name].tobytes() == array.tobytes()
    folder = tmp_path_factory.mktemp("parts")
    sessions = {}
    try:
        for at, (part, graph_of_part) in enumerate(zip(plan.parts, split(plan), strict=True)):
            backend = get(backends[at % len(backends)])
            (folder / part.name).mkdir()
            sessions[part.name] = backend.trial(graph_of_part, folder / part.name)
        got = plan.run({name: recorded[name] for name in plan.inputs}, sessions)
    finally:
        for session in sessions.values():
            session.close()
    assert list(got) == list(plan.outputs)
    assert not plan.is_whole or list(want) == [name for name in plan.outputs if name in want]
    for name, array in got.items():
        if backends == ("onnxruntime",):
            assert array.tobytes() == recorded[name].tobytes(), name
        np.testing.assert_allclose(array, recorded[name], rtol=1e-4, atol=1e-4)
