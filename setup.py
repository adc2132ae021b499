"""The one part that is compiled. Without a compiler heedful installs all the same, and says so when it is asked."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


class PlainLibrary(build_ext):
    """A shared library that knows no Python: ctypes loads it, so its name speaks of no interpreter."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class AnyPython(bdist_wheel):
    """One wheel for a platform: what is compiled suits every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
    ext_modules=[
        Extension(
            "heedful.native.kernel",
            ["src/heedful/native/kernel.cpp"],
            depends=sorted(str(header) for header in Path("src/heedful/native").glob("*.h")),
            extra_compile_args=[*FLAGS, "-Wno-psabi", *OPENMP],
            extra_link_args=OPENMP,
            optional=True,
            language="c++",
        )
    ],
)
