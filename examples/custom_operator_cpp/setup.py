"""Builds the extension ``my_add_cpp``."""

# mypy: allow-untyped-calls

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="my_add_cpp",  # CHANGE: as in PYBIND11_MODULE
    ext_modules=[CppExtension("my_add_cpp", ["my_add.cpp"])],
    # Without ninja, which only large extensions are worth.
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
