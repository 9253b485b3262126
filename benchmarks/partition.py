"""Seconds and peak memory of cutting the middle tenth out of a 2 GiB model, against other tools.

The model is made here: blocks of MatMul, Add, Relu and Add in a chain, with the types of all tensors, and every weight
in one external file of real bytes. Each cut is a process of its own, imports included; the tools take turns, and the
figures are medians. A part either has its weights with it ("whole") or refers to the data file of the model that it
came from ("refers"), and is lost without it. What each tool wrote is checked: its nodes, and a whole part's weights.

    python benchmarks/partition.py [--nodes 5000 20000] [--rounds 3] [--peers FOLDER]

FOLDER is where `pip install --target FOLDER --no-deps polygraphy onnx-graphsurgeon onnxslim` put them; a tool that
cannot run is left out, and its last line printed. It takes 5 GiB of disk for temporary files.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WEIGHTS_BYTES = 2 << 30
# Each program gets the model, the part's file, the name of its input and that of its output.
ARGUMENTS = "import sys; model, part, start, end = sys.argv[1:]\n"
MEMORY = """
import pathlib, re
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
OURS = "torchferry"
TOOLS = {
    OURS: (
        "whole",
        """
import torchferry as ferry
[cut] = ferry.partition(model, [dict(start=start, end=end)])
cut.save(part)
""",
    ),
    "torchferry partition (program)": (
        "whole",
        """
from torchferry.cli import main
assert main(["partition", model, "--start", start, "--end", end, "-o", part]) == 0
""",
    ),
    "onnx.utils.extract_model": (
        "whole",
        """
import onnx.utils
onnx.utils.extract_model(model, part, [start], [end])
""",
    ),
    "onnx Extractor, data of the part loaded": (
        "whole",
        """
import os, onnx
from onnx.utils import Extractor
cut = Extractor(onnx.load(model, load_external_data=False)).extract_model([start], [end])
onnx.load_external_data_for_model(cut, os.path.dirname(model))
onnx.save(cut, part, save_as_external_data=True, location=os.path.basename(part) + ".data")
""",
    ),
    "onnx Extractor, no data loaded": (
        "refers",
        """
import onnx
from onnx.utils import Extractor
onnx.save(Extractor(onnx.load(model, load_external_data=False)).extract_model([start], [end]), part)
""",
    ),
    "onnx_ir extract, data copied": (
        "whole",
        """
import os, onnx_ir as ir
whole = ir.load(model)
cut = ir.Model(ir.convenience.extract(whole.graph, [start], [end]), ir_version=whole.ir_version)
ir.save(cut, part, external_data=os.path.basename(part) + ".data")
""",
    ),
    "onnx_ir extract, no data copied": (
        "refers",
        """
import onnx_ir as ir
whole = ir.load(model)
cut = ir.Model(ir.convenience.extract(whole.graph, [start], [end]), ir_version=whole.ir_version)
ir.save(cut, part)
""",
    ),
    "onnx-graphsurgeon": (
        "whole",
        """
import os, onnx, onnx_graphsurgeon as gs
graph = gs.import_onnx(onnx.load(model))
tensors = graph.tensors()
graph.inputs, graph.outputs = [tensors[start]], [tensors[end]]
graph.cleanup()
onnx.save(gs.export_onnx(graph), part, save_as_external_data=True, location=os.path.basename(part) + ".data")
""",
    ),
    "polygraphy surgeon extract": (
        "whole",
        """
import os
from polygraphy.tools import main
sys.argv = ["polygraphy", "surgeon", "extract", model, "-o", part, "--inputs", f"{start}:auto:auto", "--outputs",
    f"{end}:auto", "--save-external-data", os.path.basename(part) + ".data"]
assert main() in (0, None)
""",
    ),
    "onnxslim": (
        "whole",
        """
import os, onnx, onnxslim
cut = onnxslim.slim(model, inputs=[start], outputs=[end], skip_optimizations=None, no_shape_infer=True)
onnx.save(cut, part, save_as_external_data=True, location=os.path.basename(part) + ".data")
""",
    ),
}
MAKE = """
import sys, onnx
from onnx import TensorProto, helper
path, blocks, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
nodes, weights, infos, offset = [], [], [], 0
def weight(name, *dims):
    global offset
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    length = 4 * side * (side if len(dims) == 2 else 1)
    for key, value in (("location", "model.data"), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    offset += length
    weights.append(tensor)
    return name
def node(kind, inputs, output):
    nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}"))
    infos.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", side]))
    return output
last = "block_0"
for at in range(blocks):
    product = node("MatMul", [last, weight(f"layers.{at}.weight", side, side)], f"matmul_{at}")
    moved = node("Add", [product, weight(f"layers.{at}.bias", side)], f"add_{at}")
    last = node("Add", [node("Relu", [moved], f"relu_{at}"), last], f"block_{at + 1}")
graph = helper.make_graph(nodes, "chain", [helper.make_tensor_value_info("block_0", TensorProto.FLOAT, ["n", side])],
    [infos.pop()], weights, value_info=infos)
open(path, "wb").write(
    helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
chunk = __import__("random").Random(0).randbytes((1 << 20) + 1)  # odd, so that no two weights agree
with open(path.replace(".onnx", ".data"), "wb") as file:
    for _ in range(offset // len(chunk)):
        file.write(chunk)
    file.write(chunk[: offset % len(chunk)])
"""
# Prints nodes, weights, their digest.
CHECK = """
import hashlib, sys, onnx_ir as ir
model = ir.load(sys.argv[1])
digest = hashlib.sha256()
for name in sorted(model.graph.initializers):
    digest.update(name.encode() + model.graph.initializers[name].const_value.tobytes())
print(len(model.graph), len(model.graph.initializers), digest.hexdigest())
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[5000, 20000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="", help="folder of tools that are not installed")
    parser.add_argument("--only", default="", help="tools whose name holds this text")
    options = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": options.peers}
    for nodes in options.nodes:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), nodes, options.rounds, environment, options.only)


def compare(folder: Path, nodes: int, rounds: int, environment: dict[str, str], only: str) -> None:
    """Cut one model with every tool in turn and print a table."""
    blocks = nodes // 4
    side = int((WEIGHTS_BYTES / 4 / blocks) ** 0.5)
    model = folder / "model.onnx"
    subprocess.run([sys.executable, "-c", MAKE, str(model), str(blocks), str(side)], check=True)
    ends = (f"block_{blocks * 45 // 100}", f"block_{blocks * 55 // 100}")
    mib = [file.stat().st_size / 2**20 for file in (model, model.with_suffix(".data"))]
    sizes = f"{mib[0]:.1f} MiB, weights {mib[1]:.0f} MiB"
    print(f"{blocks * 4} nodes, {sizes}; from {ends[0]} to {ends[1]}; median of {rounds}", flush=True)
    results: dict[str, list[tuple[float, float]]] = {}
    expected = ""
    for turn in range(rounds):
        for name, (kind, program) in TOOLS.items():
            if only not in name or (turn and name not in results):
                continue
            part = folder / "part.onnx" if kind == "refers" else folder / "out" / "part.onnx"
            part.parent.mkdir(exist_ok=True)
            took = cut(program, model, part, ends, environment)
            if took is None:
                print(f"  {name}: not measured, see above")
                continue
            expected = expected or checked(part)
            found = checked(part)
            assert found.split()[:2] == expected.split()[:2], (name, found, expected)
            assert kind == "refers" or name == "onnxslim" or found == expected, (name, found, expected)
            results.setdefault(name, []).append(took)
            for file in (*folder.glob("part.*"), *folder.glob("out/*")):
                file.unlink()
    show(results)


def cut(
    program: str, model: Path, part: Path, ends: tuple[str, str], environment: dict[str, str]
) -> tuple[float, float] | None:
    """Run a cut as a process; return its seconds and peak MiB, None if it failed."""
    command = [sys.executable, "-c", ARGUMENTS + program + MEMORY, str(model), str(part), *ends]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        print(*done.stderr.strip().splitlines()[-1:])
        return None
    return seconds, int(done.stdout.split()[-1]) / 1024


def checked(part: Path) -> str:
    """Return the number of nodes and of weights, and a digest of the weights."""
    return subprocess.run([sys.executable, "-c", CHECK, str(part)], check=True, capture_output=True, text=True).stdout


def show(results: dict[str, list[tuple[float, float]]]) -> None:
    """Print seconds and memory, and both over ours."""
    medians = {
        name: [statistics.median(column) for column in zip(*took, strict=True)] for name, took in results.items()
    }
    own = medians.get(OURS, next(iter(medians.values())))
    for name, (seconds, mib) in medians.items():
        print(
            f"  {name:42} {TOOLS[name][0]:6} {seconds:6.2f} s ({seconds / own[0]:5.2f} x) {mib:6.0f} MiB "
            f"({mib / own[1]:5.2f} x)"
        )


if __name__ == "__main__":
    main()
