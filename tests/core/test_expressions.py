"""Expressions over sizes: Python's arithmetic, and nothing but arithmetic."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchferry.core.errors import FormatError
from torchferry.core.expressions import Expression

SIZES = st.fixed_dictionaries({name: st.integers(0, 2**31) for name in "abc"})


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operator = st.sampled_from(["+", "-", "*", "/", "//", "%", "<", "<=", ">", ">=", "==", "!=", "and", "or"])
    return st.one_of(
        st.tuples(inner, operator, inner).map(lambda t: f"({' '.join(t)})"),
        st.tuples(st.sampled_from(["-", "+", "not "]), inner).map(lambda t: f"({t[0]}{t[1]})"),
        st.tuples(st.sampled_from(["max", "min"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        st.tuples(st.sampled_from(["abs", "int", "round", "float"]), inner).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
    )


TEXTS = st.recursive(st.one_of(st.sampled_from("abc"), st.integers(0, 99).map(str)), _compound, max_leaves=10)


@given(text=TEXTS, sizes=SIZES)
def test_agrees_with_python(text: str, sizes: dict[str, int]) -> None:
    expression = Expression(text)
    assert expression.names == set(re.findall(r"\b[abc]\b", text))
    try:
        expected = eval(text, {}, sizes)
    except ZeroDivisionError as exc:
        with pytest.raises(type(exc)):
            expression.evaluate(sizes)
    else:
        assert expression.evaluate(sizes) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n**8", 7**8),
        ("2 <= n < 7", False),
        ("ceil(n / 2) + floor(n / 2) + trunc(-n / 2)", 4),
        ("sqrt(n * n)", 7.0),
        ("n - 2*(n//2)", 1),
        ("(n - 1) % 3 == 0 and not n > 9", True),
    ],
)
def test_value(text: str, value: float) -> None:
    assert Expression(text).evaluate({"n": 7}) == value
    assert str(Expression(text)) == text


HOSTILE = {
    "call of a builtin": "__import__('os')",
    "call of a call": "abs(abs)(1)",
    "call of a size": "n(1)",
    "keyword": "max(1, 2, key=abs)",
    "star": "max(*n)",
    "attribute": "n.real",
    "attribute of a number": "(1).__class__",
    "subscript": "n[0]",
    "lambda": "lambda: 1",
    "comprehension": "[i for i in n]",
    "tuple": "(1, 2)",
    "f-string": "f'{n}'",
    "text": "'a' * 9",
    "None": "None",
    "True": "True",
    "complex number": "1j",
    "ellipsis": "...",
    "walrus": "(n := 3)",
    "shift": "1 << n",
    "bitwise": "n & 1",
    "matrix product": "n @ n",
    "huge power": "9**9",
    "tower of powers": "9**9**9",
    "negative power": "2**-1",
    "power of a size": "2**n",
    "statement": "import os",
    "two statements": "1; 2",
    "two lines": "1\n2",
    "nothing": "",
    "comment": "# n",
    "broken": "n +",
    "null": "\0",
    "half a surrogate": "\ud800",
    "too long": "n" + " + 1" * 2000,
    "too deep a minus": "-" * 3900 + "1",
    "too deep a sum": "1" + "+1" * 1990,
    "too deep a bracket": "(" * 1900 + "1" + ")" * 1900,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses_everything_else(text: str) -> None:
    with pytest.raises(FormatError):
        Expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "((((2**8)**8)**8)**8)**8",  # a little deeper, and it never ends
        "round(1, -9**5)",  # raises 10 to the power of 59049
        "max()",
        "max(n)",
        "abs(1, 2)",
    ],
)
def test_refuses_calls_and_powers_that_cannot_be_computed(text: str) -> None:
    with pytest.raises(FormatError):
        Expression(text).evaluate({"n": 3})


def test_evaluates_nothing_of_a_hostile_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError):
        Expression("1 + __import__('pathlib').Path('made').write_text('x')")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["__import__", "__builtins__", "print", "math"])
def test_a_name_is_a_size_and_nothing_of_python(name: str) -> None:
    expression = Expression(f"{name} + 1")
    assert expression.evaluate({name: 2}) == 3
    with pytest.raises(KeyError, match=name):
        expression.evaluate({})


def test_dividing_by_a_size_of_zero_is_the_callers_to_handle() -> None:
    with pytest.raises(ZeroDivisionError):
        Expression("8 % n").evaluate({"n": 0})
    assert math.isclose(Expression("8 / n").evaluate({"n": 3}), 8 / 3)
