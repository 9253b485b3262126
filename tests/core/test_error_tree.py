"""The tree of errors: drawn, built-in parents, wording."""

import builtins
import inspect
import pickle
import re

import pytest

from torchferry.core import errors
from torchferry.core.errors import InputError, OutputError, TorchferryError, did_you_mean

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
# Name and built-in of every class that the module's docstring draws.
DRAWN = dict(re.findall(r"[├└]── (\w+) +(?:\((\w+)\))?", errors.__doc__))


def test_every_class_is_drawn_in_the_docstring() -> None:
    assert {c.__name__ for c in CLASSES} == {"TorchferryError", *DRAWN}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_class_has_its_builtin_and_says_what_where_and_next(cls: type[TorchferryError]) -> None:
    assert issubclass(cls, TorchferryError)
    assert issubclass(cls, getattr(builtins, DRAWN.get(cls.__name__) or "Exception"))
    assert cls.__doc__
    error = cls("model 'm' failed", where="m.py:3: x.item()", hint="mend it")
    assert str(error) == "model 'm' failed\n  at m.py:3: x.item()\n  hint: mend it"
    assert (error.message, error.where, error.hint) == ("model 'm' failed", "m.py:3: x.item()", "mend it")
    assert str(cls("model 'm' failed")) == "model 'm' failed"


@pytest.mark.parametrize("cls", [InputError, OutputError], ids=lambda c: c.__name__)
def test_an_error_survives_pickling(cls: type[TorchferryError]) -> None:
    error = cls("failed", where="here", hint="next")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("heigth", ["height", "batch"], "did you mean 'height'?"),
        ("precisio", ["precision", "precisions"], "did you mean 'precision' or 'precisions'?"),
        ("zzz", ["b", "a"], "known: 'a', 'b'"),
        ("zzz", [], "known: nothing"),
    ],
)
def test_did_you_mean(name: str, known: list[str], hint: str) -> None:
    assert did_you_mean(name, known) == hint
