"""What `.half()` of the zoo's modules gives, before and after ``ferry.fp16.fix`` on the module itself.

Usage: python benchmarks/fp16/modules.py [--frozen | --development] [NAME ...]

Each module is repaired on its calibration data, halved, and run by PyTorch on held-out data, as it is and four times
as large. Figures are the L2 norm of the outputs' difference from FP32 over that of FP32's; ``inf`` where one is not
finite.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from typing import TYPE_CHECKING

import torch
from cases import SCALES, names, of_net
from torch.utils._pytree import tree_leaves
from zoo import ZOO

import torchferry as ferry

if TYPE_CHECKING:
    from cases import Case
    from torch import Tensor, nn


def main() -> int:
    """Print a line for each net, and a summary."""
    parser = argparse.ArgumentParser(description="What .half() of the zoo's modules gives.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--frozen", action="store_const", const="frozen", dest="which")
    which.add_argument("--development", action="store_const", const="development", dest="which")
    parser.add_argument("nets", nargs="*", metavar="NAME")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    certified, wanted = 0, chosen.nets or names(chosen.which or "all")
    print(f"{'net':22}{'plain .half()':24}{'repaired .half()':24}{'by':9}{'added':>5}  {'FP32':>4}  s")
    for name in wanted:
        case = of_net(ZOO[name])
        started = time.perf_counter()
        fixed, certificate = ferry.fp16.fix(case.module, case.calibration)
        seconds = time.perf_counter() - started
        certified += certificate.passed
        by = "weights" if certificate.weights_only and type(fixed) is type(case.module) else "calls"
        row = f"{name:22}{_errors(case, case.module):24}{_errors(case, fixed):24}{by:9}{len(certificate.added):5}"
        verdict = "" if certificate.passed else "  NOT certified"
        print(f"{row}  {len(certificate.islands):4}  {seconds:.1f}{verdict}", flush=True)
    print(f"{certified} of {len(wanted)} certified")
    return 0


def _errors(case: Case, module: nn.Module) -> str:
    half = copy.deepcopy(module).half()
    try:
        return ", ".join(f"{_error(case, half, scale):.2g}" for scale in SCALES)
    except (RuntimeError, ValueError) as exc:  # no kernel for halves, or a number in the code that is none
        return str(exc).splitlines()[0][:22]


def _error(case: Case, half: nn.Module, scale: float) -> float:
    worst = 0.0
    with torch.no_grad():
        for call in case.held_out[scale]:
            wanted = _floats(case.module(*call))
            got = _floats(half(*(each.half() if each.is_floating_point() else each for each in call)))
            for want, each in zip(wanted, got, strict=True):
                error = float((each.float() - want).norm() / want.norm())
                worst = max(worst, error if bool(each.isfinite().all()) else float("inf"))
    return worst


def _floats(outputs: object) -> list[Tensor]:
    return [each for each in tree_leaves(outputs) if isinstance(each, torch.Tensor) and each.is_floating_point()]


if __name__ == "__main__":
    sys.exit(main())
