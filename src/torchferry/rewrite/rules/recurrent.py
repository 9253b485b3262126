"""LSTM, GRU and plain recurrent networks over sequences of dynamic length, as in text recognition."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchferry.rewrite.state import FunctionContext

# Which of torch's gates stand where in ONNX: torch has i, f, g, o and r, z, n; ONNX i, o, f, c and z, r, h.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


@FUNCTION_REWRITER.register_rewriter("torch.lstm", op="LSTM", attributes={})
@FUNCTION_REWRITER.register_rewriter("torch.gru", op="GRU", attributes={"linear_before_reset": 1})
@FUNCTION_REWRITER.register_rewriter("torch.rnn_tanh", op="RNN", attributes={})
@FUNCTION_REWRITER.register_rewriter("torch.rnn_relu", op="RNN", attributes={"activations": ["Relu"]})
def recurrent(
    ctx: FunctionContext,
    input: torch.Tensor,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: Any,
    *batch_first: Any,
) -> tuple[torch.Tensor, ...]:
    """Put one ONNX node a layer into the graph.

    ``lstm(x, (h, c), ...)`` → ``LSTM(x, W, R, B, , h, c)`` of ONNX, the weights' gates in its order; GRU, RNN alike.

    Without it: FrozenDimensionError; torch unrolls the sequence to the example's length.

    Declines: outside of an export, a fixed length, packed sequences, projections, or training with dropout.
    """
    states = hx if isinstance(hx, list | tuple) else (hx,)
    if not _is_dynamic(input, states, params, batch_first) or (train and dropout):
        result: tuple[torch.Tensor, ...] = ctx.origin_func(
            input, hx, params, has_biases, num_layers, dropout, train, bidirectional, *batch_first
        )
        return result
    x = input.transpose(0, 1) if batch_first[0] else input
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    last: list[list[torch.Tensor]] = []
    for layer in range(num_layers):
        first = layer * directions
        cells = [params[each * cell : each * (cell + 1)] for cell in range(first, first + directions)]
        x, *final = _layer(ctx, x, [state[first : first + directions] for state in states], cells)
        last.append(final)
    ends = [torch.cat(parts) for parts in zip(*last, strict=True)]
    return (x.transpose(0, 1) if batch_first[0] else x, *ends)


def _is_dynamic(input: torch.Tensor, states: Sequence[Any], params: Any, batch_first: Any) -> bool:
    if not torch.compiler.is_exporting() or not batch_first or not isinstance(params, list | tuple):
        return False  # in eager, or a packed sequence, whose arguments are others
    projected = len({state.shape[-1] for state in states} | {params[1].shape[-1]}) > 1
    length = input.shape[1 if batch_first[0] else 0]
    return isinstance(length, torch.SymInt) and input.dim() == 3 and not projected


def _layer(
    ctx: FunctionContext, x: torch.Tensor, states: list[torch.Tensor], cells: list[list[torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Run one layer in both directions; ``x`` is length by batch by features."""
    hidden = states[0].shape[-1]
    weights, recurrences, biases = [], [], []
    for w, r, *bias in cells:
        weights.append(_ordered(w, ctx.op))
        recurrences.append(_ordered(r, ctx.op))
        biases.append(torch.cat([_ordered(b, ctx.op) for b in bias]) if bias else None)
    b = None if biases[0] is None else torch.stack([bias for bias in biases if bias is not None])
    inputs = [x, torch.stack(weights), torch.stack(recurrences), b, None, *states]
    length, batch, _ = x.shape
    directions = len(cells)
    attributes = {
        name: value * directions if name == "activations" else value for name, value in ctx.attributes.items()
    }
    y, *final = torch.onnx.ops.symbolic_multi_out(
        ctx.op,
        inputs,
        {"hidden_size": hidden, "direction": "bidirectional" if directions > 1 else "forward", **attributes},
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(length, directions, batch, hidden), *[(directions, batch, hidden)] * len(states)],
    )
    return y.transpose(1, 2).reshape(length, batch, directions * hidden), *final


def _ordered(parameter: torch.Tensor, op: str) -> torch.Tensor:
    gates = parameter.chunk(len(_GATES[op]))
    return torch.cat([gates[gate] for gate in _GATES[op]])
