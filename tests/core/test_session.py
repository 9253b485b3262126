"""Sessions and engines: what every backend gets for free."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import torchferry.backends
from torchferry.core.engine import Availability, Capabilities, Engine, Session, get_backend, platform_versions
from torchferry.core.errors import BackendError, InputError, MissingBackendError
from torchferry.core.signature import DimRange, Signature, TensorSpec
from torchferry.core.target import Target

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("n", 2)), TensorSpec("s", "float32", ())),
    outputs=(TensorSpec("product", "float32", ("n", 2)), TensorSpec("sum", "float32", ("n", 2))),
    dims={"n": DimRange(min=1)},
)


class Arithmetic(Session):
    """Multiplies and adds, and counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__(SIGNATURE)
        self.executed = 0
        self.released = 0

    def _execute(self, feeds: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        self.executed += 1
        return feeds["x"] * feeds["s"], feeds["x"] + feeds["s"]

    def _release(self) -> None:
        self.released += 1


def good(n: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.ones((n, 2), np.float32), "s": np.array(3, np.float32)}


class Lookalike:
    """Has the shape and dtype of a good input, and is no array."""

    shape = (3, 2)
    dtype = np.dtype("float32")


BAD = {
    "missing": {"x": good()["x"]},
    "unknown": {**good(), "y": good()["x"]},
    "renamed": {"x": good()["x"], "scale": good()["s"]},
    "shape": {**good(), "x": np.ones((3, 3), np.float32)},
    "rank": {**good(), "x": np.ones((3, 2, 1), np.float32)},
    "range": {**good(), "x": np.ones((0, 2), np.float32)},
    "dtype": {**good(), "x": np.ones((3, 2))},
    "byte order": {**good(), "x": np.ones((3, 2), ">f4")},
    "list": {**good(), "x": [[1.0, 1.0]]},
    "lookalike": {**good(), "x": Lookalike()},
    "empty": {},
    "no mapping": good()["x"],
    "none": None,
}


@pytest.mark.parametrize("before", ["first call", "after a good call"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_call_never_reaches_the_engine(bad: object, before: str) -> None:
    with Arithmetic() as session:
        if before == "after a good call":
            session.run(good())
        executed = session.executed
        for _ in range(2):  # a refused call is not remembered as good
            with pytest.raises(InputError):
                session.run(bad)
        assert session.executed == executed


def test_outputs_come_by_name_in_the_graphs_order() -> None:
    with Arithmetic() as session:
        feeds = good()
        outputs = session.run(feeds)
        assert list(outputs) == ["product", "sum"]
        np.testing.assert_array_equal(outputs["product"], np.full((3, 2), 3, np.float32))
        np.testing.assert_array_equal(outputs["sum"], np.full((3, 2), 4, np.float32))
        assert session.run(dict(reversed(feeds.items())))["sum"].shape == (3, 2)
        assert list(feeds) == ["x", "s"]


def test_many_shapes_stay_checked() -> None:
    with Arithmetic() as session:
        for n in [*range(1, 200), 1, 2]:
            assert session.run(good(n))["sum"].shape == (n, 2)
        with pytest.raises(InputError, match="'n' = 0"):
            session.run(good(0))


def test_a_closed_session_is_released_once_and_refuses() -> None:
    with Arithmetic() as session:
        session.run(good())
    session.close()
    assert session.released == 1
    with pytest.raises(BackendError, match="closed"):
        session.run(good())
    assert session.executed == 1


def test_a_session_is_released_when_the_block_raises() -> None:
    session = Arithmetic()
    with pytest.raises(ZeroDivisionError), session:
        _ = 1 / 0
    assert session.released == 1


def test_an_engine_opens_through_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backend = SimpleNamespace(open=lambda engine, **options: asked.append((engine, options)) or Arithmetic())
    monkeypatch.setattr(torchferry.backends, "get", {"mine": backend}.__getitem__)
    engine = Engine(Path("out"), Target("mine"), SIGNATURE)
    with engine.open(threads=2) as session:
        assert session.run(good())["sum"][0, 0] == 4
    assert asked == [(engine, {"threads": 2})]


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(MissingBackendError, match="onnxrutime") as caught:
        get_backend("onnxrutime")
    assert "did you mean 'onnxruntime'?" in str(caught.value)
    with pytest.raises(MissingBackendError):
        Engine(Path("out"), Target("nope"), SIGNATURE).open()


def test_nouns_compare_by_value() -> None:
    assert Engine(Path("a"), Target(), SIGNATURE) == Engine(Path("a"), Target(), SIGNATURE)
    assert Availability(ok=False, reason="pip install x") != Availability(ok=True)
    assert Capabilities(("fp32",), 20, dynamic_shapes=True).precisions == ("fp32",)
    assert {"python", "platform", "numpy"} <= set(platform_versions())
