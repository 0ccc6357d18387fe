"""Build the native kernels where a C++ compiler exists; everything works without them."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class PlainLibrary(build_ext):
    """A shared library without a Python ABI suffix, loaded with ctypes by `holdfast.native`."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


setup(
    cmdclass={"build_ext": PlainLibrary},
    ext_modules=[
        Extension(
            "holdfast.native._kernels",
            ["holdfast/native/kernels.cpp"],
            depends=["holdfast/native/lanes.h", "holdfast/native/adamw4.h"],
            # No contraction: all variants must round alike. GCC's own headers warn.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-ffp-contract=off",
                "-fopenmp",
                "-Wno-uninitialized",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        ),
    ],
)
