"""What is known about an operator: its schemas, what torch.onnx makes of it, and the ONNX operators nearest to it."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import onnx
import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]

from torchferry.core.errors import ConfigError, did_you_mean
from torchferry.exporter.made_up import made_up_calls
from torchferry.exporter.table import Registry, make_registry, translated_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

# What nearly every translation has besides what it is about: sizes, types, and the shapes of constants.
_PLUMBING = frozenset(
    ("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Expand", "Gather", "Identity", "Range", "Reshape",
     "Shape", "Size", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)  # fmt: skip
_FAMILIES = ("special", "linalg", "fft")  # the first word of a name in these says where it is documented
_SIMILAR = 0.81  # of difflib's ratio: 'fmax' is like 'Max', 'erfinv' is not like 'Erf'
_FEW = 4  # operators; a translation that uses more of them is no hint at any
_SHORTEST_PREFIX = 4  # letters; 'max_pool2d_with_indices' begins like 'MaxPool', but 'add_x' need not be an 'Add'


@dataclass(frozen=True)
class OnnxOperator:
    """An operator of the default ONNX domain.

    Attributes:
        name: Such as ``Resize``.
        why: Why it is shown: ``asked for``, ``same name``, ``similar name`` or ``torch.onnx uses it``.
        inputs: In order, as of the newest opset; optional ones in brackets, repeatable ones with dots.
        attributes: Names and types (``INT``, ``FLOATS``, …), as of the newest opset.
        opsets: Where it appeared, then each opset that changed it.
        deprecated: It is no longer part of the newest opset.
    """

    name: str
    why: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, str]
    opsets: tuple[int, ...]
    deprecated: bool = False

    def __str__(self) -> str:
        appeared, *changed = map(str, self.opsets)
        parts = [f"inputs {', '.join(self.inputs) or 'none'}"]
        parts += [f"attributes {', '.join(self.attributes)}"] if self.attributes else []
        parts.append(f"opset {appeared}" + (f", changed in {', '.join(changed)}" if changed else ""))
        return f"{self.name} ({'; '.join(parts)})"


Status = Literal["translated", "decomposed", "functionalized", "missing", "unclear"]


@dataclass(frozen=True)
class Overload:
    """One overload of an operator, and what becomes of it in an export.

    Attributes:
        name: Such as ``aten::squeeze.dim``.
        schema: As torch writes it; empty where the operator is not registered here.
        status: ``translated``; ``decomposed`` into operators that are translated; ``functionalized``, since it writes
            into an argument; ``missing``; or ``unclear``, where no call could be made up to see.
        detail: How, or why not.
        onnx: The ONNX operators that its translation may use.
    """

    name: str
    schema: str
    status: Status
    detail: str
    onnx: tuple[str, ...] = ()

    @property
    def is_exported(self) -> bool:
        """True if a call of it itself can be exported."""
        return self.status in ("translated", "decomposed")


def describe_operator(name: str) -> tuple[tuple[Overload, ...], tuple[OnnxOperator, ...]]:
    """Describe an operator of torch or of ONNX.

    Args:
        name: ``asinh``, ``aten::squeeze.dim``, ``torch.ops.aten.squeeze``, ``torchvision::nms``; or ``Resize``, which
            is ONNX's.

    Returns:
        Its overloads with what torch.onnx makes of them, none for an operator of ONNX; and the nearest ONNX operators.

    Raises:
        ConfigError: If there is no such operator.
    """
    if name in _onnx_schemas():
        return (), (onnx_operator(name, "asked for"),)
    base, found = _find(name)
    registry = make_registry() if found else Registry()
    overloads = tuple(_overload(op, registry) for op in found) or tuple(_unregistered(base))
    if not overloads:
        raise _unknown(name)
    used = dict.fromkeys(onnx_name for overload in overloads for onnx_name in overload.onnx)
    return overloads, nearest_onnx(base, used)


def nearest_onnx(name: str, used: Iterable[str] = ()) -> tuple[OnnxOperator, ...]:
    """Return the ONNX operators nearest to an operator of torch: by name, then those that its translation uses.

    Args:
        name: With or without a namespace, such as ``aten::deform_conv2d``; in any case.
        used: What its translation uses; left out if that is many, and shapes and types in any case.

    >>> [operator.name for operator in nearest_onnx("torchvision::deform_conv2d")]
    ['DeformConv']
    """
    by_name = _by_name(name)
    found = {known: onnx_operator(known, why) for known, why in by_name.items()}
    if "same name" not in by_name.values():
        telling = [known for known in used if known not in _PLUMBING]
        if len(telling) <= _FEW:
            found |= {known: onnx_operator(known, "torch.onnx uses it") for known in telling if known not in found}
    return tuple(found.values())


def onnx_operator(name: str, why: str) -> OnnxOperator:
    """Describe an operator of the default ONNX domain by its name."""
    versions = _onnx_schemas()[name]
    newest = versions[-1]
    option = onnx.defs.OpSchema.FormalParameterOption
    dress = {option.Optional: "[{}]", option.Variadic: "{}..."}
    return OnnxOperator(
        name,
        why,
        tuple(dress.get(given.option, "{}").format(given.name) for given in newest.inputs),
        {key: str(attribute.type).rpartition(".")[2] for key, attribute in sorted(newest.attributes.items())},
        tuple(schema.since_version for schema in versions if not schema.deprecated),
        newest.deprecated,
    )


@functools.cache
def _onnx_schemas() -> dict[str, list[onnx.defs.OpSchema]]:
    found: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda schema: schema.since_version):
        if not schema.domain:
            found.setdefault(schema.name, []).append(schema)
    return found


def _by_name(name: str) -> dict[str, str]:
    """Return the ONNX operators with the same name, else with similar ones, and which of the two it is."""
    known = {
        onnx_name.lower(): onnx_name for onnx_name, schemas in _onnx_schemas().items() if not schemas[-1].deprecated
    }
    words = [re.sub(r"(?<=[a-z])\dd$", "", word) for word in name.rpartition("::")[2].lower().split("_")]
    words = [word for word in words if word and not re.fullmatch(r"\dd", word)]
    if len(words) > 1 and words[0] in _FAMILIES:
        words = words[1:]
    plain = "".join(words)
    if plain in known:
        return {known[plain]: "same name"}
    starts = ["".join(words[:count]) for count in range(len(words) - 1, 0, -1)]
    near = [start for start in starts if len(start) >= _SHORTEST_PREFIX and start in known][:1]
    near += difflib.get_close_matches(plain, known, n=3, cutoff=_SIMILAR)
    return {known[found]: "similar name" for found in near}


def find_overload(name: str) -> OpOverload:
    """Return an overload by its name, as ``Overload.name`` gives it.

    Raises:
        ConfigError: If there is none.
    """
    _, found = _find(name if "." in name else f"{name}.default")
    if not found:
        raise _unknown(name)
    return found[0]


def _find(name: str) -> tuple[str, tuple[OpOverload, ...]]:
    """Resolve a name to ``namespace::operator`` and its overloads, or the one that it names; none if unregistered."""
    namespaces = {schema.name.partition("::")[0] for schema in torch._C._jit_get_all_schemas()}
    plain = name.removeprefix("torch.ops.")
    if "::" in plain:
        namespace, _, rest = plain.partition("::")
    else:
        first, _, after = plain.partition(".")
        namespace, rest = (first, after) if after and first in namespaces else ("aten", plain)
    operator, _, overload = rest.partition(".")
    if not operator.isidentifier() or not namespace.isidentifier():
        raise _unknown(name)
    if namespace not in namespaces:
        _import(namespace)
    base = f"{namespace}::{operator}"
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if not isinstance(packet, OpOverloadPacket):
        return base, ()
    overloads = packet.overloads()  # type: ignore[no-untyped-call]
    if overload and overload not in overloads:
        raise ConfigError(f"operator '{base}' has no overload '{overload}'", hint=did_you_mean(overload, overloads))
    if overload:
        return base, (getattr(packet, overload),)
    return base, tuple(overloads_of(packet))


def overloads_of(packet: OpOverloadPacket) -> list[OpOverload]:
    """Return an operator's overloads but those that TorchScript adds for plain numbers, which no graph has."""
    found = [getattr(packet, name) for name in packet.overloads()]  # type: ignore[no-untyped-call]
    return [op for op in found if torch._C._dispatch_has_kernel(op.name())]


