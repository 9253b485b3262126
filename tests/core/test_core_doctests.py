"""The examples in the docstrings of ``torchferry.core`` give what they show."""

import doctest
import importlib
import pkgutil

import pytest

import torchferry.core

MODULES = [info.name for info in pkgutil.iter_modules(torchferry.core.__path__, "torchferry.core.")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_doctests_are_found() -> None:
    assert doctest.testmod(importlib.import_module("torchferry.core.expressions")).attempted > 0
