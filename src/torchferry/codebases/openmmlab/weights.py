"""Weights that make sense without a checkpoint: statistics of a real picture, and scores that find something.

With weights from a seed and batch normalisation that has seen nothing, outputs of a deep network reach thousands and
boxes infinity. What is compared then is noise.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.libraries import quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Batch = torch.Tensor
    Forward = Callable[[], Any]

SPREAD = 0.4
"""Standard deviation of the scores before their sigmoid."""
BOX_SPREAD = 0.2
"""The same for what boxes are decoded from, around twice this."""
_HALVINGS = 40
LIKELY = 2.0
"""What YOLOv3's objectness is around, before its sigmoid."""


@torch.no_grad()
def calibrate_statistics(model: torch.nn.Module, forward: Forward) -> int:
    """Set the statistics of every batch normalisation to what it sees of some pictures; return how many there are.

    Args:
        model: Changed in place; left in eval mode.
        forward: Runs it on them.
    """
    norms = [each for each in model.modules() if isinstance(each, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all, and there is one
        norm.train()
    try:
        with quiet():
            forward()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return len(norms)


@torch.no_grad()
def spread_scores(model: Any, batch: Batch, candidates: int) -> bool:
    """Scale and shift a detector's last layers so that so many pairs of place and class pass its thresholds.

    Args:
        model: A detector of mmdet with one head, changed in place.
        batch: Normalised pictures.
        candidates: How many are wanted on this picture.

    Returns:
        False, with nothing changed, if the head's scores do not come from convolutions behind a sigmoid.
    """
    head = getattr(model, "bbox_head", None)
    if head is None or getattr(head, "use_sigmoid_cls", True) is False:
        return False
    layers = _last_layers(model, head, batch, 0)
    if not layers:
        return False
    for layer, outputs in _last_layers(model, head, batch, 1):
        _normalise(layer, outputs, slice(None), BOX_SPREAD)
        _shift(layer, slice(None), 2 * BOX_SPREAD)
    values = []
    attributes = getattr(head, "num_attrib", None)
    chosen: dict[torch.nn.Conv2d, Any] = {}
    for layer, outputs in layers:
        chosen[layer] = slice(None)
        if attributes is not None:  # for each anchor four numbers of its box, its objectness, and the classes
            each = torch.arange(layer.out_channels).reshape(-1, attributes)
            _normalise(layer, outputs, each[:, :4].flatten(), BOX_SPREAD)
            _normalise(layer, outputs, each[:, 4])
            _shift(layer, each[:, 4], LIKELY)
            chosen[layer] = each[:, 5:].flatten()
        values.append(_normalise(layer, outputs, chosen[layer]).flatten())
    by = _logit((head.test_cfg or {}).get("score_thr", 0.05)) - _threshold(torch.cat(values), candidates)
    for layer, channels in chosen.items():
        _shift(layer, channels, by)
    return True


@torch.no_grad()
def spread_classes(model: Any, forward: Forward, candidates: int) -> bool:
    """Scale the classes of a detector's second stage so that so many pairs of region and class pass its threshold.

    Args:
        model: A detector of mmdet with two stages, changed in place.
        forward: Runs it on the picture.
        candidates: How many are wanted.

    Returns:
        False, with nothing changed, if the classes do not come from a linear layer behind a softmax.
    """
    head = getattr(model.roi_head, "bbox_head", None)
    layer = getattr(head, "fc_cls", None)
    if not isinstance(layer, torch.nn.Linear) or getattr(head, "custom_cls_channels", False):
        return False
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with quiet():
        forward()
    handle.remove()
    logits = torch.cat(seen)
    threshold = model.roi_head.test_cfg.get("score_thr", 0.05)
    low, high = 0.0, 100 / float(logits.std())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        passing = int(((logits * middle).softmax(1)[:, :-1] > threshold).sum())
        low, high = (low, middle) if passing > candidates else (middle, high)
    layer.weight.mul_(high)
    layer.bias.mul_(high)
    return True


def _last_layers(model: Any, head: Any, batch: Batch, which: int) -> list[tuple[torch.nn.Conv2d, list[torch.Tensor]]]:
    """Return the convolutions whose outputs are the head's scores (0) or boxes (1), with these; none if others are."""
    made: dict[int, torch.nn.Conv2d] = {}
    with ExitStack() as stack, quiet():

        def note(layer: torch.nn.Conv2d) -> Callable[..., None]:
            return lambda _module, _inputs, output: made.__setitem__(id(output), layer)

        for layer in head.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None:
                stack.callback(layer.register_forward_hook(note(layer)).remove)
        levels: Sequence[Any] = [*head(model.extract_feat(batch)), ()][which]
        if not all(isinstance(level, torch.Tensor) and id(level) in made for level in levels):
            return []
        found: dict[torch.nn.Conv2d, list[torch.Tensor]] = {}
        for level in levels:
            found.setdefault(made[id(level)], []).append(level)
    return list(found.items())


def _normalise(
    layer: torch.nn.Conv2d, outputs: Sequence[torch.Tensor], channels: Any, spread: float = SPREAD
) -> torch.Tensor:
    """Give channels of a layer mean 0 and this spread; return them as they are then, (places, channels)."""
    values = torch.cat([output[:, channels].flatten(2).mT.flatten(0, 1) for output in outputs])
    mean, scale = values.mean(), spread / values.std().clamp(min=1e-12)
    assert layer.bias is not None
    layer.weight[channels] *= scale
    layer.bias[channels] = (layer.bias[channels] - mean) * scale
    return (values - mean) * scale


def _shift(layer: torch.nn.Conv2d, channels: Any, by: float) -> None:
    assert layer.bias is not None
    layer.bias[channels] += by


def _threshold(values: torch.Tensor, count: int) -> float:
    """Return a number that so many values are above."""
    best = values.topk(min(count + 1, len(values))).values
    return float(best[-2:].mean())


def _logit(probability: float) -> float:
    bounded = min(max(probability, 1e-4), 1 - 1e-4)
    return math.log(bounded / (1 - bounded))
