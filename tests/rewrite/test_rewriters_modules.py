"""Rewriters of module classes: every instance, in a copy; the user's model stays as it is."""

import functools
import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn

from torchferry.core.errors import ConfigError
from torchferry.rewrite import FunctionRewriter, ModuleRewriter, RewriterContext, patch_model

HERE = __name__


class Leaf(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.register_buffer("offset", torch.ones(size))
        self.sizes = [size]
        self.also_sizes = self.sizes
        self.options = {"inner": {"key": "value"}}

    def forward(self, x):
        return self.linear(x) + self.offset


class Special(Leaf):
    pass


class MoreSpecial(Special):
    pass


class Wrapper(nn.Module):
    """Takes the place of a leaf."""

    def __init__(self, module, cfg):
        super().__init__()
        self._module = module
        self.cfg = cfg

    def forward(self, x):
        return self._module(x) * 2


class OtherWrapper(Wrapper):
    pass


class Pair(NamedTuple):
    first: nn.Module
    second: int


class Everywhere(nn.Module):
    """Holds leaves in every way."""

    def __init__(self):
        super().__init__()
        self.plain = Leaf()
        self.sequential = nn.Sequential(Leaf(), nn.ReLU(), Leaf())
        self.list = nn.ModuleList([Leaf()])
        self.dict = nn.ModuleDict({"key": Leaf()})
        self.nested = nn.Sequential(nn.Sequential(Leaf()))
        self.shared = self.plain
        self.as_list = [self.plain, self.list[0]]
        self.as_dict = {"inner": (self.plain, [Pair(self.plain, 1)])}
        self.bound = self.plain.forward
        self.own = self.helper
        self.partial = functools.partial(self.helper, module=self.plain)
        self.cycle = [self]
        self.cycle.append(self.cycle)

    def helper(self, x, module):
        return module(x)

    def forward(self, x):
        for module in (self.plain, self.sequential, self.list[0], self.dict["key"], self.nested, self.shared):
            x = module(x)
        return self.own(x, self.as_list[0]) + self.partial(x) + self.as_dict["inner"][1][0].first(x)


@pytest.fixture
def rewriters():
    rewriters = ModuleRewriter()
    rewriters.register_rewrite_module(f"{HERE}.Leaf")(Wrapper)
    return rewriters


def context(rewriters, *args, **kwargs):
    return RewriterContext(*args, module_rewriter=rewriters, function_rewriter=FunctionRewriter(), **kwargs)


def snapshot(model):
    """Return everything that a module object holds, by identity."""
    seen = []
    for module in model.modules():
        for value in vars(module).values():
            seen += [value, *(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())]
        seen += [type(module), *vars(module)]
    return seen


@pytest.fixture
def unchanged():
    """Give a model, and see that nothing in it was changed."""
    model = Everywhere().eval()
    before = snapshot(model)
    expected = model(torch.ones(4))
    yield model
    after = snapshot(model)
    assert len(after) == len(before)
    assert all(new is old for new, old in zip(after, before, strict=True))
    assert torch.equal(model(torch.ones(4)), expected)


def wrapped(model):
    return {path for path, module in model.named_modules() if isinstance(module, Wrapper)}


ALL = {"plain", "sequential.0", "sequential.2", "list.0", "dict.key", "nested.0.0"}


def test_every_instance_in_a_context(unchanged, rewriters):
    with context(rewriters, model=unchanged) as active:
        model = active.model
        assert wrapped(model) == ALL
        assert model.shared is model.plain is model.as_list[0] is model.as_dict["inner"][0]
        assert model.as_dict["inner"][1][0] == Pair(model.plain, 1)
        assert model.partial.keywords["module"] is model.plain
        assert model.own.__self__ is model.partial.func.__self__ is model
        assert model.bound.__self__ is model.plain._module
        assert model.cycle[0] is model
        assert model.cycle[1] is model.cycle
        assert model.cycle is not unchanged.cycle
        model(torch.ones(4))
    assert active.model is None
    assert wrapped(unchanged) == set()
    (row,) = active.log.rows
    assert (row.status, row.calls, {path for path, _ in row.sites}) == ("applied", 6, ALL)


def test_a_lasting_copy(unchanged, rewriters):
    model = patch_model(unchanged, module_rewriter=rewriters)
    assert wrapped(model) == ALL
    x, leaf = torch.ones(4), unchanged.plain
    assert torch.equal(model.plain(x), leaf(x) * 2)


def test_tensors_are_shared(unchanged, rewriters):
    model = patch_model(unchanged, module_rewriter=rewriters)
    assert {id(p) for p in model.parameters()} == {id(p) for p in unchanged.parameters()}
    assert {id(b) for b in model.buffers()} == {id(b) for b in unchanged.buffers()}
    assert model.plain._module.linear.weight is unchanged.plain.linear.weight


def test_patching_again_changes_nothing(unchanged, rewriters):
    once = patch_model(unchanged, module_rewriter=rewriters)
    twice = patch_model(once, module_rewriter=rewriters)
    assert wrapped(twice) == ALL
    assert torch.equal(once(torch.ones(4)), twice(torch.ones(4)))
    with context(rewriters, model=once) as active:
        assert wrapped(active.model) == ALL


def test_the_model_itself(rewriters):
    leaf = Leaf()
    with context(rewriters, {"a": 1}, model=leaf) as active:
        assert type(active.model) is Wrapper
        assert active.model.cfg == {"a": 1}
        assert torch.equal(active.model(torch.ones(4)), leaf(torch.ones(4)) * 2)
    assert active.log.rows[0].sites == (("(the model itself)", 1),)


def test_the_nearest_base_wins(rewriters):
    rewriters.register_rewrite_module(f"{HERE}.Special")(OtherWrapper)
    model = nn.Sequential(Leaf(), Special(), MoreSpecial())
    patched = patch_model(model, module_rewriter=rewriters)
    assert [type(m) for m in patched] == [Wrapper, OtherWrapper, OtherWrapper]


def test_an_instance_inside_an_instance(rewriters):
    class Outer(Leaf):
        def __init__(self):
            super().__init__()
            self.inner = Leaf()

        def forward(self, x):
            return self.inner(x)

    patched = patch_model(Outer(), module_rewriter=rewriters)
    assert wrapped(patched) == {"", "_module.inner"}


@pytest.mark.parametrize("backend", ["default", "one", "two"])
def test_the_backend_decides(backend, rewriters):
    rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="one")(OtherWrapper)
    patched = patch_model(Leaf(), backend=backend, module_rewriter=rewriters)
    assert type(patched) is (OtherWrapper if backend == "one" else Wrapper)


