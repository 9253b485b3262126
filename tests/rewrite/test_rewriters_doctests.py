"""The examples in the docstrings of ``torchferry.rewrite`` give what they show."""

import doctest
import importlib
import pkgutil

import pytest

import torchferry.rewrite

MODULES = [info.name for info in pkgutil.iter_modules(torchferry.rewrite.__path__, "torchferry.rewrite.")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_doctests_are_found():
    assert doctest.testmod(importlib.import_module("torchferry.rewrite.context")).attempted > 0
