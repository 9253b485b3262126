"""Flags that say which model, weights, inputs and dimensions; they override the config, key by key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.core.errors import ConfigError
from torchferry.core.target import AUTO, DEFAULT_BACKEND

if TYPE_CHECKING:
    import argparse

    from torchferry.pipeline.config import DeployConfig


def add_model_flags(parser: argparse.ArgumentParser, config: str = "CONFIG") -> None:
    """Add the flags of everything that starts from a PyTorch model, and say what the first argument may be."""
    parser.add_argument("config", nargs="?", metavar=config, help="a deploy.toml; flags override it")
    model = parser.add_argument_group("model")
    add_weights_flags(model)
    model.add_argument(
        "--input",
        action="append",
        metavar="DATA",
        help="picture.png, name=picture.png, name=file.npz or name=1,1,3,3; repeatable",
    )
    graph = parser.add_argument_group("graph")
    graph.add_argument("--input-names", metavar="A,B", help="names of the graph's inputs")
    graph.add_argument("--output-names", metavar="A,B", help="names of the graph's outputs")
    graph.add_argument(
        "--dynamic",
        action="append",
        metavar="INPUT:AXIS=NAME,…",
        help="dynamic dimensions, such as image:0=batch,2=height,3=width, with sizes image:0=batch=1..8, "
        "with the usual one image:0=batch=1..4..8; repeatable",
    )
    graph.add_argument(
        "--target",
        "--backend",
        dest="target",
        metavar="ENGINE",
        help=f"default: {DEFAULT_BACKEND}; for deploy also {AUTO}, the fastest here",
    )
    graph.add_argument("--precision", help=f"fp32 (default), fp16, bf16 or int8; with {AUTO} all, or this one")
    graph.add_argument("--opset", type=int, help="opset of the ONNX graph")
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="any other key of the config, such as verify.atol=1e-5"
    )


def add_budget_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says which error an output may have."""
    parser.add_argument(
        "--budget",
        action="append",
        metavar="LIMIT=NUMBER,…",
        help="the error that every output may have: max_abs=1e-3, relative=0.01 (L2, one percent) or both; "
        "default: the precision's tolerance",
    )


def add_weights_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say which PyTorch model, with which weights."""
    group.add_argument("--model", metavar="REF", help="module:factory or file.py:factory")
    group.add_argument("--checkpoint", metavar="FILE", help="safetensors, or what torch.save wrote")
    group.add_argument("--unsafe-checkpoint", action="store_true", help="let a pickled checkpoint run its code")


def read_config(options: argparse.Namespace, out: str | None) -> DeployConfig:
    """Return the config that a config file and the flags describe together.

    Args:
        options: The parsed flags.
        out: The output folder, if the command has one.

    Raises:
        ConfigError: If a flag or key cannot be used.
        MissingFileError: If a config file does not exist.
    """
    from torchferry.pipeline.config import merge, read_toml, validate

    values = read_toml(options.config) if options.config else {}
    values = merge(values, _from_flags(options, values))
    if out is not None:
        values["out"] = out
    return validate(values, options.config or "flags")


def _from_flags(options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    from torchferry.pipeline.config import merge, toml_value

    values: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        nonlocal values
        if value is not None:
            for part in reversed(key.split(".")):
                value = {part: value}
            values = merge(values, value)

    put("model.factory", options.model)
    put("model.checkpoint", options.checkpoint)
    put("model.unsafe_checkpoint", options.unsafe_checkpoint or None)
    put("inputs", options.input)
    put("export.input_names", options.input_names and options.input_names.split(","))
    put("export.output_names", options.output_names and options.output_names.split(","))
    for item in options.dynamic or ():
        name, axes = parse_dynamic(item)
        put("export.dynamic", {name: axes})  # the name itself may hold a dot
    for item in vars(options).get("budget") or ():  # not a flag of every command
        for limit in item.split(","):
            key, equals, value = limit.strip().partition("=")
            if not equals or not key:
                raise ConfigError(f"--budget '{item}' must look like max_abs=1e-3,relative=0.01")
            put(f"budget.{key}", toml_value(value))
    target = {"backend": options.target, "precision": options.precision, "opset": options.opset}
    target = {key: value for key, value in target.items() if value is not None}
    if target and "backend_config" in config:
        if "opset" in target:
            raise ConfigError("--opset has no effect beside backend_config", hint="name the engine in [[targets]]")
        put("backend_config.type", options.target)
        put("backend_config.precision", options.precision)
    elif target:
        targets = config.get("targets")
        first = targets[0] if isinstance(targets, list) and targets and isinstance(targets[0], dict) else {}
        put("targets", [{**first, **target}])
    for item in options.set or ():
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set '{item}' must be KEY=VALUE")
        put(key, toml_value(value))
    return values


def parse_dynamic(text: str) -> tuple[str, dict[str, str]]:
    """Read ``image:0=batch,2=height``.

    Raises:
        ConfigError: If the text has another form.
    """
    name, colon, axes = text.rpartition(":")
    pairs = [part.partition("=") for part in axes.split(",")]
    if not colon or not name or not all(axis.strip().isdecimal() and dim for axis, _, dim in pairs):
        raise ConfigError(f"--dynamic '{text}' must look like image:0=batch,2=height,3=width")
    return name, {axis.strip(): dim.strip() for axis, _, dim in pairs}
