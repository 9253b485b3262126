"""L2: a package is a folder with engines and all that is known about them; it loads without torch and onnx."""

from torchferry.package.manifest import MANIFEST_FILE, Manifest
from torchferry.package.pictures import Postprocess, Preprocess
from torchferry.package.store import Package, load, pack

__all__ = ["MANIFEST_FILE", "Manifest", "Package", "Postprocess", "Preprocess", "load", "pack"]
