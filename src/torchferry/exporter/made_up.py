"""Calling an operator of which nothing is known but its schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.exporter.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._ops import OpOverload

# For all tensors alike: a square matrix, a picture and its kernel or its grid, the same in three dimensions.
_TENSORS = (
    ((3, 3), torch.float32),
    ((2, 2, 2, 2), torch.float32),
    ((3, 3, 3, 3, 3), torch.float32),
    ((3, 3), torch.int64),
)
_OTHERS: dict[str, Any] = {
    "int": 1,
    "float": 0.5,
    "number": 1,
    "bool": False,
    "ScalarType": torch.float32,
    "Device": torch.device("cpu"),
    "List[float]": [0.5],
    "List[bool]": [True],
}


@dataclass(frozen=True)
class MadeUpCall:
    """A call that torch takes.

    Attributes:
        module: Calls the operator with the tensors, and fixed values for the other arguments without a default.
        tensors: Its inputs: random numbers between 0 and 1, or ones if they are integers.
        program: The call, traced.
    """

    module: torch.nn.Module
    tensors: tuple[torch.Tensor, ...]
    program: torch.export.ExportedProgram


def made_up_calls(op: OpOverload) -> Iterator[MadeUpCall]:
    """Give calls of an operator with arguments made up from its schema, as far as torch traces them.

    The operator itself is not run: torch only works out what it would give. Calls that give no tensor are left out.
    """
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in _TENSORS:
        module = Call(op).eval()
        tensors = tuple(
            torch.rand(shape, generator=generator) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
            for _ in range(module.tensors)
        )
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(module, tensors, strict=False)
        except Exception:  # noqa: BLE001, S112 - torch refuses made-up arguments in every way
            continue
        outputs = program.graph_module.graph.output_node().all_input_nodes
        if any(isinstance(node.meta.get("val"), torch.Tensor) for node in outputs):
            yield MadeUpCall(module, tensors, program)


class Call(torch.nn.Module):
    """Calls an operator with the tensors that it is given, and fixed values for what else has no default."""

    def __init__(self, op: OpOverload) -> None:
        super().__init__()
        self.op = op
        self.required = [argument for argument in op._schema.arguments if not argument.has_default_value()]
        self.tensors = sum(str(argument.type) in ("Tensor", "List[Tensor]") for argument in self.required)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Call it."""
        remaining = iter(tensors)
        args, kwargs = [], {}
        for argument in self.required:
            kind = str(argument.real_type)
            if kind == "Tensor":
                value: Any = next(remaining)
            elif kind == "List[Tensor]":
                value = [next(remaining)] * 2
            elif kind == "List[int]":
                value = [1] * (getattr(argument, "N", None) or 1)
            else:
                value = _OTHERS[kind]
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return self.op(*args, **kwargs)
