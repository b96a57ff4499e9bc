"""The packages, and the optional extension `fastalign.kernels._C`; everything else is declared in pyproject.toml.

The C++ row kernels include no torch header, so building them takes a C++17 compiler and pybind11, never torch. Where
they cannot be built, the build says so in one line and goes on: the torch and triton backends do not need them.
FASTALIGN_BUILD_EXT=0 leaves them out on purpose; with FASTALIGN_BUILD_EXT=1, as for wheels that are given to others,
there is no build without them.
"""

import os
import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent
SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/bindings.cpp")]
)
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h"))


class OptionalBuildExt(build_ext):
    """build_ext that leaves out, in one line, an extension that cannot be built."""

    def build_extension(self, ext):
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or []
        try:
            if compiler and shutil.which(compiler[0]) is None:
                raise CCompilerError(f"no C++ compiler ({compiler[0]}) was found")
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            if os.environ.get("FASTALIGN_BUILD_EXT") == "1":
                raise
            print(
                f"fastalign: C++ kernels left out: {error}; the torch and triton backends work without them",
                file=sys.stderr,
            )
            for stale in [Path(self.get_ext_fullpath(ext.name)), *ROOT.glob("kernels/_C.*")]:  # of other sources
                stale.unlink(missing_ok=True)


ParallelCompile("NPY_NUM_BUILD_JOBS", default=0).install()  # one compiler process per core

extension = Pybind11Extension(
    "fastalign.kernels._C",
    SOURCES,
    include_dirs=["csrc/include"],
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=["/O2" if sys.platform == "win32" else "-O3"],
    optional=os.environ.get("FASTALIGN_BUILD_EXT") != "1",
)
wanted = SOURCES and os.environ.get("FASTALIGN_BUILD_EXT", "") != "0"
setup(
    packages=[*find_packages(include=["fastalign", "fastalign.*"]), "fastalign.kernels"],
    package_dir={"fastalign": "fastalign", "fastalign.kernels": "kernels"},
    ext_modules=[extension] if wanted else [],
    cmdclass={"build_ext": OptionalBuildExt},
)
