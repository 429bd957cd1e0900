"""The compiled extensions for a machine with a GPU: built there, or here beforehand and carried beside the project.

    CUDAARCHS=90a python3.12 -m bench.extensions [_cuda] [_cpu]

builds them for the Python that runs this, and keeps them, packed, in build/prebuilt, or the folder that LLMPQ_PREBUILT
names. A file there is named by all that it was built from: bench.gpu_all takes one that fits, else it compiles.
No GPU is needed, and of packages pybind11 alone.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from bench.timebox import Command

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("_cuda", "_cpu")


def architectures() -> str:
    """What CMake is to compile for: CUDAARCHS, the GPUs here, or what is Hopper's alone if there is neither."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if named := os.environ.get("CUDAARCHS"):
        return named
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    names = {capability.replace(".", "") for capability in found} or {"90"}
    return ";".join(sorted("90a" if name == "90" else name for name in names))


def file_name(target: str) -> str:
    """Of an extension for this Python."""
    return f"{target}{sysconfig.get_config_var('EXT_SUFFIX')}"


def folder() -> Path:
    """Where extensions are that were built beforehand."""
    return Path(os.environ.get("LLMPQ_PREBUILT") or ROOT / "build" / "prebuilt")


def prebuilt(target: str) -> Path:
    """The file, packed, of an extension built from the sources as they are, for this Python and these GPUs."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    if target == "_cuda":
        digest.update(architectures().encode())
    return folder() / f"{file_name(target)}.{digest.hexdigest()[:12]}.xz"


def unpack(packed: Path, plain: Path) -> None:
    """Whole or not at all; to os.devnull only to see that it can be."""
    partial = plain if plain == Path(os.devnull) else plain.with_name(f"{plain.name}.partial")
    with lzma.open(packed) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target, 2**20)
    if partial != plain:
        partial.chmod(0o755)
        partial.rename(plain)


def keep(target: str) -> Path:
    """Pack an extension that has just been built; one of other sources goes."""
    packed = prebuilt(target)
    packed.parent.mkdir(parents=True, exist_ok=True)
    partial = packed.with_suffix(".partial")
    with (ROOT / "llmpq" / file_name(target)).open("rb") as source, lzma.open(partial, "wb", preset=1) as copy:
        shutil.copyfileobj(source, copy, 2**20)
    for old in packed.parent.glob(f"{file_name(target)}.*.xz"):
        old.unlink()
    partial.rename(packed)
    return packed


def compiling(state: Path, target: str) -> list[Command]:
    """Configure in a folder of `state`, and compile one extension in place."""
    work = str(state / "cmake")
    pybind = "import pybind11; print(pybind11.get_cmake_dir(), end='')"
    cmake_dir = subprocess.run([sys.executable, "-c", pybind], capture_output=True, text=True, check=True).stdout
    # A file is several kernels, which nvcc optimizes side by side if told to.
    env = (("CUDAARCHS", architectures()), ("NVCC_APPEND_FLAGS", "--split-compile=0"))
    configure = (
        *("cmake", "-S", str(ROOT), "-B", work, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'llmpq'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={cmake_dir}",
    )
    compile_ = ("cmake", "--build", work, "--target", target)
    return [Command(configure, configure, env), Command(compile_, (*compile_, "--", "-n"), env)]


def commands(state: Path, target: str) -> list[Command]:
    """What has the extension in place at its end, and loads it."""
    load = Command((sys.executable, "-c", f"import torch, llmpq.{target} as m; print(m.__file__)"))
    if not prebuilt(target).exists():
        return [*compiling(state, target), load]
    place = (sys.executable, "-m", "bench.extensions", "--place", target)
    return [Command(place, (*place, "--rehearse")), load]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: both)")
    parser.add_argument("--place", action="store_true", help="unpack what was built beforehand instead")
    parser.add_argument("--rehearse", action="store_true", help="but only look whether it can be unpacked")
    arguments = parser.parse_args(argv)
    for name in arguments.targets:
        if name not in TARGETS:
            parser.error(f"{name} is no extension; there are {', '.join(TARGETS)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    for target in arguments.targets or TARGETS:
        if arguments.place:
            packed, plain = prebuilt(target), ROOT / "llmpq" / file_name(target)
            unpack(packed, Path(os.devnull) if arguments.rehearse else plain)
            print(f"{packed} fits")
            continue
        for command in compiling(ROOT / "build" / f"prebuilt-{sysconfig.get_python_version()}", target):
            subprocess.run(command.argv, env=os.environ | dict(command.env), check=True)
        print(keep(target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
