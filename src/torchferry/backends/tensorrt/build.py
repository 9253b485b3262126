"""Building: parsing the graph, ranges of sizes, and TensorRT's errors in terms of the user's lines."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torchferry.backends.refusing import refusal
from torchferry.core.errors import BackendError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from torchferry.backends.tensorrt.library import Flavour
    from torchferry.core.signature import Signature

_NO_FP32_PRODUCTS = ("SM75",)  # Turing multiplies matrices in fp16 alone
_PSEUDO = ("NONE", "CURRENT")


def build(
    model: ir.Model,
    whole: ir.Model,
    signature: Signature,
    flavour: Flavour,
    capabilities: tuple[str, ...],
    onnx_file: Path,
    workspace: int = 0,
) -> bytes:
    """Build an engine.

    Args:
        model: The graph that is in the file, for finding nodes.
        whole: The user's own, of which it was made.
        signature: Of the graph, whose inputs are the signature's, in order.
        flavour: Which TensorRT.
        capabilities: For which GPUs, such as ``SM86``; empty for the one at hand.
        onnx_file: The graph.
        workspace: Bytes that its kernels may use besides the tensors; 0 for TensorRT's own limit.

    Returns:
        The engine's bytes.

    Raises:
        UnsupportedError: If TensorRT lacks an operator, or a dimension has no bound.
        BackendError: If it fails to build.
    """
    profile = shape_ranges(signature)
    library = flavour.load()
    with flavour.logger() as (logger, errors):
        builder = library.Builder(logger)
        flags = library.NetworkDefinitionCreationFlag
        typed = getattr(flags, "STRONGLY_TYPED", None)  # without it, the types of the graph would be hints
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = library.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_file)):
            raise _not_parsed(model, whole, [parser.get_error(place) for place in range(parser.num_errors)], errors)
        config = builder.create_builder_config()
        config.clear_flag(library.BuilderFlag.TF32)  # which would round the fp32 that was asked for to ten bits
        if workspace:
            config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, workspace)
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
            for place, name in enumerate(capabilities):
                config.set_compute_capability(library.ComputeCapability.__members__[name], place)
        _check_values(network, signature)
        if profile:
            config.add_optimization_profile(_profile(builder, model, profile))
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            if workspace and "workspace limit" in " ".join(errors):
                raise UnsupportedError(
                    f"TensorRT cannot build the graph within its workspace limit of {workspace} bytes",
                    hint="give it a larger max_workspace_size, or 0 for its own limit",
                )
            raise _not_built(model, whole, errors)
        return bytes(engine)


def known_capabilities(library: Any, precision: str) -> tuple[str, ...]:
    """Return the GPUs that an engine can be built for, as ``SM86``, that multiply matrices in a precision."""
    lacking = _NO_FP32_PRODUCTS if precision == "fp32" else ()
    return tuple(name for name in library.ComputeCapability.__members__ if name not in (*_PSEUDO, *lacking))


def shape_ranges(signature: Signature) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return for every input with a free size its smallest, its usual and its largest shape.

    Where the user did not say the usual size of a dimension, it is the middle of its range.

    Raises:
        UnsupportedError: If a dimension has no largest size, or a size no name.
    """
    if not any(isinstance(size, str | None) for spec in signature.inputs for size in spec.shape or (None,)):
        return {}
    entries = {size for spec in signature.inputs for size in spec.shape or () if isinstance(size, str)}
    dims = {name: allowed for name, allowed in signature.dims.items() if any(name in entry for entry in entries)}
    for name, allowed in dims.items():
        if allowed.max is None:
            least = max(allowed.min, 1)
            raise UnsupportedError(
                f"TensorRT wants to know the largest size of '{name}', which has none ({name}: {allowed})",
                hint=f"export it with torch.export.Dim('{name}', max=…) or `--dynamic …={name}={least}..8`, or compile "
                f"the file with `torchferry compile --range {name}={least}..8`",
            )
    smallest = {name: max(allowed.min, 1) for name, allowed in dims.items()}
    largest = {name: max(allowed.max or 1, 1) for name, allowed in dims.items()}
    usual = {name: (least + largest[name]) // 2 for name, least in smallest.items()}
    declared = {name: allowed.opt for name, allowed in dims.items() if allowed.opt is not None}
    usual |= {name: min(max(size, smallest[name]), largest[name]) for name, size in declared.items()}
    ranges = {}
    for spec in signature.inputs:
        shapes = [spec.shape_at(sizes) for sizes in (smallest, usual, largest)]
        whole = [tuple(size for size in shape or () if size is not None) for shape in shapes]
        if spec.shape is None or any(len(shape) < len(spec.shape) for shape in whole):
            raise UnsupportedError(f"TensorRT wants every free size of an input to have a name, got {spec}")
        ranges[spec.name] = tuple(whole)
    return ranges


def _profile(builder: Any, model: ir.Model, ranges: dict[str, tuple[tuple[int, ...], ...]]) -> Any:
    profile = builder.create_optimization_profile()
    for value, shapes in zip(model.graph.inputs, ranges.values(), strict=True):
        profile.set_shape(value.name, *shapes)
    return profile


def _check_values(network: Any, signature: Signature) -> None:
    """Refuse inputs whose values are sizes.

    Raises:
        UnsupportedError: If there is one.
    """
    for place, spec in enumerate(signature.inputs):
        if network.get_input(place).is_shape_tensor:
            raise _values_refused(spec.name)


def _values_refused(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"TensorRT wants ranges for the values of '{name}', since sizes depend on them",
        hint="make it a constant of the model, or use another backend",
    )


def _not_parsed(model: ir.Model, whole: ir.Model, parse_errors: list[Any], logged: list[str]) -> BackendError:
    if not parse_errors:
        return BackendError(f"TensorRT cannot read the graph: {_shortened(' '.join(logged)) or 'it does not say why'}")
    from torchferry.graph.passes.name_tensors import given_name

    reason = _shortened(parse_errors[0].desc())
    sized = re.search(r"Network input (\S+) is a shape tensor", reason)
    if sized:
        return _values_refused(next(given_name(value) for value in model.graph.inputs if value.name == sized[1]))
    reason = reason if re.search(r"\w \w", reason) else "at least not in this form"
    nodes = [node for error in parse_errors if (node := _node_of(model, error)) is not None]
    if not nodes:
        return UnsupportedError(f"TensorRT does not take {parse_errors[0].node_operator() or 'the graph'}: {reason}")
    return refusal("TensorRT does not take", list(dict.fromkeys(nodes)), model, whole, reason=reason)


def _node_of(model: ir.Model, error: Any) -> ir.Node | None:
    nodes = list(model.graph)
    place = int(error.node())
    if 0 <= place < len(nodes) and nodes[place].op_type == error.node_operator():
        return nodes[place]
    return _node_named(model, error.node_name())


def _node_named(model: ir.Model, name: str) -> ir.Node | None:
    return next((node for graph in model.graphs() for node in graph if name and node.name == name), None)


def _not_built(model: ir.Model, whole: ir.Model, logged: list[str]) -> BackendError:
    text = " ".join(logged)
    named = (_node_named(model, name) for name in re.findall(r"['\"\[]([^'\"\[\]]+)['\"\]]", text))
    node = next((node for node in named if node is not None), None)
    reason = _shortened(text) or "it does not say why"
    if node is None:
        return UnsupportedError(f"TensorRT cannot build the graph: {reason}", hint="use another backend")
    return refusal("TensorRT cannot build", [node], model, whole, reason=reason)


def _shortened(text: str) -> str:
    """Keep the reason; leave out codes and places in TensorRT's own source."""
    text = re.sub(r"\(?\bIn \w+ at \S+:\d+\)?|\[\w+\.\w+(::\w+)*:\d+: \w+\]|\[\w+\.\w+(::\w+)+\]", "", text)
    text = re.sub(r"\w+::\w+: Error Code \d+: ", "", text)
    return " ".join(text.split())[:300]