def _import(namespace: str) -> None:
    """Import the library that a namespace is named after, which registers its operators."""
    try:
        importlib.import_module(namespace)
    except ModuleNotFoundError as exc:
        if exc.name != namespace:
            raise ConfigError(f"'{namespace}' cannot be imported: {exc}") from exc
    except Exception as exc:  # a library may raise anything when it is imported
        raise ConfigError(f"'{namespace}' cannot be imported: {type(exc).__name__}: {exc}") from exc


def _unknown(name: str) -> ConfigError:
    schemas = torch._C._jit_get_all_schemas()
    of_torch = {s.name for s in schemas if torch._C._dispatch_has_kernel(f"{s.name}.{s.overload_name}".rstrip("."))}
    if "::" in name:
        known = of_torch
    else:
        known = {full.removeprefix("aten::") for full in of_torch if full.startswith("aten::")} | _onnx_schemas().keys()
    near = difflib.get_close_matches(name, known - {name}, n=3)  # TorchScript has operators that no graph has
    return ConfigError(
        f"unknown operator '{name}'",
        hint=did_you_mean(name, near)
        if near
        else "name it as asinh, aten::squeeze.dim or library::operator; the library has to be installed",
    )


def _unregistered(base: str) -> Iterator[Overload]:
    """Give what torch.onnx knows of an operator whose library is not installed."""
    for meta in onnxscript_apis.get_torchlib_ops():
        if meta.qualified_name == base:
            library = base.partition("::")[0]
            used = _used_by(meta.function)
            yield Overload(base, "", "translated", f"by torch.onnx, where {library} is installed", used)


