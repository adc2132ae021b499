"""The one part that is compiled. Without a compiler heedful installs all the same, and says so when it is asked."""

import sys
from pathlib import Path

from setuptools import Extension, setup

OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

setup(
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
    ]
)
