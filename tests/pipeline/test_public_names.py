"""The names that users, examples and docs may rely on."""

import inspect

import pytest

import torchferry

NAMES = [
    "FUNCTION_REWRITER",
    "MODULE_REWRITER",
    "SYMBOLIC_REWRITER",
    "BenchReport",
    "Budget",
    "Chain",
    "DimRange",
    "Engine",
    "Exported",
    "Finding",
    "Package",
    "PartitionPlan",
    "Postprocess",
    "Preprocess",
    "Report",
    "RewriterContext",
    "Session",
    "Signature",
    "Source",
    "Target",
    "Tolerance",
    "TorchferryError",
    "__version__",
    "bench",
    "compile",
    "compile_parts",
    "custom_op",
    "deploy",
    "export",
    "fp16",
    "load",
    "mark",
    "mark_tensors",
    "pack",
    "partition",
    "patch_model",
    "plan_partition",
    "quantize",
    "read_samples",
    "record_calibration",
    "register_op",
    "rewriters",
    "testing",
    "verify",
    "verify_parts",
]


def test_the_list():
    assert torchferry.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_and_is_documented(name):
    value = getattr(torchferry, name)
    assert name in dir(torchferry)
    if name == "__version__":
        return
    assert inspect.getdoc(value)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__name__ == name
        assert value.__module__.startswith("torchferry.")


def test_star_import():
    namespace = {}
    exec("from torchferry import *", namespace)
    assert set(NAMES) <= namespace.keys()


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'torchferry' has no attribute 'deplay'"):
        torchferry.deplay  # noqa: B018 - the access is the test