def _overload(op: OpOverload, registry: Registry) -> Overload:
    name = short_name(op)
    schema = str(op._schema)
    translations = [entry for entry in registry.get_decomps(op) if not entry.is_complex]
    if translations:
        by = "Torchferry" if translations[0].is_custom else "torch.onnx"
        return Overload(name, schema, "translated", f"by {by}", _used_by(translations[0].onnx_function))
    if registry.get_decomps(op):
        return Overload(name, schema, "missing", "torch.onnx translates it for complex numbers only")
    if op._schema.is_mutable:
        return Overload(name, schema, "functionalized", "exported as the overload that writes nowhere")
    left = _left_of_a_call(op, registry)
    if left is None:
        return Overload(name, schema, "unclear", "no translation; it takes a call to see whether torch decomposes it")
    into: dict[str, bool] = {}  # name of a decomposed operator: whether it is translated
    used: list[str] = []
    for target, function in left:
        into[short_name(target)] = function is not None
        used += _used_by(function) if function is not None else ()
    lacking = [part for part, translated in into.items() if not translated]
    if lacking == [name]:
        return Overload(name, schema, "missing", "no translation, no decomposition")
    if lacking:
        return Overload(name, schema, "missing", f"no translation; decomposed into {wording_of_parts(into, lacking)}")
    return Overload(name, schema, "decomposed", f"into {', '.join(into) or 'nothing'}", tuple(dict.fromkeys(used)))


def _left_of_a_call(op: OpOverload, registry: Registry) -> list[tuple[OpOverload, Callable[..., Any] | None]] | None:
    """Return what torch.onnx makes of a call, each operator with its translation; None if no call can be made up."""
    for made in made_up_calls(op):
        try:
            calls = list(translated_calls(made.program, registry))
        except Exception:  # noqa: BLE001, S112 - only when it is decomposed does torch look closely at the arguments
            continue
        return [(node.target, function) for node, _, function in calls if isinstance(node.target, OpOverload)]
    return None


def short_name(target: Any) -> str:
    """Return the name of what a node calls, as ``aten::asinh`` or ``aten::squeeze.dim``."""
    return str(target._schema).partition("(")[0] if isinstance(target, OpOverload) else str(target)


def wording_of_parts(parts: Iterable[str], lacking: Collection[str]) -> str:
    """Word what an operator is decomposed into, and which of it has no translation.

    >>> wording_of_parts(["aten::abs", "prims::signbit"], ["prims::signbit"])
    'aten::abs, prims::signbit, of which prims::signbit has no translation either'
    """
    have = "has" if len(lacking) == 1 else "have"
    of_which = "which" if list(parts) == list(lacking) else f"of which {', '.join(lacking)}"
    return f"{', '.join(parts)}, {of_which} {have} no translation either"


def _used_by(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the ONNX operators that a translation names in its source, and in that of the functions it calls."""
    found: dict[str, None] = {}
    seen: set[Any] = set()
    waiting: list[Any] = [function]
    while waiting:
        plain = inspect.unwrap(waiting.pop())  # onnxscript wraps them
        if plain in seen or not inspect.isfunction(plain):
            continue
        seen.add(plain)
        for node in ast.walk(_source(plain)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id.startswith("op"):
                found |= {node.attr: None} if node.attr in _onnx_schemas() else {}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called = plain.__globals__.get(node.func.id)
                waiting += [called] if getattr(called, "__module__", "").startswith(_TRANSLATORS) else []
    return tuple(found)


_TRANSLATORS = ("onnxscript.", "torch.onnx.", "torchferry.")


def _source(function: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # made without a file
        return ast.Module([], [])
