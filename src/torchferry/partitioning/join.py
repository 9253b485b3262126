"""The verb join: parts become one graph again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from torchferry.core.errors import ConfigError
from torchferry.core.signature import Signature
from torchferry.graph import Exported, as_exported
from torchferry.graph.exported import SIGNATURE_KEY
from torchferry.partitioning.boundaries import restricted
from torchferry.partitioning.split import QUANTIZATION_KEY, WHOLE_KEY, all_values, fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchferry.core.signature import TensorSpec


def join(parts: Sequence[Any]) -> Exported:
    """Glue parts together at the tensors that one gives and another takes, by name.

    Args:
        parts: In any order; each an ``Exported``, a path, a ``ModelProto`` or an ``ir.Model``. They are not changed,
            and share their weights with the result.

    Returns:
        One graph. Where ``partition`` made all parts of one whole, it has the whole's inputs, outputs and signature;
        otherwise its inputs are those that no part gives, its outputs those that no part takes.

    Raises:
        ConfigError: If there are no parts, two give a tensor of one name, dtypes differ on both sides of a cut, the
            parts need each other in a circle, or they were written for different opsets.
    """
    given = [as_exported(part) for part in parts]
    if not given:
        raise ConfigError("there are no parts to join")
    ends = (value for part in given for value in (*part.model.graph.inputs, *part.model.graph.outputs))
    glue = _Glue({value.name for value in ends})
    for part in given:
        glue.add(part)
    glue.connect()
    wholes = {part.model.metadata_props.get(WHOLE_KEY) for part in given}
    text = wholes.pop() if len(wholes) == 1 else None
    signature = _signature(glue, given, Signature.from_json(text) if text else None)
    model = _model(glue, given, signature)
    return given[0].replace(model=model, signature=signature)


@dataclass
class _Glue:
    """What has been put together so far.

    Attributes:
        taken: Names of values that no other value may get; at first those at cuts.
        given: What some part gives, by name.
        asked: What some part takes, by name.
        nodes: Of all parts.
        weights: Of all parts, by name.
        opsets: Versions of the domains.
        functions: Local functions.
        node_names: Names of nodes that no other node may get.
    """

    taken: set[str | None]
    given: dict[str, ir.Value] = field(default_factory=dict)
    asked: dict[str, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)
    weights: dict[str, ir.Value] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    functions: dict[ir.OperatorIdentifier, ir.Function] = field(default_factory=dict)
    node_names: set[str | None] = field(default_factory=set)

    def add(self, part: Exported) -> None:
        """Take everything out of a copy of a part."""
        model = part.model.clone()
        graph = model.graph
        self._add_opsets(graph, model)
        inputs = [value for value in graph.inputs if not value.is_initializer()]
        outputs = [value for value in graph.outputs if value not in inputs]
        self._rename(graph, {*inputs, *outputs})
        weights = list(graph.initializers.values())
        graph.inputs.clear()
        graph.outputs.clear()
        graph.initializers.clear()
        nodes = list(graph)
        graph.remove(nodes)
        self.nodes += nodes
        for value in weights:
            known = self.weights.setdefault(value.name or "", value)
            if known is not value:
                ir.convenience.replace_all_uses_with(value, known)
        for value in outputs:
            if self.given.setdefault(value.name or "", value) is not value:
                raise ConfigError(f"two parts give a tensor '{value.name}'", hint="join each part once")
        for value in inputs:
            known = self.asked.setdefault(value.name or "", value)
            if known is not value:
                _check_dtypes(known, value)
                ir.convenience.replace_all_uses_with(value, known)

    def connect(self) -> None:
        """Let what is given go where it is asked for."""
        for name in [name for name in self.asked if name in self.given]:
            value = self.asked.pop(name)
            _check_dtypes(self.given[name], value)
            ir.convenience.replace_all_uses_with(value, self.given[name])

    def _rename(self, graph: ir.Graph, cuts: set[ir.Value]) -> None:
        """Give values and nodes of a part names that no other has; equal weights of one name stay one."""
        names: dict[str | None, str] = {}
        top = set(graph.initializers.values())
        for value in all_values(graph):
            if value in cuts:
                continue
            same = self.weights.get(value.name or "") if value in top else None
            if value.name in self.taken and not (same is not None and _are_equal(same, value)):
                names[value.name] = fresh(value.name or "", self.taken)
                value.name = names[value.name]
            self.taken.add(value.name)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.name in self.node_names:
                node.name = fresh(node.name or "", self.node_names)
            elif node.name:
                self.node_names.add(node.name)
        for value in all_values(graph):
            parameters = value.meta.get(QUANTIZATION_KEY)
            if parameters:
                value.meta[QUANTIZATION_KEY] = {key: names.get(name, name) for key, name in parameters.items()}

    def _add_opsets(self, graph: ir.Graph, model: ir.Model) -> None:
        for domain, version in graph.opset_imports.items():
            if self.opsets.setdefault(domain, version) != version:
                raise ConfigError(
                    f"parts of different opsets cannot be joined: '{domain or 'ai.onnx'}' is {self.opsets[domain]} "
                    f"in one and {version} in another"
                )
        for key, function in model.functions.items():
            known = self.functions.setdefault(key, function)
            if known is not function and _written(known) != _written(function):
                raise ConfigError(f"two parts define the function '{function.domain}::{function.name}' differently")


def _signature(glue: _Glue, parts: Sequence[Exported], whole: Signature | None) -> Signature:
    """Choose the inputs and outputs, in the whole's order as far as it is known."""
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    taken = {name for part in parts for name in part.signature.input_names}
    for part in parts:
        inputs |= {spec.name: spec for spec in part.signature.inputs if spec.name in glue.asked}
        outputs |= {spec.name: spec for spec in part.signature.outputs}
    merged = Signature(
        tuple(inputs.values()),
        (),
        {name: dim for part in parts for name, dim in part.signature.dims.items()},
        tuple(dict.fromkeys(relation for part in parts for relation in part.signature.relations)),
    )
    if whole is None:
        ends = tuple(spec for name, spec in outputs.items() if name not in taken)
        return restricted(merged.inputs, ends, merged)
    if all(spec.name in outputs for spec in whole.outputs) and inputs.keys() <= set(whole.input_names):
        return Signature(
            tuple(spec for spec in whole.inputs if spec.name in inputs), whole.outputs, whole.dims, whole.relations
        )
    own = {spec.name: spec for spec in (*whole.inputs, *whole.outputs)}
    starts = [spec for name, spec in own.items() if name in inputs]
    starts += [spec for name, spec in inputs.items() if name not in own]
    ends_of_whole = [spec for name, spec in own.items() if name in outputs]
    more = [spec for name, spec in outputs.items() if name not in own and name not in taken]
    both = Signature((), (), {**merged.dims, **whole.dims}, tuple(dict.fromkeys((*whole.relations, *merged.relations))))
    return restricted(tuple(starts), (*ends_of_whole, *more), both)


