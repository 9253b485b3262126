"""Which rewriter is chosen, what is said of the others, and where rewriters come from."""

import importlib.metadata
import itertools

import pytest
import rewrite_samples as samples
import torch

from torchferry.core.errors import ConfigError
from torchferry.rewrite import (
    FUNCTION_REWRITER,
    FunctionRewriter,
    LibVersionChecker,
    ModuleRewriter,
    RewriterContext,
    SymbolicRewriter,
    explain,
    plugins,
)

NAME = "rewrite_samples.scaled"


@pytest.fixture
def rewriters():
    return FunctionRewriter()


def context(rewriters, *args, **kwargs):
    none = {"module_rewriter": ModuleRewriter(), "symbolic_rewriter": SymbolicRewriter()}
    return RewriterContext(*args, function_rewriter=rewriters, **none, **kwargs)


def row_of(log, name):
    return next(row for row in log.rows if row.name == name)


@pytest.mark.parametrize("backend", ["default", "one", "two"])
@pytest.mark.parametrize("ir", ["default", "one", "two"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_most_specific_is_chosen_in_any_order(order, backend, ir, rewriters):
    kinds = [{}, {"ir": "one"}, {"backend": "one"}, {"backend": "one", "ir": "one"}]
    for index in order:
        rewriters.register_rewriter(NAME, **kinds[index])(lambda x, index=index: index)
    with context(rewriters, backend=backend, ir=ir) as active:
        assert samples.scaled(1.0) == 2 * (backend == "one") + (ir == "one")
    assert sum(row.status == "applied" for row in active.log.rows) == 1


def test_a_condition_is_more_specific_than_none(rewriters):
    for number, checker in enumerate([None, lambda env: True, None]):
        rewriters.register_rewriter(NAME, "one" if number == 2 else "default", extra_checkers=checker)(
            lambda x, number=number: number
        )
    with context(rewriters):
        assert samples.scaled(1.0) == 1
    with context(rewriters, backend="one"):
        assert samples.scaled(1.0) == 2


def test_a_backend_with_nothing_of_its_own_sees_the_original(rewriters):
    rewriters.register_rewriter(NAME, backend="one")(lambda x: "new")
    with context(rewriters, backend="two") as active:
        assert samples.scaled(1.0) == 2.0
    row = row_of(active.log, NAME)
    assert (row.status, row.reason) == ("declined", "for backend 'one', not 'two'")


def first_of_two(x):
    return "first"


def second_of_two(x):
    return "second"


@pytest.mark.parametrize("names", [(NAME, NAME), ("torch.einsum", "torch.functional.einsum")])
def test_a_tie_names_both(names, rewriters):
    rewriters.register_rewriter(names[0], backend="one")(first_of_two)
    rewriters.register_rewriter(names[1], backend="one")(second_of_two)
    with pytest.raises(ConfigError, match=r"first_of_two \(.*\.py:\d+\) and .*second_of_two \(.*\.py:\d+\)"):
        context(rewriters, backend="one").__enter__()
    with context(rewriters, backend="two"):
        assert samples.scaled(1.0) == 2.0


def test_closures_from_one_place_tie_as_well(rewriters):
    for number in range(2):
        rewriters.register_rewriter(NAME)(lambda x, number=number: number)
    with pytest.raises(ConfigError, match="equally well"), context(rewriters):
        pass


def test_two_names_of_one_function_agree(rewriters):
    rewriters.register_rewriter("torch.einsum")(lambda *args: "any backend")
    rewriters.register_rewriter("torch.functional.einsum", backend="one")(lambda *args: "one")
    x = torch.ones(1)
    for backend, expected in (("one", "one"), ("two", "any backend")):
        with context(rewriters, backend=backend):
            assert torch.einsum("a,a->a", x, x) == torch.functional.einsum("a,a->a", x, x) == expected


def test_the_same_rewriter_registered_again_replaces_itself(rewriters):
    for _ in range(3):
        rewriters.register_rewriter(NAME)(first_of_two)
    with context(rewriters):
        assert samples.scaled(1.0) == "first"
    assert len(rewriters.records()) == 1


INSTALLED = torch.__version__.split("+")[0]
RANGES = [
    ((None, None), True),
    (("1.0", None), True),
    ((None, "1.0"), False),
    (("1.0", "999"), True),
    ((INSTALLED, INSTALLED), True),
    ((INSTALLED, None), True),
    ((None, INSTALLED), True),
    (("999", None), False),
]


@pytest.mark.parametrize(("versions", "applies"), RANGES)
def test_versions_of_torch(versions, applies, rewriters):
    checker = LibVersionChecker("torch", *versions)
    rewriters.register_rewriter(NAME, extra_checkers=checker)(lambda x: "new")
    with context(rewriters) as active:
        assert samples.scaled(1.0) == ("new" if applies else 2.0)
    if not applies:
        assert f"(installed: {INSTALLED})" in row_of(active.log, NAME).reason


def test_versions_are_numbers_not_text(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert LibVersionChecker("lib", "2.9").check({})
    assert LibVersionChecker("lib", "2.13", "2.13").check({})
    assert not LibVersionChecker("lib", max_version="2.9").check({})


def test_a_library_that_is_not_installed_fits_no_version(rewriters):
    rewriters.register_rewriter(NAME, extra_checkers=LibVersionChecker("no_such_library"))(lambda x: "new")
    with context(rewriters) as active:
        assert samples.scaled(1.0) == 2.0
    assert "installed: none" in row_of(active.log, NAME).reason


def test_all_checkers_must_agree_and_see_the_environment(rewriters):
    seen = []

    class Seeing:
        def __init__(self, answer):
            self.answer = answer

        def check(self, env):
            seen.append(dict(env))
            return self.answer

    def only_opset_18(env):
        return env["opset"] == 18

    rewriters.register_rewriter(NAME, extra_checkers=[Seeing(True), only_opset_18])(lambda x: "new")
    for opset, expected in ((18, "new"), (17, 2.0)):
        with context(rewriters, {"a": 1}, "one", "ir", opset=opset) as active:
            assert samples.scaled(1.0) == expected
    assert seen[0] == {"backend": "one", "ir": "ir", "target": None, "cfg": {"a": 1}, "opset": 18}
    assert row_of(active.log, NAME).reason == "checker only_opset_18 says no"


@pytest.mark.parametrize(
    "register",
    [
        lambda r: r.register_rewriter(NAME, extra_checkers="2.0"),
        lambda r: r.register_rewriter(NAME, extra_checkers=[None]),
        lambda r: r.register_rewriter(samples.scaled)(lambda x: x),
        lambda r: r.register_rewriter(NAME)("not a function"),
        lambda r: ModuleRewriter().register_rewrite_module("torch.nn.ReLU")(lambda module, cfg: module),
    ],
)
def test_what_cannot_be_registered(register, rewriters):
    with pytest.raises(ConfigError):
        register(rewriters)


UNKNOWN = {
    "torch.Tensor.repat": ("'torch.Tensor' has no 'repat'", "torch.Tensor.repeat"),
    "torch.nn.functional.interpolat": ("'torch.nn.functional' has no", "torch.nn.functional.interpolate"),
    "torch.ops.aten.rellu": ("'torch.ops.aten' has no 'rellu'", "torch.ops.aten.relu"),
    "rewrite_samples.scalled": ("'rewrite_samples' has no 'scalled'", "rewrite_samples.scaled"),
    "rewrite_samples.Base.methot": ("'rewrite_samples.Base' has no", "rewrite_samples.Base.method"),
    "rewrite_samples.nothing.like.it": ("'rewrite_samples' has no 'nothing'", ""),
    "no_such_library.function": ("'no_such_library' is not installed", ""),
    "rewrite_broken.function": ("importing it failed: ZeroDivisionError", ""),
    "torch": ("'torch' is a module", ""),
    "torch.nn.Conv2d": ("it is a class; name one of its methods", ""),
    "torch.nn.functional.Tensor": ("it is a class", ""),
    "rewrite_samples.Base.factor": ("it is a float", ""),
    "builtins.str.join": ("a type of Python's own", ""),
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    (tmp_path / "rewrite_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_are_said_and_the_others_work(name, rewriters, broken):
    rewriters.register_rewriter(name)(first_of_two)
    rewriters.register_rewriter(NAME)(lambda x: "new")
    with context(rewriters) as active:
        assert samples.scaled(1.0) == "new"
    row = row_of(active.log, name)
    reason, suggestion = UNKNOWN[name]
    assert row.status == "unknown"
    assert reason in row.reason
    assert row.suggestion == suggestion
    (finding,) = active.log.findings()
    assert (finding.severity, finding.code) == ("warning", "rewriter-unknown")
    assert name in finding.message
    assert "first_of_two" in finding.message
    assert suggestion in finding.hint


def test_what_does_not_apply_is_not_even_imported(rewriters, broken):
    rewriters.register_rewriter("rewrite_broken.function", backend="one")(first_of_two)
    with context(rewriters, backend="two") as active:
        pass
    assert row_of(active.log, "rewrite_broken.function").status == "declined"


def test_what_nobody_calls_is_said(rewriters):
    rewriters.register_rewriter(NAME)(lambda x: x)
    with context(rewriters) as active:
        pass
    assert row_of(active.log, NAME).status == "unused"
    (finding,) = active.log.findings()
    assert (finding.severity, finding.code) == ("info", "rewriter-unused")
    assert NAME in finding.message


def test_explain(rewriters, capsys):
    rewriters.register_rewriter(NAME, backend="one")(first_of_two)
    rewriters.register_rewriter(NAME)(second_of_two)
    rewriters.register_rewriter("torch.Tensor.repat")(second_of_two)
    log = explain(backend="one", function_rewriter=rewriters, module_rewriter=ModuleRewriter())
    assert [row.status for row in log.rows] == ["applies", "declined", "unknown"]
    assert log.rows[0].file == f"{__file__}:{first_of_two.__code__.co_firstlineno}"
    printed = capsys.readouterr().out
    assert f"applies  {NAME} -> {__name__}.first_of_two ({log.rows[0].file})" in printed
    assert "first_of_two is more specific" in printed
    assert samples.scaled(1.0) == 2.0


@pytest.fixture
def plugin_package(tmp_path, monkeypatch):
    """A package that brings rewriters by entry points; one of them does not load."""
    (tmp_path / "rewrite_plugin.py").write_text(
        "from torchferry.rewrite import FUNCTION_REWRITER\n"
        "@FUNCTION_REWRITER.register_rewriter('rewrite_samples.scaled', backend='plugin_engine')\n"
        "def of_the_plugin(x):\n"
        "    return 'of the plugin'\n"
        "calls = []\n"
        "def register():\n"
        "    calls.append(1)\n"
    )
    metadata = tmp_path / "rewrite_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rewrite-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[torchferry.rewriters]\nbroken = rewrite_plugin_absent\nby_import = rewrite_plugin\n"
        "by_call = rewrite_plugin:register\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(FUNCTION_REWRITER, "_records", [])
    plugins.load_plugins.cache_clear()
    yield
    plugins.load_plugins.cache_clear()


def test_plugins(plugin_package):
    for _ in range(2):
        with RewriterContext(backend="plugin_engine") as active:
            assert samples.scaled(1.0) == "of the plugin"
        (finding,) = active.log.findings()
        assert (finding.severity, finding.code) == ("warning", "rewriter-plugin")
        assert "'broken' (rewrite_plugin_absent)" in finding.message
    import rewrite_plugin

    assert rewrite_plugin.calls == [1]


def test_plugins_are_for_the_registries_of_all(plugin_package, rewriters):
    rewriters.register_rewriter(NAME)(lambda x: "private")
    with context(rewriters, backend="plugin_engine") as active:
        assert samples.scaled(1.0) == "private"
    assert active.log.findings() == ()
    assert FUNCTION_REWRITER.records() == ()
