"""A part behind marks stands alone: it reads sizes from what it is given, not from the picture."""

import numpy as np
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import ConfigError


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, 2, 1)
        self.coarse = nn.Conv2d(4, 4, 3, 2, 1)
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        fine = self.fine(x)
        fine, coarse = ferry.mark_tensors("maps", [fine, self.coarse(fine)])
        y = self.head(fine + nn.functional.interpolate(coarse, size=fine.shape[-2:]))
        return y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, 5)


@pytest.fixture(scope="module")
def exported():
    torch.manual_seed(0)
    shapes = {"x": {0: "n", 2: "h", 3: "w"}}
    picture = torch.rand(2, 3, 16, 20)
    return ferry.export(Pyramid().eval(), picture, dynamic_shapes=shapes, apply_marks=True)


def test_the_part_needs_nothing_but_its_start(exported):
    (part,) = ferry.partition(exported, [{"start": "maps:output"}])
    assert len(part.signature.inputs) == 2
    assert not {"x"} & set(part.signature.input_names)


@pytest.mark.parametrize("size", [(1, 3, 16, 20), (3, 3, 7, 30), (2, 3, 5, 5)])
def test_the_parts_give_what_the_whole_gives_at_other_sizes(exported, tmp_path, size):
    x = np.random.default_rng(0).random(size, np.float32)
    first, second = ferry.partition(exported, [{"end": "maps:output"}, {"start": "maps:output"}])
    opened = [
        ferry.compile(graph, ferry.Target("reference"), tmp_path / str(number)).open()
        for number, graph in enumerate((exported, first, second))
    ]
    (expected,) = opened[0].run({"x": x}).values()
    (got,) = opened[2].run(opened[1].run({"x": x})).values()
    np.testing.assert_array_equal(got, expected)


def test_a_size_that_no_marked_tensor_has_is_still_asked_for():
    class Relative(nn.Module):
        def forward(self, x):
            y = ferry.mark_tensors("half", x[:, ::2])
            return y.sum(1) / x.shape[1]

    exported = ferry.export(Relative(), torch.rand(2, 6), dynamic_shapes={"x": {1: "w"}}, apply_marks=True)
    with pytest.raises(ConfigError, match="also needs"):
        ferry.partition(exported, [{"start": "half:output"}])
