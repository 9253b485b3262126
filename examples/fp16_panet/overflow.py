"""PANet beyond FP16's range: watched, bisected, repaired by hand and automatically, and compared.

Usage:
    python overflow.py           # the PANet of panet.py
    python overflow.py --mmocr   # mmocr's, from the config that it ships; needs OpenMMLab
"""

import argparse
import contextlib
import copy
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import by_hand
import panet
import torchferry as ferry
from torchferry.backends import check_target
from torchferry.core.compare import Tolerance

CALIBRATION = ("text", "coins", "camera", "page")
MMOCR_CONFIG = "mmocr::textdet/panet/panet_resnet18_fpem-ffm_600e_icdar2015"
TWIN_CLASSES = ("panet.BasicBlock", "panet.FPEM_FFM", "panet.SeparableConv2d", "panet.PANHead")
MMOCR_CLASSES = (
    "mmdet.models.backbones.resnet.BasicBlock",
    "mmocr.models.textdet.necks.fpem_ffm.FPEM_FFM",
    "mmocr.models.textdet.necks.fpem_ffm.SeparableConv2d",
    "mmocr.models.textdet.heads.pan_head.PANHead",
)
FINITE = Tolerance(atol=1.0, rtol=0.0)
"""Outputs are of the order of 1: this passes whatever rounding does, and fails on infinity and NaN."""
SHOWN = 6


@dataclass(frozen=True)
class Subject:
    """A PANet and the classes in it that are rewritten by hand.

    Attributes:
        model: In eval mode, beyond FP16's range.
        classes: As for ``by_hand.rewriters``.
    """

    model: nn.Module
    classes: tuple[str, ...]


def twin(x: Tensor) -> Subject:
    """Return the PANet of ``panet.py``."""
    return Subject(panet.driven(panet.build(), x), TWIN_CLASSES)


def mmocrs(x: Tensor) -> Subject:
    """Return mmocr's PANet, with weights from a seed."""
    from torchferry.codebases.openmmlab.models import build_model, find_model_config
    from torchferry.codebases.openmmlab.source import Network

    model = Network(build_model(find_model_config(MMOCR_CONFIG, "mmocr")))
    return Subject(panet.driven(model, x), MMOCR_CLASSES)


def watched(model: nn.Module, x: Tensor, out: Path) -> Path:
    """Print where values enter and leave the region beyond 65504; save what was seen.

    Returns:
        The report, for the rewriters.
    """
    with ferry.fp16.watch(model) as watch, torch.no_grad():
        model(x)
    report = watch.report()
    for crossing in report.crossings[:SHOWN]:
        print(f"  {crossing}")
    print(f"  and {len(report.crossings) - SHOWN} more; {len(report.parameters)} running variances are beyond as well")
    report.save(out / "watch.html")
    report.save(out / "watch.json")
    return out / "watch.json"


def bisected(model: nn.Module, x: Tensor) -> None:
    """Print the operator at which FP16 makes the outputs useless: in emulated hardware, and in TensorRT where it is."""
    engines: list[Any] = [ferry.fp16.emulate]
    target = ferry.Target("tensorrt", precision="fp16")
    try:
        check_target(target)
        engines.append(target)
    except ferry.TorchferryError as error:
        print(f"  without tensorrt: {error.message}")
    for engine in engines:
        print(_indented(ferry.fp16.bisect(model, engine, (x,), tolerance=FINITE)))


@dataclass(frozen=True)
class ByHand:
    """The model with rewriters for what lies beyond.

    Attributes:
        exported: The graph.
        applied: Enters the context in which the model itself runs rewritten.
    """

    exported: ferry.Exported
    applied: Callable[[], contextlib.AbstractContextManager[object]]


def repaired_by_hand(subject: Subject, x: Tensor, watch_report: Path) -> ByHand:
    """Export with rewriters that decide from the saved report; print how often each acted."""
    by_hand.name_modules(subject.model)
    registry, cfg = by_hand.rewriters(subject.classes), {"watch": str(watch_report)}
    exported = ferry.export(subject.model, (x,), cfg=cfg, function_rewriter=registry)
    exported.report.raise_for_failure()
    for name, calls in exported.rewrites.items():
        print(f"  {calls} x {name}")
    print(f"  everything in the region is divided by {by_hand.Region(str(watch_report)).p:g}")
    return ByHand(exported, lambda: ferry.RewriterContext(cfg, function_rewriter=registry))


def repaired_by_weights(
    model: nn.Module, calibration: list[tuple[Tensor]], out: Path
) -> tuple[nn.Module, ferry.Exported]:
    """Repair the module's weights; print and save the certificate.

    Returns:
        The repaired module, and the graph of what ``.half()`` of it computes, for which the certificate speaks.
    """
    fixed, certificate = ferry.fp16.fix(model, calibration)
    print(_indented(certificate.raise_for_failure()))
    certificate.save(out / "certificate_weights", overwrite=True)
    graph: ferry.Exported = certificate.evidence.fixed
    return fixed, graph


