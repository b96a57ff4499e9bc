"""The packages, and the optional extensions `fastalign.kernels._C` (CPU) and `_cuda`; everything else is declared in
pyproject.toml.

Neither includes a torch header, so building them takes compilers and pybind11, never torch. What cannot be built is
left out, which the build says in one line: the torch and triton backends need neither.

    FASTALIGN_BUILD_EXT    the C++ row kernels: 0 leaves them out on purpose, with 1, as for wheels that are given to
                           others, there is no build without them
    FASTALIGN_BUILD_CUDA   the CUDA row kernels: 0 and 1 likewise; otherwise they are built where nvcc and a driver are
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

ROOT = Path(__file__).parent
SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/bindings.cpp")]
)
CUDA_SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/bindings_cuda.cpp")]
)
HEADERS = sorted(str(path.relative_to(ROOT)) for suffix in ("h", "cuh") for path in ROOT.glob(f"csrc/**/*.{suffix}"))
LEFT_OUT = {
    "fastalign.kernels._C": "C++ kernels left out: {}; the torch and triton backends work without them",
    "fastalign.kernels._cuda": "CUDA kernels left out: {}; the triton backend works without them",
}


class OptionalBuildExt(build_ext):
    """build_ext that leaves out, in one line, an extension that cannot be built."""

    def build_extension(self, ext):
        try:
            if ext.name.endswith("._cuda"):
                self.build_cuda(ext)
            else:
                self.build_cpu(ext)
        except (BaseError, CCompilerError, OSError) as error:
            if not ext.optional:
                raise
            print(f"fastalign: {LEFT_OUT[ext.name].format(error)}", file=sys.stderr)
            stem = ext.name.rpartition(".")[2]
            for stale in [
                Path(self.get_ext_fullpath(ext.name)),
                *ROOT.glob(f"kernels/{stem}.*.so"),
            ]:  # of other sources
                stale.unlink(missing_ok=True)

    def build_cpu(self, ext):
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or []
        if compiler and shutil.which(compiler[0]) is None:
            raise CCompilerError(f"no C++ compiler ({compiler[0]}) was found")
        super().build_extension(ext)

    def build_cuda(self, ext):
        """One call of nvcc, which finds its own libraries; the CUDA runtime is linked in, so that any torch goes."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("no nvcc was found")
        target = Path(self.get_ext_fullpath(ext.name))
        inputs = [ROOT / path for path in [*ext.sources, *ext.depends, "setup.py"]]
        if not self.force and target.exists() and all(path.stat().st_mtime < target.stat().st_mtime for path in inputs):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [*ext.include_dirs, pybind11.get_include(), sysconfig.get_path("include")]
        command = [nvcc, "-shared", "-cudart=static", *cuda_flags(nvcc), "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += [*(f"-I{folder}" for folder in includes), *ext.sources, "-o", str(target)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode:
            raise CompileError(f"nvcc failed: {(result.stderr.strip() or result.stdout.strip())[-2000:]}")


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def cuda_flags(nvcc):
    """Machine code for Hopper and, where nvcc knows it, Blackwell; PTX for what comes later.

    Without contraction of products into sums: csrc/cuda/row_loss_grad.cuh has the reason.
    """
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    if "compute_90" not in known:
        raise CompileError(f"{nvcc} knows no compute capability 9.0")
    flags = ["-std=c++17", "-O3", "-fmad=false", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    return flags + (["-gencode=arch=compute_100,code=sm_100"] if "compute_100" in known else [])


def extensions():
    choice, found = os.environ.get("FASTALIGN_BUILD_EXT", ""), []
    if SOURCES and choice != "0":
        flags = ["/O2" if sys.platform == "win32" else "-O3"]
        cpu = Pybind11Extension(
            "fastalign.kernels._C", SOURCES, include_dirs=["csrc/include"], depends=HEADERS, cxx_std=17,
            extra_compile_args=flags, optional=choice != "1",
        )  # fmt: skip
        found.append(cpu)
    choice = os.environ.get("FASTALIGN_BUILD_CUDA", "")
    usable = find_nvcc() is not None and Path("/proc/driver/nvidia/version").exists()
    if CUDA_SOURCES and (choice == "1" or (choice != "0" and usable)):
        folders = ["csrc/include", "csrc/cuda"]
        cuda = Extension(
            "fastalign.kernels._cuda", CUDA_SOURCES, include_dirs=folders, depends=HEADERS, optional=choice != "1"
        )
        found.append(cuda)
    return found


ParallelCompile("NPY_NUM_BUILD_JOBS", default=0).install()  # one compiler process per core

setup(
    packages=[*find_packages(include=["fastalign", "fastalign.*"]), "fastalign.kernels"],
    package_dir={"fastalign": "fastalign", "fastalign.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
