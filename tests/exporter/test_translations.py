"""Operators that torch.onnx translates wrongly, right at sizes that were never exported."""

import pytest
import torch

from torchferry.testing import assert_op

SIZES = [((2, 3, 4),), ((5, 3, 1),), ((1, 3, 7),)]


@pytest.mark.parametrize("name", ["amax", "amin"])
@pytest.mark.parametrize("arguments", [{}, {"keepdim": True}, {"dim": 1}, {"dim": (0, -1), "keepdim": True}], ids=str)
def test_extremes(name, arguments):
    def extreme(x):
        return getattr(x, name)(**arguments)

    assert assert_op(extreme, SIZES, ["onnxruntime"], dtypes=[torch.float32, torch.int64]).passed
