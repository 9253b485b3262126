"""Arithmetic on dimension names, such as ``2*batch`` or ``height % 4 == 0``, without ``eval`` of anything else.

A package's manifest is untrusted, so an expression is parsed, every node of it is checked against a short list, and
only then compiled.
"""

from __future__ import annotations

import ast
import functools
import math
from typing import TYPE_CHECKING, Any

from torchferry.core.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import CodeType

_FUNCTIONS: dict[str, Any] = {
    "abs": abs,
    "ceil": math.ceil,
    "float": float,
    "floor": math.floor,
    "int": int,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
    "trunc": math.trunc,
}
_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.BinOp, ast.Add,
    ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE,
    ast.Gt, ast.GtE, ast.Call, ast.Name, ast.Load, ast.Constant, ast.IfExp,
)  # fmt: skip
_MAX_LENGTH = 4000
_MAX_EXPONENT = 8  # a hostile 9**9**9 would otherwise never end
_MANY = ("max", "min")  # take two or more values; all others take one


class Expression:
    """An arithmetic expression over named whole numbers.

    Args:
        text: Python syntax: numbers, names, ``+ - * / // % **``, comparisons, ``and or not``, and the functions
            abs, ceil, float, floor, int, max, min, round, sqrt, trunc.

    Raises:
        FormatError: If the text is anything else.

    >>> Expression("3*height // 2").evaluate({"height": 5})
    7
    >>> sorted(Expression("a > max(b, 2)").names)
    ['a', 'b']
    """

    __slots__ = ("_code", "names", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._code, self.names = _parse(text)

    def evaluate(self, sizes: Mapping[str, int]) -> Any:
        """Return the value for these sizes.

        Raises:
            KeyError: If a name has no size.
            ArithmeticError, ValueError: If it has no value at these sizes: a division by zero, the root of -1.
        """
        values = {name: sizes[name] for name in self.names}
        return eval(self._code, {"__builtins__": {}}, {**_FUNCTIONS, **values})  # noqa: S307 - parsed and checked

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[CodeType, frozenset[str]]:
    if len(text) > _MAX_LENGTH:
        raise FormatError(f"expression of {len(text)} characters is longer than {_MAX_LENGTH}")
    try:
        tree = ast.parse(text, mode="eval")
        code = compile(tree, "<dimension expression>", "eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        raise FormatError(f"'{text}' is not an expression") from exc
    names: set[str] = set()
    called: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise FormatError(f"'{text}' holds '{type(node).__name__}', which an expression may not")
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
                raise FormatError(f"'{text}' calls something other than {', '.join(sorted(_FUNCTIONS))}")
            if len(node.args) < 2 if node.func.id in _MANY else len(node.args) != 1:
                raise FormatError(f"'{text}' calls {node.func.id} with {len(node.args)} values")
            called.add(id(node.func))
        elif isinstance(node, ast.Constant) and (
            isinstance(node.value, bool) or not isinstance(node.value, int | float)
        ):
            raise FormatError(f"'{text}' holds the constant {node.value!r}, which is not a number")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            power = node.right
            if not (isinstance(power, ast.Constant) and isinstance(power.value, int) and power.value <= _MAX_EXPONENT):
                raise FormatError(f"'{text}' raises to a power that is not a whole number up to {_MAX_EXPONENT}")
            if any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left)):
                raise FormatError(f"'{text}' raises a power to a power")
        elif isinstance(node, ast.Name) and id(node) not in called:
            names.add(node.id)
    return code, frozenset(names)
