r"""ATen's operators written out in others, so that a scale can be absorbed, or a clip stand, inside them.

Each gives what the operator gives, up to FP32's own rounding, at operands of any size: what a gate sees is clipped
where the gate is flat. Written out are only operators that would otherwise stay in FP32, as ``fix`` finds; splits
always are, since the graph has no tensors for lists.

================================  =====================================================================
operator                          becomes
================================  =====================================================================
silu, gelu, mish, hardswish       x · gate(clip(x))
relu6, hardsigmoid                clip(x, 0, 6); clip(x + 3, 0, 6) / 6
softplus, log_sigmoid             max(x, 0) + log(1 + exp(-min(\|x\|, 64))); min(x, 0) - the same logarithm
elu, selu                         scale · max(x, 0) + alpha · scale · (exp(clip(x, -64, 0)) - 1)
softmax, log_softmax              d = x - max(x): softmax(d), then exp(d) / sum(exp(d)); d - log(sum(exp(d)))
scaled_dot_product_attention      softmax(q · scale @ kᵀ + mask) @ v, the softmax as above
chunk, split, unbind              slices
================================  =====================================================================
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchferry.precision.prepare import MASK_BECOMES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

aten = torch.ops.aten
_FLAT = 128.0  # sigmoid(-128) is 0 in FP32, and sigmoid(128) is 1
_FLAT_ERF = 32.0  # erf(32 / sqrt(2)) is 1, and so is tanh


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(torch.clamp(x, -_FLAT, _FLAT))


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    y = torch.clamp(x, -_FLAT_ERF, _FLAT_ERF)
    if approximate == "none":
        return x * ((torch.erf(y * math.sqrt(0.5)) + 1.0) * 0.5)
    return x * ((torch.tanh((y + y * y * y * 0.044715) * math.sqrt(2 / math.pi)) + 1.0) * 0.5)


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.nn.functional.softplus(torch.clamp(x, -_FLAT, _FLAT)))


def _hardsigmoid(x: Tensor) -> Tensor:
    return torch.clamp(x + 3.0, 0.0, 6.0) * (1 / 6)


def _relu6(x: Tensor) -> Tensor:
    return torch.clamp(x, 0.0, 6.0)


def _log_of_one_plus(x: Tensor) -> Tensor:
    """Return log(1 + exp(-|x|)), which is 0 from 64 on."""
    return torch.log1p(torch.exp(-torch.clamp_max(torch.abs(x), 64.0)))


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    del threshold  # what torch leaves out beyond it is 0 in FP32
    return torch.relu(x) + _log_of_one_plus(x) if beta == 1 else NotImplemented


def _log_sigmoid(x: Tensor) -> Tensor:
    return torch.clamp_max(x, 0.0) - _log_of_one_plus(x)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    if input_scale != 1:
        return NotImplemented
    positive = torch.relu(x) if scale == 1 else torch.relu(x) * scale
    return positive + torch.expm1(torch.clamp(x, -64.0, 0.0)) * (alpha * scale)


def _selu(x: Tensor) -> Any:
    return _elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _softmax(x: Tensor, dim: int, *_: Any) -> Any:
    return aten._softmax.default(x - torch.amax(x, dim, keepdim=True), dim, False)


def _opened_softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    exponential = torch.exp(x - torch.amax(x, dim, keepdim=True))
    return exponential / torch.sum(exponential, dim, keepdim=True)


def _log_softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    shifted = x - torch.amax(x, dim, keepdim=True)
    return shifted - torch.log(torch.sum(torch.exp(shifted), dim, keepdim=True))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p or enable_gqa:
        return NotImplemented
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal:
        rows, columns = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
        attn_mask = rows.unsqueeze(-1) >= columns
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.masked_fill(scores, ~attn_mask, MASK_BECOMES)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _softmax(scores, -1) @ value


def _split(x: Tensor, length: int, dim: int = 0) -> Any:
    size = x.shape[dim]
    if not isinstance(size, int):
        return NotImplemented
    return [x.narrow(dim, start, min(length, size - start)) for start in range(0, size, length)]


def _chunk(x: Tensor, count: int, dim: int = 0) -> Any:
    size = x.shape[dim]
    return _split(x, max(-(-size // count), 1), dim) if isinstance(size, int) else NotImplemented


def _split_with_sizes(x: Tensor, lengths: list[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return [x.narrow(dim, start, length) for start, length in zip(starts, lengths, strict=True)]


def _unbind(x: Tensor, dim: int = 0) -> Any:
    size = x.shape[dim]
    return [x.select(dim, place) for place in range(size)] if isinstance(size, int) else NotImplemented


EXPANSIONS: dict[Any, Callable[..., Any]] = {
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.mish.default: _mish,
    aten.hardswish.default: lambda x: x * _hardsigmoid(x),
    aten.hardsigmoid.default: _hardsigmoid,
    aten.relu6.default: _relu6,
    aten.softplus.default: _softplus,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.elu.default: _elu,
    aten.selu.default: _selu,
    aten.softmax.int: _softmax,
    aten._softmax.default: _opened_softmax,
    aten.log_softmax.int: _log_softmax,
    aten._log_softmax.default: _log_softmax,
    aten.scaled_dot_product_attention.default: _attention,
}
"""What may be written out, by operator."""
_SPLITS: dict[Any, Callable[..., Any]] = {
    aten.chunk.default: _chunk,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
}


def expand(program: torch.export.ExportedProgram, operators: Collection[Any] = ()) -> torch.export.ExportedProgram:
    """Write operators of a program out.

    Args:
        program: Not changed.
        operators: Which, keys of ``EXPANSIONS``; splits are written out in any case.
    """
    wanted = {**_SPLITS, **{operator: EXPANSIONS[operator] for operator in operators}}
    # One may come out of another, and out of its form that works in place.
    is_concerned = bool(operators) or any(node.target in _SPLITS for node in program.graph.nodes)
    return program.run_decompositions(wanted) if is_concerned else program


def numbers_as_floats(program: torch.export.ExportedProgram) -> None:
    """Make floats of the whole numbers that a program computes with floats, in place: an integer has no scale."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or "pow" in schema.name or not any(map(_is_float, node.all_input_nodes)):
            continue
        for place, argument in enumerate(schema.arguments):
            if argument.name == "alpha" or str(argument.type) not in ("number", "Optional[number]", "Tensor"):
                continue
            if place < len(node.args) and type(node.args[place]) is int:
                node.update_arg(place, float(node.args[place]))
            elif type(node.kwargs.get(argument.name)) is int:
                node.update_kwarg(argument.name, float(node.kwargs[argument.name]))


def _is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32