def test_a_tie_names_both(rewriters):
    rewriters.register_rewrite_module(f"{HERE}.Leaf")(OtherWrapper)
    with pytest.raises(ConfigError, match=r"Wrapper \(.*py:\d+\) and .*OtherWrapper \(.*py:\d+\)"):
        patch_model(Leaf(), module_rewriter=rewriters)


def test_keywords_that_the_class_takes(rewriters):
    @rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="one", registered=1, both=1, other=1)
    class Picky(Wrapper):
        def __init__(self, module, cfg, both, registered=0, *, given=0, absent="default"):
            super().__init__(module, cfg)
            self.got = (both, registered, given, absent)

    @rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="two", registered=1)
    class Greedy(Wrapper):
        def __init__(self, module, cfg, **kwargs):
            super().__init__(module, cfg)
            self.got = kwargs

    def patched(backend):
        return patch_model(Leaf(), None, backend, both=2, given=3, module_rewriter=rewriters)

    assert patched("one").got == (2, 1, 3, "default")
    assert patched("two").got == {"registered": 1, "both": 2, "given": 3}
    with context(rewriters, backend="one", both=5, model=Leaf()) as active:
        assert active.model.got == (5, 1, 0, "default")


@pytest.mark.parametrize("training", [False, True])
def test_training_flags(training, rewriters):
    @rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="one")
    class WithMore(Wrapper):
        def __init__(self, module, cfg):
            super().__init__(module, cfg)
            self.more = nn.Dropout()

    model = nn.Sequential(Leaf(), nn.BatchNorm1d(4))
    model.train(training)
    model[0].linear.train(not training)
    patched = patch_model(model, backend="one", module_rewriter=rewriters)
    assert [patched[0].training, patched[0].more.training, patched[0]._module.training] == [training] * 3
    assert patched[0]._module.linear.training is not training


def test_device(rewriters):
    @rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="one")
    class WithMore(Wrapper):
        def __init__(self, module, cfg):
            super().__init__(module, cfg)
            self.more = nn.BatchNorm1d(4)

    patched = patch_model(Leaf().to("meta"), backend="one", module_rewriter=rewriters)
    assert {t.device.type for t in (*patched.parameters(), *patched.buffers())} == {"meta"}


