"""Types, dimensions and signatures of the tensors at which a graph is cut."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from torchferry.core.errors import ConfigError, FormatError
from torchferry.core.expressions import Expression
from torchferry.core.signature import DimRange, Signature, TensorSpec
from torchferry.graph.reading import tensor_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchferry.graph import Exported
    from torchferry.partitioning.flow import Flow
    from torchferry.partitioning.plan import Region

# Weights up to here may be sizes, which say what shape comes out.
_SMALL_BYTES = 1024
# How many sizes of a dimension are tried to learn the range of one that follows from it.
_MOST_SIZES = 1 << 16


class Boundaries:
    """Knows dtype and shape of every tensor at a cut; both sides of it get the same.

    Args:
        whole: The graph that is cut, with its signature.
        flow: Of the graph.
        regions: The parts.

    Raises:
        ConfigError: If a tensor at a cut is no tensor but a sequence, or its dtype is not known.
    """

    def __init__(self, whole: Exported, flow: Flow, regions: Sequence[Region]) -> None:
        self._whole = whole.signature
        self._flow = flow
        self._inputs = {value: value.name for value in flow.inputs}
        self._outputs = {v if v in flow.maker else flow.origin(v): v.name for v in flow.model.graph.outputs}
        visible = dict.fromkeys(v for region in regions for v in (*region.inputs, *region.outputs))
        self._types = self._find_types(visible)
        self._taken = {
            str(dim) for _, shape in self._types.values() for dim in shape or () if not isinstance(dim, int)
        } | set(self._whole.dims)
        self._derived: dict[str, str] = {}
        for value, (dtype, shape) in self._types.items():
            if value not in self._inputs and value not in self._outputs:
                self._types[value] = (dtype, self._with_names(shape, flow.name(value)))

    def _find_types(self, values: Iterable[ir.Value]) -> dict[ir.Value, tuple[ir.TypeProtocol, ir.Shape | None]]:
        """Read types off the graph, and infer those that it does not tell."""
        found: dict[ir.Value, tuple[ir.TypeProtocol, ir.Shape | None]] = {}
        inferred: Mapping[str, ir.Value] | None = None
        for value in values:
            aliases = [value, *(m.outputs[0] for m in self._flow.marks if self._flow.origin(m.outputs[0]) is value)]
            kind = next((v.type for v in aliases if v.type is not None), None)
            shape = next((v.shape for v in aliases if v.shape is not None), None)
            if value.const_value is not None and kind is None:
                kind, shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
            if kind is None or shape is None:
                if inferred is None:
                    inferred = self._inferred()
                guess = inferred.get(value.name or "")
                kind = kind or (guess.type if guess else None)
                shape = shape or (guess.shape if guess else None)
            if kind is None or kind.dtype in (None, ir.DataType.UNDEFINED):
                raise ConfigError(
                    f"the graph cannot be cut at {self._flow.describe(value)}: its dtype is not known",
                    hint="cut elsewhere, or add the tensor to the graph's value_info",
                )
            if not isinstance(kind, ir.TensorType):
                raise ConfigError(
                    f"the graph cannot be cut at {self._flow.describe(value)}: it is no tensor but a {kind}",
                    hint="cut before or after it",
                )
            found[value] = (kind, shape)
        return found

    def _inferred(self) -> Mapping[str, ir.Value]:
        """Infer types on a copy without the large weights; onnx-ir's own pass takes a sequence for a tensor."""
        copy = self._flow.model.clone()
        for name, value in list(copy.graph.initializers.items()):
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _SMALL_BYTES:
                value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
                del copy.graph.initializers[name]
                value.const_value = None
                if value not in copy.graph.inputs:
                    copy.graph.inputs.append(value)
        try:
            inferred = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(copy), data_prop=True))
        except onnx.shape_inference.InferenceError:
            return {}  # a graph with a fault somewhere may still be cut where it tells its types
        return ir.convenience.create_value_mapping(inferred.graph, include_subgraphs=False)

    def _with_names(self, shape: ir.Shape | None, name: str) -> ir.Shape | None:
        """Name the unknown dimensions of a tensor at a cut."""
        if shape is None:
            return None
        return ir.Shape(
            [self._fresh(f"{name}_{axis}") if _text(dim) is None else dim for axis, dim in enumerate(shape)]
        )

    def _fresh(self, text: str) -> str:
        """Return a dimension's name that is not taken yet, made from any text."""
        name = start = re.sub(r"\W+", "_", text).strip("_")
        if not name.isidentifier():
            name = start = f"dim_{name}"
        number = 1
        while name in self._taken:
            number += 1
            name = f"{start}_{number}"
        self._taken.add(name)
        return name

    def apply(self, region: Region, graph: ir.Graph) -> Signature:
        """Write types and shapes onto a part's inputs and outputs, in place, and return its signature.

        Args:
            region: The part in the whole.
            graph: The part, its inputs and outputs in the region's order.
        """
        free = {dim for v in region.inputs for dim in map(_text, self._types[v][1] or ()) if _is_name(dim)}
        derived: dict[str, str] = {}
        for value in region.inputs:
            if value not in self._inputs:
                for dim in map(_text, self._types[value][1] or ()):
                    if isinstance(dim, str) and not _is_name(dim) and not _names(dim) <= free:
                        derived[dim] = self._derived.get(dim) or self._derived.setdefault(dim, self._fresh(dim))
        specs = []
        for old, new in zip((*region.inputs, *region.outputs), (*graph.inputs, *graph.outputs), strict=True):
            kind, shape = self._types[old]
            new.type = kind
            new.shape = shape and ir.Shape([derived.get(str(_text(dim)), dim) for dim in shape])
            spec = self._spec_of_whole(old) or tensor_spec(new)
            specs.append(_renamed(spec, self._flow.name(old), derived))
        count = len(region.inputs)
        ranges = {derived[text]: _range(text, self._whole.dims) for text in derived}
        return restricted(tuple(specs[:count]), tuple(specs[count:]), self._whole, ranges)

    def _spec_of_whole(self, value: ir.Value) -> TensorSpec | None:
        of_input = {spec.name: spec for spec in self._whole.inputs}.get(self._inputs.get(value) or "")
        return of_input or {spec.name: spec for spec in self._whole.outputs}.get(self._outputs.get(value) or "")

    def signature_of_whole(self) -> Signature:
        """Return the signature of the whole with the names that the parts give its outputs."""
        names = {old: self._flow.name(value) for value, old in self._outputs.items()}
        outputs = tuple(_renamed(spec, names.get(spec.name, spec.name), {}) for spec in self._whole.outputs)
        return Signature(self._whole.inputs, outputs, self._whole.dims, self._whole.relations)


