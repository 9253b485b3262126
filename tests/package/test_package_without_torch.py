"""A package loads, opens and runs where torch, onnx and all that exporting needs are not installed."""

import json
import subprocess
import sys

from PIL import Image

CHILD = """
import json, sys

ABSENT = {"torch", "onnx", "onnx_ir", "onnxscript", "scipy", "jinja2", "safetensors"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocker())
for name in ABSENT:
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} can be imported")

import numpy as np
from torchferry.package import load

folder, picture, output = sys.argv[1:]
package = load(folder)
with package.open() as session:
    [big] = session.run({"image": np.ones((1, 3, 2, 4), np.float32)}).values()
    package.run_picture(session, picture, output)
assert not ABSENT & {name.partition(".")[0] for name in sys.modules}
assert not [name for name in sys.modules if name.startswith(("torchferry.graph", "torchferry.export"))]
print(json.dumps({"shape": big.shape, "package": str(package)}))
"""


def test_load_open_run(packed, tmp_path):
    Image.new("RGB", (4, 3), (9, 99, 199)).save(tmp_path / "in.png")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, packed.folder, tmp_path / "in.png", tmp_path / "out.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["shape"] == [1, 3, 4, 8]
    assert said["package"].splitlines() == str(packed).splitlines()
    with Image.open(tmp_path / "out.png") as out:
        assert out.size == (8, 6)
        assert out.getcolors() == [(48, (9, 99, 199))]