@pytest.mark.parametrize("calls_the_module", [False, True])
def test_hooks_run_once_with_the_module(calls_the_module, rewriters):
    @rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="one")
    class Either(Wrapper):
        def forward(self, x, scale=1):
            return self._module(x) if calls_the_module else x

    leaf, seen = Leaf(), []
    leaf.register_forward_pre_hook(lambda module, args: seen.append(("pre", type(module))))
    leaf.register_forward_hook(lambda module, args, out: seen.append(("post", type(module))))
    leaf.register_forward_hook(lambda m, args, kwargs, out: seen.append(("kwargs", kwargs)), with_kwargs=True)
    patched = patch_model(leaf, backend="one", module_rewriter=rewriters)
    patched(torch.ones(4), scale=2)
    assert seen == [("pre", Leaf), ("post", Leaf), ("kwargs", {"scale": 2})]
    leaf(torch.ones(4))
    assert len(seen) == 6


def test_hooks_that_compute_a_weight(rewriters):
    with pytest.warns(FutureWarning):
        leaf = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    rewriters.register_rewrite_module("torch.nn.Linear", backend="one")(Wrapper)
    patched = patch_model(leaf, backend="one", module_rewriter=rewriters)
    with torch.no_grad():
        leaf[0].weight_g.mul_(3)
        assert torch.equal(patched(torch.ones(4)), leaf(torch.ones(4)) * 2)


def test_a_wrapper_may_change_the_module_it_is_given(rewriters, unchanged):
    @rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="one")
    class Changing(Wrapper):
        def __init__(self, module, cfg):
            super().__init__(module, cfg)
            module.linear.in_features = 17
            module.linear = nn.Identity()
            module.register_buffer("offset", torch.zeros(4))
            module.extra = 1
            module.sizes.append(5)
            module.options["inner"]["key"] = "new"

    patched = patch_model(unchanged, backend="one", module_rewriter=rewriters)
    assert torch.equal(patched.plain(torch.ones(4)), 2 * torch.ones(4))
    assert (unchanged.plain.sizes, unchanged.plain.options) == ([4], {"inner": {"key": "value"}})
    assert patched.plain._module.also_sizes == [4, 5]


def test_hooks_registered_later_stay_apart(rewriters):
    model = nn.Sequential(nn.ReLU())
    patched = patch_model(model, module_rewriter=rewriters)
    patched[0].register_forward_hook(lambda *args: pytest.fail("it is the copy's"))
    model(torch.ones(1))


def test_torchscript_is_left_as_it_is(rewriters):
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Linear(4, 4))
    model = nn.Sequential(scripted, Leaf())
    patched = patch_model(model, module_rewriter=rewriters)
    assert patched[0] is scripted
    assert patched(torch.ones(4)).shape == (4,)


def test_a_class_that_cannot_be_built_is_named(rewriters, unchanged):
    @rewriters.register_rewrite_module(f"{HERE}.Leaf", backend="one")
    class Broken(Wrapper):
        def __init__(self, module, cfg, needed):
            super().__init__(module, cfg)

    with pytest.raises(
        ConfigError, match=r"Broken cannot take the place of 'plain' \(Leaf\): TypeError.*'needed'"
    ) as caught:
        context(rewriters, backend="one", model=unchanged).__enter__()
    assert str(caught.value.where).startswith(__file__)


@pytest.mark.parametrize("name", ["no_such_library.Module", "torch.nn.Conv9d", "torch.nn.functional.relu"])
def test_a_class_that_is_not_there_harms_nobody(name, rewriters):
    rewriters.register_rewrite_module(name)(OtherWrapper)
    with context(rewriters, model=Leaf()) as active:
        assert type(active.model) is Wrapper
    assert [row.status for row in active.log.rows] == ["applied", "unknown"]
    (finding,) = active.log.findings()
    assert (finding.code, finding.severity) == ("rewriter-unknown", "warning")


def test_without_a_model_there_is_nothing_to_say(rewriters):
    with context(rewriters) as active:
        assert active.model is None
    assert [(row.status, row.reason) for row in active.log.rows] == [("declined", "no model was given")]
    assert active.log.findings() == ()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, rewriters):
    model = nn.Sequential(Leaf(), nn.ReLU(), Leaf()).eval()
    with context(rewriters, model=model) as active:
        program = torch.export.export(active.model, (torch.ones(2, 4),), strict=strict)
    x = torch.rand(2, 4)
    assert torch.allclose(program.module()(x), model[2](torch.relu(model[0](x) * 2)) * 2)
    assert "0._module.linear.weight" in program.state_dict


def test_threads_rewrite_one_model(unchanged, rewriters):
    seen = []

    def work():
        with context(rewriters, model=unchanged) as active:
            seen.append(wrapped(active.model))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [ALL] * 4