def restricted(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    whole: Signature,
    more: Mapping[str, DimRange] | None = None,
) -> Signature:
    """Return a signature with the ranges and relations of another, as far as its dimensions go.

    Args:
        inputs: Their named dimensions are those that count.
        outputs: Sizes that do not follow from them become unknown.
        whole: The other signature.
        more: Ranges of dimensions that it does not have.
    """
    known = {**whole.dims, **(more or {})}
    free = dict.fromkeys(dim for spec in inputs for dim in spec.shape or () if _is_name(dim))
    dims = {name: known[name] for name in known if name in free}
    dims |= {str(name): DimRange() for name in free if name not in dims}
    return Signature(
        tuple(_only_known(spec, dims.keys()) for spec in inputs),
        tuple(_only_known(spec, dims.keys()) for spec in outputs),
        dims,
        tuple(relation for relation in whole.relations if _names(relation.expression) <= dims.keys()),
    )


def _only_known(spec: TensorSpec, names: Iterable[str]) -> TensorSpec:
    if spec.shape is None:
        return spec
    known = set(names)
    return TensorSpec(
        spec.name,
        spec.dtype,
        tuple(dim if not isinstance(dim, str) or _names(dim) <= known else None for dim in spec.shape),
    )


def _renamed(spec: TensorSpec, name: str, dims: Mapping[str, str]) -> TensorSpec:
    shape = spec.shape and tuple(dims.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
    return TensorSpec(name, spec.dtype, shape)


def _range(text: str, dims: Mapping[str, DimRange]) -> DimRange:
    """Return the range of a size that follows from one bounded dimension; unbounded if it cannot be told."""
    names = _names(text)
    name = next(iter(names), "")
    base = dims.get(name)
    if len(names) != 1 or base is None or base.max is None or base.max - base.min > _MOST_SIZES:
        return DimRange()
    try:
        sizes = [Expression(text).evaluate({name: size}) for size in range(base.min, base.max + 1) if size in base]
    except (ArithmeticError, ValueError):
        return DimRange()
    if not sizes or any(size != int(size) for size in sizes):
        return DimRange()
    return DimRange(int(min(sizes)), int(max(sizes)), where=base.where)


def _names(text: str) -> frozenset[str]:
    """Return the names in a dimension; one that no dimension has if it is no expression."""
    try:
        return Expression(text).names
    except FormatError:
        return frozenset(("?",))


def _is_name(dim: int | str | None) -> bool:
    return isinstance(dim, str) and dim.isidentifier()


def _text(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value
