"""From an ONNX file to ncnn's two files, by the program pnnx, whose word is not taken for it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torchferry.backends.ncnn.operators import MOST_AXES, first_with_many_axes, nodes_like
from torchferry.backends.ncnn.session import PARAM_FILE, WEIGHTS_FILE, Blob, Record, ncnn
from torchferry.backends.refusing import refusal
from torchferry.core.errors import BackendError
from torchferry.core.files import sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from torchferry.core.signature import Signature

_STEM = "model"
_COMPLAINT = re.compile(r"(?:todo|ignore) (\S+)|.*(?:unsupported|exceeds|not supported|unknown).*", re.IGNORECASE)


def program() -> Path | None:
    """Return the path of pnnx's program; None if it is not installed. The package itself would import torch."""
    spec = importlib.util.find_spec("pnnx")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        return None
    path = Path(next(iter(folders))) / ("pnnx.exe" if sys.platform == "win32" else "pnnx")
    return path if path.is_file() else None


def convert(
    model: ir.Model,
    whole: ir.Model,
    signature: Signature,
    sizes: Sequence[dict[str, int]],
    scratch: Path,
    folder: Path,
) -> Record:
    """Convert a graph and move ncnn's files into a folder.

    Args:
        model: The graph, without local functions; its inputs and outputs are those of the signature, in order.
        whole: The user's own, of which it was made.
        signature: Their names and shapes.
        sizes: Of the named dimensions; two sets of them, where there are any.
        scratch: An empty folder for what pnnx writes.
        folder: Where ncnn's files go.

    Returns:
        What ncnn calls the inputs and outputs.

    Raises:
        BackendError: If pnnx fails, leaves something out, or ncnn lacks a layer that it wrote.
    """
    import onnx_ir as ir

    ir.save(model, scratch / f"{_STEM}.onnx")
    shapes = [f"inputshape{number}={_shapes(signature, each)}" for number, each in zip(("", "2"), sizes, strict=False)]
    command = [str(program()), f"{_STEM}.onnx", "fp16=0", *shapes]
    done = subprocess.run(  # noqa: S603 - pnnx's own program
        command, cwd=scratch, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        reason = "it crashes" if done.returncode < 0 else f"it ends with status {done.returncode}"
        raise BackendError(f"pnnx cannot convert the graph for ncnn: {reason}", hint=_hint(signature))
    _check_log(model, whole, done.stderr + done.stdout)
    param = scratch / f"{_STEM}.ncnn.param"
    _check_layers(model, whole, param.read_text())
    record = _record(signature, (scratch / f"{_STEM}_ncnn.py").read_text(), param.read_text())
    param.rename(folder / PARAM_FILE)
    (scratch / f"{_STEM}.ncnn.bin").rename(folder / WEIGHTS_FILE)
    return Record(*record, {file: sha256(folder / file) for file in (PARAM_FILE, WEIGHTS_FILE)})


def _shapes(signature: Signature, sizes: dict[str, int]) -> str:
    shapes = [spec.shape_at(sizes) or (1,) for spec in signature.inputs]
    return ",".join(f"[{','.join(map(str, shape))}]f32" for shape in shapes)


def _hint(signature: Signature) -> str:
    if signature.dims:
        return "export it with fixed sizes, which pnnx takes more often, or use another backend"
    return "leave the part that it cannot take out with `torchferry partition`, or use another backend"


def _check_log(model: ir.Model, whole: ir.Model, log: str) -> None:
    """Refuse what pnnx leaves out, for it writes a file all the same.

    Raises:
        UnsupportedError: If there is something; names the operator as far as pnnx does.
    """
    _, _, said = log.partition("pass_level1")
    for line in said.splitlines():
        complaint = _COMPLAINT.match(line.strip())
        if complaint:
            layer = complaint[1] or line.partition(":")[0].split(" ")[0]
            raise _refused(model, whole, layer, f"pnnx says '{line.strip()}'")


def _check_layers(model: ir.Model, whole: ir.Model, param: str) -> None:
    """Refuse a file with layers that ncnn does not have."""
    for line in param.splitlines()[2:]:
        layer = line.split(maxsplit=1)[0]
        if ncnn().layer_to_index(layer) < 0:
            raise _refused(model, whole, layer, f"it becomes '{layer}', which is no layer of ncnn's")


def _refused(model: ir.Model, whole: ir.Model, layer: str, reason: str) -> BackendError:
    nodes, wide = nodes_like(model, layer), first_with_many_axes(model)
    if wide is not None and (not nodes or "rank" in reason):
        axes = max(len(value.shape or ()) for value in wide.outputs)
        many = f"{reason}; it has {MOST_AXES} axes at most beside the batch, and this {wide.op_type} makes {axes}"
        return refusal("ncnn does not take", [wide], model, whole, reason=many)
    if not nodes:
        hint = "leave it out with `torchferry partition`, or use another backend"
        return BackendError(f"ncnn does not take the graph: {reason}", hint=hint)
    said = "ncnn does not take" if len(nodes) == 1 else "ncnn does not take all of"
    return refusal(said, nodes, model, whole, reason=reason)


def _record(signature: Signature, code: str, param: str) -> tuple[tuple[Blob, ...], tuple[Blob, ...]]:
    """Read in the code that pnnx writes where the batch of each input and output is."""
    lines = [line.strip() for line in code.splitlines()]
    batches = {
        found[1]: int(found[2])
        for found in (re.search(r"\b((?:in|out)\d+)\.numpy\(.*batch_index=(\d+)", line) for line in lines)
        if found
    }
    found = re.findall(r"\S+", param)
    groups = []
    for kind, specs in (("in", signature.inputs), ("out", signature.outputs)):
        blobs = [f"{kind}{place}" for place in range(len(specs))]
        lost = [spec.name for spec, blob in zip(specs, blobs, strict=True) if blob not in found or blob not in batches]
        if lost:
            raise BackendError(
                f"pnnx loses the {'input' if kind == 'in' else 'output'} '{lost[0]}'",
                hint="leave it out of the model, or use another backend",
            )
        groups.append(tuple(Blob(spec.name, blob, batches[blob]) for spec, blob in zip(specs, blobs, strict=True)))
    return groups[0], groups[1]
