"""Build the native parts where a C++ compiler exists; everything works without them."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class PlainLibrary(build_ext):
    """A shared library without a Python ABI suffix, loaded with ctypes by `holdfast.native`."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


def counting_allocator() -> list[Extension]:
    """The counter of CPU allocations, for the torch that is installed; none without torch."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return []
    root = Path(torch.origin).parent
    return [
        Extension(
            "holdfast.native._allocator",
            ["holdfast/native/allocator.cpp"],
            # A newer header is another torch, whose ABI the library must follow.
            depends=[str(root / "include/torch/headeronly/version.h")],
            include_dirs=[str(root / "include")],
            library_dirs=[str(root / "lib")],
            libraries=["c10"],
            extra_compile_args=["-O2", "-g0", "-std=c++17"],
            optional=True,
        )
    ]


setup(
    cmdclass={"build_ext": PlainLibrary},
    ext_modules=[
        Extension(
            "holdfast.native._kernels",
            ["holdfast/native/kernels.cpp"],
            depends=[
                "holdfast/native/lanes.h",
                "holdfast/native/adamw4.h",
                "holdfast/native/adamw8.h",
                "holdfast/native/adamw8_lanes.h",
                "holdfast/native/bits.h",
                "holdfast/native/bits_lanes.h",
            ],
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
        Extension(
            "holdfast.native._spann",
            ["holdfast/native/spann.cpp"],
            depends=["holdfast/native/spann_lanes.h"],
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-ffp-contract=off",
                "-fopenmp",
                "-Wno-uninitialized",
                "-Wno-psabi",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        ),
        *counting_allocator(),
    ],
)
