"""No dynamic dimension is lost silently: frozen is refused, bounded is kept and enforced, 0 and 1 are run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchferry as ferry
from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError, FrozenDimensionError, InputError
from torchferry.core.target import Target


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] >= 4 else x * 3


class Larger(nn.Module):
    def forward(self, x, y):
        if x.shape[0] > y.shape[0]:
            return x.sum() + y.sum()
        return x.sum() - y.sum()


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze(0) + 1


class Add(nn.Module):
    def forward(self, x, y):
        return x + y


class PlusOne(nn.Module):
    def forward(self, x):
        return x + 1


class Frozen(nn.Module):
    def forward(self, x):
        if x.shape[1] == 6:
            return x + 1
        return x


class Halves(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0] // 2, 2, -1).sum(1)


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1) @ torch.ones(12, 2)


@pytest.fixture
def opened(tmp_path):
    sessions = []

    def open_(exported):
        engine = ferry.compile(exported, Target(), tmp_path / f"engine{len(sessions)}")
        sessions.append(engine.open())
        return sessions[-1]

    yield open_
    for session in sessions:
        session.close()


def only(outputs):
    (value,) = outputs.values()
    return value


def ones(*shape):
    return np.ones(shape, np.float32)


class TestBranchOnTheBatch:
    @pytest.mark.parametrize(
        ("example", "right", "wrong", "factor"), [(4, [4, 5, 40], [0, 1, 2, 3], 2), (2, [0, 1, 2, 3], [4, 5], 3)]
    )
    def test_a_size_of_the_other_branch_is_an_error_never_a_wrong_number(self, opened, example, right, wrong, factor):
        exported = ferry.export(Branch().eval(), torch.rand(example, 3), dynamic_shapes={"x": {0: "batch"}})
        session = opened(exported)
        for size in right:
            np.testing.assert_array_equal(only(session.run({"x": ones(size, 3)})), factor * ones(size, 3))
        for size in wrong:
            with pytest.raises(InputError, match="batch"):
                session.run({"x": ones(size, 3)})

    def test_the_bound_and_its_line_are_reported(self):
        exported = ferry.export(Branch().eval(), torch.rand(4, 3), dynamic_shapes={"x": {0: "batch"}})
        assert (exported.signature.dims["batch"].min, exported.signature.dims["batch"].max) == (4, None)
        finding = next(f for f in exported.report.findings if f.code == "dimension-bounded")
        assert finding.severity == "warning"
        assert finding.where.startswith(f"{__file__}:")
        assert "x.shape[0] >= 4" in finding.where

    def test_it_survives_the_file_and_the_package(self, tmp_path):
        model = Branch().eval()
        exported = ferry.export(model, torch.rand(4, 3), dynamic_shapes={"x": {0: "batch"}})
        exported.save(tmp_path / "m.onnx")
        engine = ferry.compile(tmp_path / "m.onnx", Target(), tmp_path / "engine")
        ferry.pack(engine, tmp_path / "package")
        with ferry.load(tmp_path / "package").open() as session, pytest.raises(InputError, match=r"x\.shape\[0\] >= 4"):
            session.run({"x": ones(2, 3)})

    def test_a_good_call_does_not_open_the_door_for_a_bad_one(self, opened):
        session = opened(ferry.export(Branch().eval(), torch.rand(4, 3), dynamic_shapes={"x": {0: "batch"}}))
        for _ in range(3):
            session.run({"x": ones(4, 3)})
            with pytest.raises(InputError):
                session.run({"x": ones(3, 3)})


class TestRelations:
    def test_a_relation_between_dimensions_is_enforced(self, opened):
        exported = ferry.export(
            Larger().eval(), (torch.rand(4, 3), torch.rand(3)), dynamic_shapes={"x": {0: "n"}, "y": {0: "m"}}
        )
        assert [r.expression for r in exported.signature.relations] == ["n > m"]
        assert "x.shape[0] > y.shape[0]" in exported.signature.relations[0].where
        session = opened(exported)
        for n, m in [(4, 3), (9, 1), (2, 0), (1, 0)]:
            assert only(session.run({"x": ones(n, 3), "y": ones(m)})) == 3 * n + m
        for n, m in [(3, 3), (2, 5), (0, 0), (1, 1)]:
            with pytest.raises(InputError, match="n > m|'n' = 0"):
                session.run({"x": ones(n, 3), "y": ones(m)})

    def test_divisibility_is_enforced(self, opened):
        exported = ferry.export(Halves().eval(), torch.rand(6, 3), dynamic_shapes={"x": {0: "n"}})
        session = opened(exported)
        np.testing.assert_array_equal(only(session.run({"x": ones(8, 3)})), 2 * ones(4, 3))
        with pytest.raises(InputError, match="n"):
            session.run({"x": ones(7, 3)})

    def test_caution_of_torch_about_a_computed_size_of_one_is_no_relation(self, opened):
        class Rows(nn.Module):
            def forward(self, x):
                y = nn.functional.max_pool2d(x, 3, 4, 1)
                return y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, 5)

        shapes = {"x": {0: "n", 2: "h", 3: "w"}}
        exported = ferry.export(Rows(), torch.rand(2, 5, 4, 6), dynamic_shapes=shapes)
        assert exported.signature.relations == ()
        x = np.random.default_rng(0).random((3, 5, 1, 1), np.float32)
        np.testing.assert_array_equal(only(opened(exported).run({"x": x})), x.reshape(3, 1, 5))
        assert only(opened(exported).run({"x": ones(1, 5, 9, 9)})).shape == (1, 9, 5)

    @pytest.mark.parametrize("bias", [False, True])
    def test_caution_about_maps_that_shrink_is_settled_map_by_map(self, opened, bias):
        """What refuses the larger maps' sizes refuses the smaller ones' too; torch writes ``… != 1`` or ``1 < …``."""

        class Pyramid(nn.Module):
            def __init__(self):
                super().__init__()
                self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, 2, 1, bias=bias) for _ in range(5))
                self.last = nn.Conv2d(4, 1, 3, padding=1, bias=bias)

            def forward(self, x):
                maps = []
                for conv in self.convs:
                    x = conv(x)
                    each = self.last(x).permute(0, 2, 3, 1) if bias else x.permute(0, 2, 3, 1)
                    maps.append(each.reshape(x.shape[0], -1, each.shape[-1]))
                return torch.cat(maps, 1)

        net = Pyramid().eval()
        exported = ferry.export(net, torch.rand(2, 4, 64, 96), dynamic_shapes={"x": {0: "n", 2: "h", 3: "w"}})
        assert exported.signature.relations == ()
        assert "dimensions-related" not in {finding.code for finding in exported.report.findings}
        session = opened(exported)
        for size in ((1, 4, 1, 1), (3, 4, 2, 1), (2, 4, 5, 30), (1, 4, 100, 3)):
            x = torch.rand(size)
            got = only(session.run({"x": x.numpy()}))
            np.testing.assert_allclose(got, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)

    def test_a_branch_on_a_computed_size_above_one_is_a_relation(self, opened):
        class Area(nn.Module):
            def forward(self, x):
                return x + 1 if x.shape[0] * x.shape[1] // 4 > 1 else x + 2

        exported = ferry.export(Area(), torch.rand(8, 4), dynamic_shapes={"x": {0: "h", 1: "w"}})
        session = opened(exported)
        np.testing.assert_array_equal(only(session.run({"x": ones(2, 4)})), 2 * ones(2, 4))
        for size in ((1, 1), (1, 7), (7, 1)):
            with pytest.raises(InputError, match=r"// 4\) > 1"):
                session.run({"x": ones(*size)})

    def test_a_branch_on_a_computed_size_of_one_is_a_relation(self, opened):
        class Area(nn.Module):
            def forward(self, x):
                return x + 1 if x.shape[0] * x.shape[1] != 1 else x + 2

        exported = ferry.export(Area(), torch.rand(3, 4), dynamic_shapes={"x": {0: "h", 1: "w"}})
        session = opened(exported)
        np.testing.assert_array_equal(only(session.run({"x": ones(1, 2)})), 2 * ones(1, 2))
        with pytest.raises(InputError, match="!= 1"):
            session.run({"x": ones(1, 1)})

    def test_equal_names_declare_equal_sizes(self, opened):
        class Sums(nn.Module):
            def forward(self, x, y):
                return x.sum() + y.sum()

        arguments = (torch.rand(4), torch.rand(4))
        session = opened(ferry.export(Sums().eval(), arguments, dynamic_shapes={"x": {0: "n"}, "y": {0: "n"}}))
        session.run({"x": ones(5), "y": ones(5)})
        with pytest.raises(InputError, match="'n' is 5 at axis 0 of 'x' but 6"):
            session.run({"x": ones(5), "y": ones(6)})

    def test_dimensions_that_the_model_ties_together_are_one(self, opened):
        arguments = (torch.rand(4, 2), torch.rand(4, 2))
        exported = ferry.export(Add().eval(), arguments, dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}})
        assert any(f.code == "dimension-bound" for f in exported.report.findings)
        session = opened(exported)
        session.run({"x": ones(5, 2), "y": ones(5, 2)})
        with pytest.raises(InputError):
            session.run({"x": ones(5, 2), "y": ones(1, 2)})


class TestFrozen:
    def test_a_dimension_that_turned_constant_is_refused_with_the_line(self):
        with pytest.raises(FrozenDimensionError, match="'width' .axis 1 of 'x'. to 6") as caught:
            ferry.export(Frozen().eval(), torch.rand(2, 6), dynamic_shapes={"x": {0: "n", 1: "width"}})
        assert caught.value.where.startswith(f"{__file__}:")
        assert "if x.shape[1] == 6" in caught.value.where

    def test_one_that_a_weight_fixes_as_well(self):
        with pytest.raises(FrozenDimensionError, match="'w'") as caught:
            ferry.export(Flat().eval(), torch.rand(2, 3, 4), dynamic_shapes={"x": {0: "n", 2: "w"}})
        assert "torch.ones(12, 2)" in caught.value.where

    def test_left_out_it_is_fixed_and_enforced(self, opened):
        session = opened(ferry.export(Frozen().eval(), torch.rand(2, 6), dynamic_shapes={"x": {0: "n"}}))
        with pytest.raises(InputError, match="axis 1 of 'x' must be 6"):
            session.run({"x": ones(2, 5)})


class TestZeroAndOne:
    def test_squeeze_is_right_everywhere_but_at_one(self, opened):
        exported = ferry.export(Squeeze().eval(), torch.rand(3, 5), dynamic_shapes={"x": {0: "batch"}})
        assert 1 not in exported.signature.dims["batch"]
        assert "differs from PyTorch" in exported.signature.dims["batch"].excluded[1]
        session = opened(exported)
        for size in (2, 3, 8):
            np.testing.assert_array_equal(only(session.run({"x": ones(size, 5)})), 2 * ones(size, 5))
        with pytest.raises(InputError, match="'batch' = 1"):
            session.run({"x": ones(1, 5)})

    @pytest.mark.parametrize("example", [1, 2, 3])
    def test_plus_one_is_right_at_every_size(self, opened, example):
        exported = ferry.export(PlusOne().eval(), torch.rand(example, 5), dynamic_shapes={"x": {0: "batch"}})
        assert exported.signature.dims["batch"].min == 0
        session = opened(exported)
        for size in (0, 1, 2, 9):
            np.testing.assert_array_equal(only(session.run({"x": ones(size, 5)})), 2 * ones(size, 5))

    def test_an_example_whose_own_size_is_excluded_fails_the_report(self):
        exported = ferry.export(Squeeze().eval(), torch.rand(1, 5), dynamic_shapes={"x": {0: "batch"}})
        assert [f.code for f in exported.report.findings if f.severity == "error"] == ["example-excluded"]
        with pytest.raises(ferry.TorchferryError, match="batch = 1"):
            exported.report.raise_for_failure()

    def test_a_size_that_pytorch_refuses_is_excluded_with_its_words(self):
        exported = ferry.export(
            nn.Upsample(scale_factor=2, mode="bicubic").eval(),
            torch.rand(1, 3, 9, 9),
            dynamic_shapes={"input": {0: "n", 2: "h"}},
        )
        assert 1 in exported.signature.dims["h"]
        assert "PyTorch itself refuses" in exported.signature.dims["h"].excluded[0]

    @pytest.mark.parametrize("batch", [1, 2])
    def test_a_real_network_with_an_example_of_batch_one(self, opened, batch):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        ).eval()
        exported = ferry.export(model, torch.rand(batch, 3, 32, 32), dynamic_shapes={"input": {0: "n", 2: "h", 3: "w"}})
        session = opened(exported)
        for shape in [(1, 3, 32, 32), (5, 3, 17, 40), (2, 3, 3, 3)]:
            x = torch.rand(shape)
            got = only(session.run({"input": x.numpy()}))
            np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)

    def test_a_transformer_layer(self, opened):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        session = opened(ferry.export(layer, torch.rand(2, 5, 8), dynamic_shapes={"src": {0: "n", 1: "t"}}))
        for n, t in [(1, 1), (1, 9), (3, 1), (4, 7)]:
            x = torch.rand(n, t, 8)
            got = only(session.run({"src": x.numpy()}))
            np.testing.assert_allclose(got, layer(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class TestDeclaring:
    @pytest.mark.parametrize(
        "declared",
        [
            {"x": {0: "n", 1: None}},
            {"x": ("n", None)},
            {"x": {-2: "n"}},
            {"x": {0: torch.export.Dim("n")}},
            {"x": {0: Dimension("n")}},
            [{0: "n"}],
        ],
    )
    def test_every_usual_form(self, declared):
        exported = ferry.export(PlusOne().eval(), torch.rand(3, 5), dynamic_shapes=declared)
        assert exported.signature.inputs[0].shape == ("n", 5)

    @pytest.mark.parametrize("hint", [torch.export.Dim.AUTO, torch.export.Dim.DYNAMIC])
    def test_torchs_hints_get_a_name(self, hint):
        exported = ferry.export(PlusOne().eval(), torch.rand(3, 5), dynamic_shapes={"x": {0: hint}})
        assert exported.signature.inputs[0].shape == ("x_dim_0", 5)

    def test_the_bounds_of_a_dim_are_kept(self, opened):
        dim = torch.export.Dim("n", min=3, max=6)
        session = opened(ferry.export(PlusOne().eval(), torch.rand(4, 5), dynamic_shapes={"x": {0: dim}}))
        session.run({"x": ones(3, 5)})
        session.run({"x": ones(6, 5)})
        for size in (0, 1, 2, 7):
            with pytest.raises(InputError):
                session.run({"x": ones(size, 5)})

    def test_one_name_with_two_ranges_is_refused(self):
        shapes = {"x": {0: "n=1..8"}, "y": {0: "n=1..9"}}
        with pytest.raises(ConfigError, match=r"two ranges, n=1\.\.8 and n=1\.\.9"):
            ferry.export(Add().eval(), (torch.rand(4, 2), torch.rand(4, 2)), dynamic_shapes=shapes)

    @pytest.mark.parametrize(("text", "opt"), [("n=3..6", None), ("n=3..5..6", 5)])
    def test_a_name_may_have_sizes(self, opened, text, opt):
        exported = ferry.export(PlusOne().eval(), torch.rand(4, 5), dynamic_shapes={"x": {0: text}})
        allowed = exported.signature.dims["n"]
        assert (allowed.min, allowed.max, allowed.opt) == (3, 6, opt)
        with pytest.raises(InputError):
            opened(exported).run({"x": ones(7, 5)})

    @pytest.mark.parametrize("text", ["n=1..1", "n=0..1", "n=1..1..8"])
    def test_a_range_may_have_the_size_one_or_nothing_else(self, opened, text):
        exported = ferry.export(PlusOne().eval(), torch.rand(1, 5), dynamic_shapes={"x": {0: text}})
        assert exported.report.passed, exported.report.to_text()
        declared = Dimension.parse(text)
        session = opened(exported)
        session.run({"x": ones(1, 5)})
        for size in (0, 1, 2, 8, 9):
            if size in declared:
                session.run({"x": ones(size, 5)})
            else:
                with pytest.raises(InputError):
                    session.run({"x": ones(size, 5)})

    def test_sizes_said_once_hold_wherever_the_name_stands(self):
        shapes = {"x": {0: "n"}, "y": {0: "n=2..8"}}
        exported = ferry.export(Add().eval(), (torch.rand(4, 2), torch.rand(4, 2)), dynamic_shapes=shapes)
        assert (exported.signature.dims["n"].min, exported.signature.dims["n"].max) == (2, 8)

    @pytest.mark.parametrize(
        ("declared", "message"),
        [
            ({"x": {0: "n=1-8"}}, "'n=1-8' cannot name a dimension"),
            ({"x": {0: "n=4..8"}}, "axis 0 of 'x' is 3 in the example, outside of n=4..8"),
            ({"x": {0: "n=8..4"}}, "must rise"),
            ({"x": {0: "n=1..4", 1: "n=1..8"}}, "'n' is 3 at"),
            ({"y": {0: "n"}}, "unknown input 'y'"),
            ({"x": {2: "n"}}, "no axis 2"),
            ({"x": {0: "batch size"}}, "cannot name"),
            ({"x": {0: 3.5}}, "neither a name"),
            ({"x": {0: "n", 1: "n"}}, "'n' is 3 at axis 0 of 'x' but 5"),
            ({"x": ("n",)}, "2 dimensions"),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, declared, message):
        with pytest.raises(ConfigError, match=message):
            ferry.export(PlusOne().eval(), torch.rand(3, 5), dynamic_shapes=declared)

    def test_keys_may_be_chosen_names_or_parameters(self):
        for key in ("x", "image"):
            exported = ferry.export(
                PlusOne().eval(), torch.rand(3, 5), dynamic_shapes={key: {0: "n"}}, input_names=["image"]
            )
            assert exported.signature.inputs[0].shape == ("n", 5)


@settings(max_examples=12, deadline=None)
@given(threshold=st.integers(1, 5), example=st.integers(1, 6), operator=st.sampled_from(["<", ">=", "==", "!="]))
def test_whatever_the_branch_no_size_gives_a_wrong_number(threshold, example, operator, tmp_path_factory):
    """The law that the guards exist for: an answer is PyTorch's, or it is refused."""

    class Model(nn.Module):
        def forward(self, x):
            n = x.shape[0]
            taken = {"<": n < threshold, ">=": n >= threshold, "==": n == threshold, "!=": n != threshold}[operator]
            return x * 2 if taken else x * 3

    model = Model().eval()
    try:
        exported = ferry.export(model, torch.rand(example, 2), dynamic_shapes={"x": {0: "n"}})
    except FrozenDimensionError:
        return
    engine = ferry.compile(exported, Target(), tmp_path_factory.mktemp("law") / "engine")
    answered = 0
    with engine.open() as session:
        for size in range(8):
            x = torch.rand(size, 2)
            try:
                got = only(session.run({"x": x.numpy()}))
            except InputError:
                continue
            answered += 1
            np.testing.assert_array_equal(got, model(x).numpy())
    assert answered or exported.report.passed is False
