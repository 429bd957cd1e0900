"""Builds the extension modules with CMake; everything else about the package is in pyproject.toml.

LLMPQ_NO_CUDA=1 leaves the CUDA extension out even where nvcc is found, CUDAARCHS chooses its architectures, CMAKE_ARGS
is passed on.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """The path of a build tool: beside the interpreter, where pip puts it, or on PATH."""
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise SystemExit(f"{name} is needed to build llmpq; run `pip install {name}`")
    return path


class CMakeBuild(build_ext):
    """One CMake run for all extensions: it decides by the compilers it finds which of them there are."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "llmpq"
        build = Path(self.build_temp).resolve()
        cuda = os.environ.get("LLMPQ_NO_CUDA") != "1"
        configure = [
            *(tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DLLMPQ_CUDA={'ON' if cuda else 'OFF'}",
            # An isolated build leaves a cache that names tools of an environment that is gone: name them every time.
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        subprocess.check_call(configure)
        subprocess.check_call([tool("cmake"), "--build", build])


setup(
    ext_modules=[Extension("llmpq._cpu", []), Extension("llmpq._cuda", [], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
