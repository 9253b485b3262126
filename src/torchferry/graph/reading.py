"""Reading a graph from whatever form the user has it in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from torchferry.core.errors import FormatError, IntegrityError
from torchferry.core.expressions import Expression
from torchferry.core.files import inside, require_file
from torchferry.core.signature import DimRange, Signature, TensorSpec
from torchferry.core.target import Target
from torchferry.graph.exported import SIGNATURE_KEY, Exported

if TYPE_CHECKING:
    from collections.abc import Mapping


def as_exported(graph: Any, target: Target | None = None) -> Exported:
    """Return an ``Exported`` for anything that holds an ONNX graph.

    Args:
        graph: An ``Exported``, a path, a ``ModelProto``, an ``ir.Model`` or torch's ``ONNXProgram``.
        target: For a graph that is not an ``Exported``; ONNX Runtime if None.

    Raises:
        MissingFileError: If the path leads nowhere.
        FormatError: If the file is not a whole ONNX model, its nodes run in a circle, or the object is something else.
    """
    if isinstance(graph, Exported):
        return graph
    target = target or Target()
    if isinstance(graph, str | os.PathLike):
        model = _tidied(_load(Path(graph)))
    elif isinstance(graph, ir.Model):
        model = graph
    elif isinstance(graph, onnx.ModelProto):
        model = _tidied(ir.from_proto(graph))
    elif isinstance(getattr(graph, "model", None), ir.Model):
        model = graph.model
    else:
        raise FormatError(
            f"cannot read a graph from a {type(graph).__name__}",
            hint="give an Exported, a path to an .onnx file, a ModelProto, an ir.Model or an ONNXProgram",
        )
    return Exported(model, signature_of(model), target)


def _tidied(model: ir.Model) -> ir.Model:
    """Call ONNX's own domain by one of its two names, and sort nodes that stand before what they need."""
    imports = model.graph.opset_imports
    if "ai.onnx" in imports:
        imports.setdefault("", imports.pop("ai.onnx"))
    if not _is_in_order(model.graph):
        try:
            model.graph.sort()
        except ValueError as exc:
            raise FormatError(f"the nodes of the graph cannot be put in an order: {exc}") from exc
    return model


def _is_in_order(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        seen.add(node)
        makers = (value.producer() for value in node.inputs if value is not None)
        if any(maker is not None and maker not in seen for maker in makers):
            return False
    return True


def _load(path: Path) -> ir.Model:
    proto = read_proto(path)
    try:
        model = ir.from_proto(proto)
    except Exception as exc:  # untrusted; the reader raises whatever it stumbles over
        raise _not_whole(path, exc) from exc
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, path.parent)
    weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    external = [weight for weight in weights if isinstance(weight, ir.ExternalTensor)]
    check_locations(path, {os.fspath(weight.location): weight.name or "" for weight in reversed(external)})
    return model


def read_proto(path: Path) -> onnx.ModelProto:
    """Return the message in an ONNX file; what it keeps in external data is not read.

    Raises:
        MissingFileError: If the path leads nowhere.
        FormatError: If the file is not a whole ONNX model.
    """
    require_file(path, "ONNX model")
    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as exc:  # untrusted bytes; the reader raises whatever it stumbles over
        raise _not_whole(path, exc) from exc
    if not proto.graph.output:
        raise FormatError(f"'{path}' is not an ONNX model: it has no outputs", hint="check the path")
    return proto


def _not_whole(path: Path, exc: Exception) -> FormatError:
    return FormatError(f"'{path}' is not a whole ONNX model: {exc}", hint="export or download it again")


def check_locations(path: Path, locations: Mapping[str, str]) -> None:
    """Refuse weights outside the model's folder, and say which are missing, before anything reads them.

    Args:
        path: Of the model.
        locations: Where it keeps external data, and the name of a weight that is there.

    Raises:
        FormatError: If one of them is outside the model's folder.
        MissingFileError: If one does not exist.
    """
    for location, name in locations.items():
        try:
            data = inside(path.parent, location)
        except IntegrityError as exc:
            raise FormatError(
                f"'{path}' keeps the weights '{name}' outside its own folder, at '{location}'; refused",
                hint="move the data beside the model and save it again",
            ) from exc
        require_file(data, f"external data of '{path}'")


def signature_of(model: ir.Model) -> Signature:
    """Return the signature that we wrote into a graph, else what its inputs and outputs say.

    Raises:
        FormatError: If what we wrote cannot be read.
    """
    if SIGNATURE_KEY in model.metadata_props:
        try:
            return Signature.from_json(model.metadata_props[SIGNATURE_KEY])
        except ValueError as exc:
            raise FormatError(f"the graph's '{SIGNATURE_KEY}' cannot be read: {exc}") from exc
    initializers = set(model.graph.initializers)
    inputs = tuple(tensor_spec(v) for v in model.graph.inputs if v.name not in initializers)
    outputs = tuple(tensor_spec(v) for v in model.graph.outputs)
    names = {size for spec in inputs for size in spec.shape or () if isinstance(size, str) and size.isidentifier()}
    known = tuple(_only_known(spec, names) for spec in inputs)
    named = tuple(_with_names(spec, names) for spec in known)
    return Signature(
        named, tuple(_only_known(spec, names) for spec in outputs), {name: DimRange() for name in sorted(names)}
    )


def _with_names(spec: TensorSpec, names: set[str]) -> TensorSpec:
    """Name the sizes of an input that have no usable name, ``image_0`` for axis 0, so that a user can say their range.

    Args:
        spec: The input.
        names: Those in use; new ones are added.
    """
    if spec.shape is None:
        return spec
    shape = list(spec.shape)
    for axis, size in enumerate(shape):
        if size is None:
            name = re.sub(r"\W", "_", f"{spec.name}_{axis}")
            name = name if name.isidentifier() else f"_{name}"
            while name in names:
                name += "_"
            names.add(name)
            shape[axis] = name
    return TensorSpec(spec.name, spec.dtype, tuple(shape))


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Describe an input or output of a graph."""
    shape = None
    if value.shape is not None:
        # Some exporters write -1 for a size that is free.
        sizes = (size if isinstance(size, int) else size.value for size in value.shape)
        shape = tuple(None if isinstance(size, int) and size < 0 else size for size in sizes)
    dtype = value.dtype.numpy().name if value.dtype not in (None, ir.DataType.UNDEFINED) else "float32"
    return TensorSpec(value.name or "", dtype, shape)


def _only_known(spec: TensorSpec, names: set[str]) -> TensorSpec:
    """Keep the sizes that follow from the named dimensions; what else a file may say there means 'unknown'."""
    if spec.shape is None:
        return spec

    def known(size: int | str | None) -> bool:
        if not isinstance(size, str):
            return True
        try:
            return Expression(size).names <= names
        except FormatError:
            return False

    return TensorSpec(spec.name, spec.dtype, tuple(size if known(size) else None for size in spec.shape))