def _model(glue: _Glue, parts: Sequence[Exported], signature: Signature) -> ir.Model:
    first = parts[0].model
    graph = ir.Graph(
        [glue.asked[name] for name in signature.input_names],
        [glue.given[name] if name in glue.given else glue.asked[name] for name in signature.output_names],
        nodes=glue.nodes,
        initializers=list(glue.weights.values()),
        opset_imports=glue.opsets,
        name="joined",
        metadata_props=dict(first.graph.metadata_props),
    )
    try:
        graph.sort()
    except ValueError as exc:
        raise ConfigError(f"the parts cannot be joined: they need each other in a circle ({exc})") from exc
    properties = {key: value for part in parts for key, value in part.model.metadata_props.items()}
    properties.pop(WHOLE_KEY, None)
    return ir.Model(
        graph,
        ir_version=max(part.model.ir_version for part in parts),
        producer_name=first.producer_name,
        producer_version=first.producer_version,
        functions=list(glue.functions.values()),
        metadata_props={**properties, SIGNATURE_KEY: signature.to_json()},
        device_configurations=first.device_configurations,
    )


def _check_dtypes(one: ir.Value, other: ir.Value) -> None:
    if one.dtype != other.dtype:
        raise ConfigError(
            f"the parts do not fit together: '{one.name}' is {one.dtype} in one and {other.dtype} in another",
            hint="export or convert the parts with one precision at their boundaries",
        )


def _are_equal(one: ir.Value, other: ir.Value) -> bool:
    """Tell whether two weights are the same, without reading them where that can be told."""
    a, b = one.const_value, other.const_value
    if a is b or a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor) and a.path == b.path:
        return (a.offset, a.length) == (b.offset, b.length)
    return a.tobytes() == b.tobytes()


def _written(function: ir.Function) -> bytes:
    written: bytes = ir.serde.serialize_function(function).SerializeToString(deterministic=True)
    return written
