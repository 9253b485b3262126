"""Copying a model without its tensors, and replacing modules in the copy."""

from __future__ import annotations

import functools
from collections import OrderedDict
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Module = torch.nn.Module
    # The module's copy, its path and the original, to what takes its place; None for none.
    Build = Callable[[Module, str, Module], Module | None]

_SHARED = ("_modules", "_parameters", "_buffers")
_HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


def rewritten_copy(model: Module, build: Build, finished: tuple[type, ...]) -> Module:
    """Copy a model, sharing every parameter and buffer, with modules of the copy replaced.

    A module object is copied once, however many places it stands in, and so is every list, dict and set in its
    attributes. What refers to modules from there, from tuples, bound methods and partials refers to the copies. Other
    objects are shared; TorchScript modules too.

    Args:
        model: Is not changed.
        build: Called once for each module, children first.
        finished: Classes that are the result of a replacement; nothing in an instance is replaced again.
    """
    known: dict[int, Any] = {}
    _copy_tree(model, known)
    copies = list(known.values())
    for copy in copies:
        _copy_attributes(copy, known)
    originals = {id(known[id(module)]): module for module in model.modules()}
    replaced: dict[int, Module] = {}

    def replace(copy: Module, path: str) -> Module:
        if id(copy) not in replaced:
            replaced[id(copy)] = copy
            if not isinstance(copy, (torch.jit.ScriptModule, *finished)):
                for name, child in copy._modules.items():
                    if child is not None:
                        copy._modules[name] = replace(child, f"{path}.{name}" if path else name)
                built = build(copy, path, originals[id(copy)])
                replaced[id(copy)] = copy if built is None else built
        return replaced[id(copy)]

    root = replace(known[id(model)], "")
    seen: set[int] = set()
    for copy in copies:
        for name, value in vars(copy).items():
            if name not in _SHARED:
                copy.__dict__[name] = _substituted(value, replaced, seen)
    return root


def carry_over(module: Module, flags: Mapping[Module, bool], wrapper: Module) -> None:
    """Give what takes a module's place the module's hooks, device and training flags.

    The forward hooks move to the wrapper, so that they run once whatever the wrapper calls; they are still called with
    the module.

    Args:
        module: The copy that the wrapper was built from.
        flags: The training flags of everything in the module before that.
        wrapper: What takes its place.
    """
    device = next((tensor.device for inner in flags for tensor in _tensors(inner)), None)
    for inner in wrapper.modules():
        inner.training = flags.get(inner, module.training)
        if inner not in flags and any(tensor.device != device for tensor in _tensors(inner)) and device is not None:
            inner._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]
    for hooks, details in _HOOKS.items():
        for key, hook in getattr(module, hooks).items():
            getattr(wrapper, hooks)[key] = _with_module(hook, module)
        for detail in details:
            getattr(wrapper, detail).update(getattr(module, detail))
        for table in (hooks, *details):
            getattr(module, table).clear()


def _tensors(module: Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of a module, without those of the modules in it."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _copy_tree(module: Module, known: dict[int, Any]) -> Module:
    """Copy the module objects of a tree; their attributes are still those of the originals."""
    if id(module) in known:
        return known[id(module)]  # type: ignore[no-any-return]
    if isinstance(module, torch.jit.ScriptModule):
        return known.setdefault(id(module), module)  # type: ignore[no-any-return]
    copy: Module = object.__new__(type(module))
    known[id(module)] = copy
    copy.__dict__.update(vars(module))
    for name in _SHARED:
        copy.__dict__[name] = vars(module)[name].copy()
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _copy_tree(child, known)
    return copy


def _copy_attributes(module: Module, known: dict[int, Any]) -> None:
    if not isinstance(module, torch.jit.ScriptModule):
        for name, value in vars(module).items():
            if name not in _SHARED:
                module.__dict__[name] = _copied(value, known)


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """Return a value with the containers in it copied and the modules in it replaced by their copies.

    Args:
        value: Any object.
        known: What was copied before, by the original's id.
    """
    kind = type(value)
    if id(value) in known:
        return known[id(value)]
    if kind is list:
        known[id(value)] = items = []
        items += [_copied(item, known) for item in value]
        return items
    if kind in (dict, OrderedDict):
        table = known[id(value)] = kind()
        table.update((key, _copied(item, known)) for key, item in value.items())
        return table
    if kind is set:
        return known.setdefault(id(value), value.copy())
    if kind is MethodType and id(value.__self__) in known:
        return MethodType(value.__func__, known[id(value.__self__)])
    return _rebuilt(value, lambda item: _copied(item, known))


def _substituted(value: Any, substitutes: Mapping[int, Module], seen: set[int]) -> Any:
    """Return a value with the modules in it replaced; lists and dicts are changed in place, unless in ``seen``."""
    if isinstance(value, torch.nn.Module):
        return substitutes.get(id(value), value)
    if type(value) in (list, dict, OrderedDict) and id(value) not in seen:
        seen.add(id(value))
        for key, item in enumerate(value) if type(value) is list else value.items():
            value[key] = _substituted(item, substitutes, seen)
    return _rebuilt(value, lambda item: _substituted(item, substitutes, seen))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tuple or partial with what is in it changed, the same one if nothing is; any other object as it is."""
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        func, args, keywords = (change(part) for part in parts)
        same = func is value.func and args is value.args and all(keywords[k] is value.keywords[k] for k in keywords)
        return value if same else functools.partial(func, *args, **keywords)
    if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
        items = [change(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _with_module(hook: Callable[..., Any], module: Module) -> Callable[..., Any]:
    def call(_: Module, *args: Any, **kwargs: Any) -> Any:
        return hook(module, *args, **kwargs)

    return call
