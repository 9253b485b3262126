"""The verb ``export``: capture, then settle what capturing cannot know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.core.errors import ConfigError
from torchferry.core.target import Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.graph import Exported


def export(
    model: Any,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: Target | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
) -> Exported:
    """Export a module to an ONNX graph that knows for which sizes it is right.

    Args:
        model: A ``torch.nn.Module``, or a ``Source`` that holds everything else as well. It is exported in eval mode,
            and left as it was.
        args: Example inputs: a tuple of positional arguments, a dict of keyword arguments, or one tensor.
        kwargs: Keyword arguments besides ``args``.
        target: What it is exported for; ONNX Runtime by default.
        dynamic_shapes: ``{input: {axis: name}}``. An input is called by its name in ``input_names``, else by
            ``forward``'s parameter. Equal names declare equal sizes.
        input_names: Names of the graph's inputs in order; ``forward``'s parameters where not given.
        output_names: Names of the graph's outputs in order.

    Returns:
        The graph, its signature with the valid range of every dimension, and a report of what was found.

    Raises:
        ModelError: If the model fails on its own example in PyTorch.
        ExportError: If it cannot be exported; names the line of the model.
        FrozenDimensionError: If a dimension declared dynamic became constant; names the line that fixed it.
        ConfigError: If names or dimensions do not fit the example.
    """
    from torchferry.exporter import Source, capture
    from torchferry.verification import settle

    if isinstance(model, Source):
        if args is not None or kwargs or dynamic_shapes is not None or input_names or output_names:
            raise ConfigError("a Source holds its own inputs, names and dynamic_shapes; give them there")
        source = model
    else:
        source = Source(
            model,
            () if args is None else args,
            dict(kwargs or {}),
            dynamic_shapes,
            tuple(input_names),
            tuple(output_names),
        )
    return settle(capture(source, target or Target()), source)
