"""Parts on several engines, one after the other."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.engine import Session
from torchferry.core.errors import BackendError, ConfigError, InputError, UnsupportedError


class Stages(nn.Module):
    """Three stages, the first of which the last one needs too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, image, scale):
        one = self.first(image).relu()
        two = self.second(one * scale).sigmoid()
        return self.third(one + two), two.mean()


CUT = [{"name": name, "start": f"{name}:input", "end": f"{name}:output"} for name in ("second", "first", "third")]
NAMES = ("second", "first", "third", "rest_0", "rest_1")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Stages().eval()


@pytest.fixture(scope="module")
def exported(model):
    dims = {"image": {0: "n", 2: "h"}}
    given = (torch.rand(1, 3, 8, 8), torch.rand(1))
    return ferry.export(model, given, dynamic_shapes=dims, output_names=["map", "mean"])


@pytest.fixture(scope="module")
def plan(exported):
    return ferry.plan_partition(exported, [*CUT, "rest"])


@pytest.fixture(scope="module")
def engines(plan, tmp_path_factory):
    targets = {name: ferry.Target("openvino" if name == "second" else "onnxruntime") for name in NAMES[:2]}
    targets |= dict.fromkeys(("rest_0", "third"), ferry.Target("reference")) | {"rest_1": ferry.Target()}
    return ferry.compile_parts(plan, targets, tmp_path_factory.mktemp("chain") / "parts")


@pytest.fixture
def given():
    return {"image": torch.rand(2, 3, 6, 8).numpy(), "scale": np.float32([0.5])}


@pytest.fixture
def sessions(engines):
    opened = {name: engine.open() for name, engine in engines.items()}
    yield opened
    for session in opened.values():
        session.close()


def expected(model, given):
    with torch.no_grad():
        outputs = model(*(torch.tensor(array) for array in given.values()))
    return dict(zip(("map", "mean"), (tensor.numpy() for tensor in outputs), strict=True))


def test_a_chain_on_three_engines_gives_what_the_model_gives(model, plan, engines, given):
    assert {engine.target.backend for engine in engines.values()} == {"onnxruntime", "openvino", "reference"}
    with ferry.Chain(plan, engines) as chain:
        got = chain.run(given)
    want = expected(model, given)
    assert list(got) == list(want)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, atol=1e-5)


def test_one_part_in_bf16(model, plan, given, tmp_path):
    targets = {name: ferry.Target() for name in NAMES} | {"second": ferry.Target("openvino", "bf16")}
    engines = ferry.compile_parts(plan, targets, tmp_path / "parts")
    with ferry.Chain(plan, engines) as chain:
        got = chain.run(given)["map"]
    error = np.abs(got - expected(model, given)["map"]).max()
    assert 1e-5 < error < 5e-2
    ferry.verify_parts(engines, plan, given, source=model).raise_for_failure()


def test_engines_are_where_they_were_asked_for_and_can_be_loaded_again(plan, engines, given, sessions):
    again = {name: ferry.Engine.load(engine.folder) for name, engine in engines.items()}
    assert {engine.folder.name for engine in again.values()} == set(NAMES)
    with ferry.Chain(plan, again) as chain:
        got = chain.run(given)
    want = plan.run(given, sessions)
    assert all(got[name].tobytes() == want[name].tobytes() for name in want)


def test_the_order_is_the_plans_whatever_the_order_of_the_parts(plan, sessions, given):
    ran = []
    watched = {name: Watched(session, lambda name=name: ran.append(name)) for name, session in sessions.items()}
    plan.run(given, watched)
    assert ran == [plan.parts[at].name for at in plan.order]
    assert ran.index("first") < ran.index("rest_0") < ran.index("second") < ran.index("third")


class Watched(Session):
    """A session that tells of every run."""

    def __init__(self, session, tell):
        super().__init__(session.signature)
        self._inner, self._tell = session, tell

    def _execute(self, feeds):
        self._tell()
        return list(self._inner.run(feeds).values())

    def _release(self):
        pass


def test_only_what_is_still_needed_is_kept():
    """A chain of five: while the last runs, the tensors of the first three are gone."""
    layers = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(5))).eval()
    exported = ferry.export(layers, torch.rand(1, 2, 4, 4))
    plan = ferry.plan_partition(
        exported, [{"name": f"p{at}", "start": f"{at}:input", "end": f"{at}:output"} for at in range(5)]
    )
    made, alive = [], []

    class Part(Session):
        def __init__(self, number, part):
            super().__init__(part.signature)
            self._number = number

        def _execute(self, feeds):
            gc.collect()
            alive.append([reference() is not None for reference in made])
            result = next(iter(feeds.values())) + 1
            made.append(weakref.ref(result))
            return [result]

        def _release(self):
            pass

    from torchferry.partitioning import split

    parts = {part.name: Part(at, graph) for at, (part, graph) in enumerate(zip(plan.parts, split(plan), strict=True))}
    image = np.zeros((1, 2, 4, 4), np.float32)
    (result,) = plan.run({plan.inputs[0]: image}, parts).values()
    assert result.max() == 5
    assert alive == [[], [True], [False, True], [False, False, True], [False, False, False, True]]