def repaired_graph(exported: ferry.Exported, calibration: list[tuple[Tensor]], out: Path) -> ferry.Exported:
    """Repair the exported graph, which becomes FP16; print and save the certificate."""
    fixed, certificate = ferry.fp16.fix(exported, calibration)
    print(_indented(certificate.raise_for_failure()))
    certificate.save(out / "certificate_graph", overwrite=True)
    fixed.save(out / "panet_fp16.onnx")
    return fixed


@dataclass(frozen=True)
class Judge:
    """What FP32 gives for a picture, and how far FP16 must be from it at least.

    Attributes:
        x: The picture.
        truth: The output in FP32.
        ideal: Relative error with 11 bits of mantissa and no limit of range.
    """

    x: Tensor
    truth: Tensor
    ideal: float

    def emulated(self, graph: ferry.Exported, mode: str) -> str:
        """Say how a graph fares in emulated FP16."""
        return self.said(_run(graph, self.x, mode))

    def halved(self, model: nn.Module, *, norms_too: bool) -> str:
        """Say how a module fares in FP16 on this CPU, its normalisations' parameters in FP16 as well or not."""
        half = copy.deepcopy(model)
        for module in half.modules():
            if norms_too or not isinstance(module, nn.BatchNorm2d):
                module._apply(Tensor.half, recurse=False)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return self.said(half(self.x.half()).float())

    def said(self, output: Tensor) -> str:
        """Word the error of an output."""
        if not output.isfinite().all():
            return "not finite"
        error = _relative(output, self.truth)
        return f"{error:.2%}, {error / self.ideal:.2f} x ideal"


def _run(graph: ferry.Exported, x: Tensor, mode: str) -> Tensor:
    (output,) = ferry.fp16.emulate(graph, mode=mode).run((x,)).values()  # type: ignore[arg-type]
    return torch.from_numpy(np.asarray(output, np.float32))


def _relative(output: Tensor, truth: Tensor) -> float:
    return float((output - truth).norm() / truth.norm())


def judged(
    judge: Judge, rows: dict[str, tuple[ferry.Exported, nn.Module | None]], hand: ByHand
) -> dict[str, list[str]]:
    """Print and return how every version fares: emulated acc32 and strict, ``.half()``, and that but for the norms."""
    table = {}
    print(f"  {'':20}" + "".join(f"{title:24}" for title in ("acc32", "strict", ".half()", "norms in FP32")).rstrip())
    for name, (graph, module) in rows.items():
        cells = [judge.emulated(graph, mode) for mode in ("acc32", "strict")]
        with hand.applied() if name == "by hand" else contextlib.nullcontext():
            cells += ["-" if module is None else judge.halved(module, norms_too=each) for each in (True, False)]
        print(f"  {name:20}" + "".join(f"{cell:24}" for cell in cells).rstrip())
        table[name] = cells
    return table


def _indented(text: object) -> str:
    return textwrap.indent(str(text), "  ")


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print a heading, and a blank line after what comes under it."""
    print(title)
    yield
    print()


def run(subject: Subject, size: int, out: Path) -> dict[str, list[str]]:
    """Do everything in order; return the table of the end."""
    out.mkdir(parents=True, exist_ok=True)
    model, x = subject.model, panet.picture(size=size)
    calibration = [(panet.picture(name, size),) for name in CALIBRATION]
    with step("1. Watched"):
        report = watched(model, x, out)
    with step("2. Bisected"):
        bisected(model, x)
    with step("3. Repaired by hand"):
        hand = repaired_by_hand(subject, x, report)
    with step("4. Repaired automatically: the weights"):
        weights, weights_graph = repaired_by_weights(model, calibration, out)
    exported = ferry.export(model, (x,))
    with step("5. Repaired automatically: the graph"):
        graph = repaired_graph(exported, calibration, out)
    with torch.no_grad():
        truth = model(x)
    judge = Judge(x, truth, _relative(_run(exported, x, "ideal"), truth))
    rows = {
        "original": (exported, model),
        "by hand": (hand.exported, model),
        "fixed, weights": (weights_graph, weights),
        "fixed, graph": (graph, None),
    }
    print(f"6. Compared with FP32, of which ideal FP16 leaves {judge.ideal:.2%}")
    return judged(judge, rows, hand)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mmocr", action="store_true", help="take mmocr's PANet")
    parser.add_argument("--size", type=int, default=160, help="height and width of the pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/fp16_panet"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    x = panet.picture(size=options.size)
    run(mmocrs(x) if options.mmocr else twin(x), options.size, options.out)


if __name__ == "__main__":
    main()
