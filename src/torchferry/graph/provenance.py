"""From a node of the graph back to the module and the line of the user's code that it came from."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Two metadata keys of our own, so that the answer survives in the file in a form that any tool can show.
MODULE_KEY = "torchferry.module"
SOURCE_KEY = "torchferry.source"

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_STACK_KEY = "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n?(?P<code>[^\n]*)')
_INVENTED_SCOPE = "_empty_nn_module_stack_from_metadata_hook"


@dataclass(frozen=True)
class Provenance:
    """Where a node came from.

    Attributes:
        module: The module's path from the root, such as ``backbone.layer1.0``; empty for the root itself.
        source: ``file:line in function: code`` of the innermost line that is not torch's; empty if unknown.
    """

    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.module or '(root)'} at {self.source or 'unknown line'}"


def provenance(node: ir.Node) -> Provenance:
    """Return where a node came from; empty for a node of a graph that torch did not export."""
    properties = node.metadata_props
    return Provenance(properties.get(MODULE_KEY, ""), properties.get(SOURCE_KEY, ""))


def node_line(node: ir.Node) -> str:
    """Return the user's line that torch's exporter noted on a node; empty if it noted none."""
    return user_line(node.metadata_props.get(_STACK_KEY, ""))


def user_line(stack_trace: str) -> str:
    r"""Return the innermost line of a formatted stack trace that is not torch's own, else its innermost line.

    >>> user_line('File "/home/me/net.py", line 7, in forward\\n    return x + 1')
    '/home/me/net.py:7 in forward: return x + 1'
    """
    frames = list(_FRAME.finditer(stack_trace))
    own = [f for f in frames if not is_library(f["file"])]
    chosen = (own or frames)[-1:]
    return "".join(f"{f['file']}:{f['line']} in {f['function']}: {f['code'].strip()}" for f in chosen)


def is_library(file: str) -> bool:
    """Tell whether a source file is torch's, ours, or made up, rather than the user's."""
    return file.startswith(("<", *_library_folders()))


@functools.cache
def _library_folders() -> tuple[str, ...]:
    specs = (importlib.util.find_spec(name) for name in ("torch", "torchferry", "onnxscript"))
    return tuple(folder + os.sep for spec in specs if spec for folder in spec.submodule_search_locations or ())


def record_provenance(model: ir.Model) -> None:
    """Write ``MODULE_KEY`` and ``SOURCE_KEY`` on every node, from what torch's exporter left there.

    Size computations and constants that the exporter adds have no line of their own; they take that of the first
    node that needs them.
    """
    for graph in model.graphs():
        nodes = list(graph)
        for node in reversed(nodes):  # users stand after what they use, so they are done first
            properties = node.metadata_props
            scopes = _scopes(properties.get(_SCOPES_KEY, ""))
            module, source = scopes, node_line(node)
            if not source:
                users = [user for output in node.outputs for user, _ in output.uses() if user.graph is graph]
                known = next((u.metadata_props for u in users if u.metadata_props.get(SOURCE_KEY)), {})
                if _SCOPES_KEY not in properties:  # in the root there are scopes, and they give no path
                    module = known.get(MODULE_KEY, "")
                source = known.get(SOURCE_KEY, "")
            properties[MODULE_KEY] = module
            properties[SOURCE_KEY] = source


def _scopes(text: str) -> str:
    """Take the module path out of torch's list of scopes, whose last entry is the node and whose paths are full."""
    try:
        scopes = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError):
        return ""
    paths = [s for s in scopes[:-1] if s and s != _INVENTED_SCOPE]
    return paths[-1] if paths else ""