class TestSomeParts:
    """Parts that are not the whole."""

    def test_they_take_what_none_gives_and_give_what_none_takes(self, exported, given, tmp_path):
        plan = ferry.plan_partition(exported, [CUT[1], CUT[2]])
        assert not plan.is_whole
        assert plan.inputs[0] == "image"
        assert plan.outputs == ("map", plan.parts[0].outputs[0])
        engines = ferry.compile_parts(plan, ferry.Target(), tmp_path / "parts")
        between = np.ones_like(given["image"])
        with ferry.Chain(plan, engines) as chain:
            got = chain.run({"image": given["image"], plan.inputs[1]: between})
            with pytest.raises(InputError, match=f"input '{plan.inputs[1]}' is missing"):
                chain.run(given)
        assert list(got) == list(plan.outputs)

    def test_renamed_outputs_are_results(self, exported):
        plan = ferry.plan_partition(exported, [{"start": "third:input", "output_names": "picture"}, "rest"])
        assert plan.results == {"picture": "map", "mean": "mean"}
        assert plan.outputs == ("picture", "mean")
        assert plan.is_whole


class TestRefusals:
    def test_missing_and_unknown_inputs(self, plan, sessions, given):
        with pytest.raises(InputError, match="input 'scale' is missing"):
            plan.run({"image": given["image"]}, sessions)
        with pytest.raises(InputError, match="unknown input 'imgae'") as caught:
            plan.run({**given, "imgae": given["image"]}, sessions)
        assert "did you mean 'image'" in caught.value.hint

    def test_an_array_that_a_part_does_not_take(self, plan, sessions, given):
        with pytest.raises(InputError, match="'image' must be float32, got float64"):
            plan.run({**given, "image": given["image"].astype(np.float64)}, sessions)

    def test_a_missing_session_and_a_wrong_name(self, plan, sessions, given):
        with pytest.raises(ConfigError, match="part 'first' has no session"):
            plan.run(given, {name: session for name, session in sessions.items() if name != "first"})
        with pytest.raises(ConfigError, match="no part 'frist'") as caught:
            plan.run(given, {**sessions, "frist": sessions["first"]})
        assert "did you mean 'first'" in caught.value.hint

    def test_a_session_of_another_part(self, plan, sessions, given):
        with pytest.raises(ConfigError, match=r"session of part 'first' takes \(.+\), but the part takes \(image\)"):
            plan.run(given, {**sessions, "first": sessions["third"]})

    def test_a_chain_that_is_not_open(self, plan, engines, given):
        chain = ferry.Chain(plan, engines)
        with pytest.raises(BackendError, match="not open"):
            chain.run(given)
        with chain:
            opened = dict(chain.sessions)
        with pytest.raises(BackendError, match="not open"):
            chain.run(given)
        with pytest.raises(BackendError, match="the session is closed"):
            plan.run(given, opened)

    def test_a_chain_without_one_of_its_engines(self, plan, engines):
        with pytest.raises(ConfigError, match="part 'first' has no engine"):
            ferry.Chain(plan, {name: engine for name, engine in engines.items() if name != "first"})

    def test_targets_that_are_not_those_of_the_parts(self, plan, tmp_path):
        with pytest.raises(ConfigError, match="part 'first' has no target"):
            ferry.compile_parts(plan, {"second": ferry.Target()}, tmp_path / "parts")
        with pytest.raises(UnsupportedError, match="int8"):
            ferry.compile_parts(plan, ferry.Target(precision="int8"), tmp_path / "parts")
        assert not (tmp_path / "parts").exists()

    def test_an_engine_that_refuses_a_part_names_it_and_leaves_nothing(self, plan, tmp_path, monkeypatch):
        def refuse(*_):
            raise BackendError("no")

        from torchferry import backends

        monkeypatch.setattr(backends.get("reference"), "compile", refuse)
        targets = {name: ferry.Target() for name in NAMES} | {"third": ferry.Target("reference")}
        with pytest.raises(BackendError, match="part 'third' cannot be compiled for reference-fp32: no"):
            ferry.compile_parts(plan, targets, tmp_path / "parts")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["../up", "..", "a/b", "a\\\\b", "a\\0"])
    def test_a_part_whose_name_is_no_folders(self, exported, name):
        with pytest.raises(ConfigError, match="name must be the name of a file"):
            ferry.plan_partition(exported, [{"name": name, "save_file": "part.onnx"}])
